package keys

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/google/renameio/v2"
)

// The root key's file: magic, version, kind, body, SHA-256 of all before. The digest tells damage
// from a foreign key; of a random key it gives nothing away.
const (
	rootMagic    = "RDBTROOT"
	rootVersion  = 1
	kindPlain    = 0 // the body is the key
	kindSealed   = 1 // the body is a sealed object: u16 length, TPM2B_PUBLIC's contents; the same for TPM2B_PRIVATE's
	rootHeader   = len(rootMagic) + 2
	maxRootFile  = 4096
	rootFileMode = 0o600
)

// Open reads the root key's file. A sealed key needs the TPM that sealed it; nil where the host has
// none.
func Open(file string, tpm *Host) (*Root, error) {
	r, err := open(file, tpm)
	if err != nil {
		return nil, fmt.Errorf("root key %s: %w", file, err)
	}
	return r, nil
}

func open(file string, tpm *Host) (*Root, error) {
	b, err := ReadFile(file, maxRootFile)
	if err != nil {
		return nil, err
	}
	p, err := parseRoot(b)
	if err != nil {
		return nil, err
	}
	if p.kind == kindPlain {
		return newRoot(p.key, false)
	}
	if tpm == nil {
		return nil, errors.New("it is sealed to a TPM: name this host's TPM")
	}
	key, err := unseal(tpm, p.public, p.private)
	if err != nil {
		return nil, fmt.Errorf("unseal with the TPM %s: %w", tpm, err)
	}
	return newRoot(key, true)
}

// Create makes a root key, sealed to tpm if that is not nil, and writes its file durably. It fails
// if there is a file already.
func Create(file string, tpm *Host) (*Root, error) {
	r, err := create(file, tpm)
	if err != nil {
		return nil, fmt.Errorf("create root key %s: %w", file, err)
	}
	return r, nil
}

func create(file string, tpm *Host) (*Root, error) {
	if _, err := os.Lstat(file); err == nil {
		return nil, errors.New("the file is there: a root key is never replaced")
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	key := New()
	p := rootFile{kind: kindPlain, key: key[:]}
	if tpm != nil {
		pub, priv, err := seal(tpm, key[:])
		if err != nil {
			return nil, fmt.Errorf("seal to the TPM %s: %w", tpm, err)
		}
		p = rootFile{kind: kindSealed, public: pub, private: priv}
	}
	if err := WriteFile(file, p.encode()); err != nil {
		return nil, err
	}
	return newRoot(key[:], tpm != nil)
}

// WriteFile replaces a private file durably: it has the old contents or the new ones whatever
// happens, and the new ones on disk once WriteFile returned.
func WriteFile(file string, b []byte) error {
	if err := renameio.WriteFile(file, b, rootFileMode, renameio.IgnoreUmask()); err != nil {
		return err
	}
	return SyncDir(file)
}

// ReadFile reads a file that must be this user's alone, as WriteFile makes them: regular, no
// link, not accessible to others, at most max bytes long.
func ReadFile(file string, max int) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	switch {
	case !ok || !st.Mode().IsRegular():
		return nil, errors.New("not a regular file")
	case st.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("its mode is %04o, others may read or write it: chmod 0600 if nobody did, else start anew", st.Mode().Perm())
	case int(sys.Uid) != os.Geteuid():
		return nil, fmt.Errorf("it belongs to user %d, this program runs as %d", sys.Uid, os.Geteuid())
	}
	b, err := io.ReadAll(io.LimitReader(f, int64(max)+1))
	if err == nil && len(b) > max {
		return nil, fmt.Errorf("longer than %d bytes", max)
	}
	return b, err
}

type rootFile struct {
	kind            byte
	key             []byte // kindPlain
	public, private []byte // kindSealed
}

func (p rootFile) encode() []byte {
	b := append([]byte(rootMagic), rootVersion, p.kind)
	if p.kind == kindPlain {
		b = append(b, p.key...)
	} else {
		for _, part := range [][]byte{p.public, p.private} {
			b = binary.BigEndian.AppendUint16(b, uint16(len(part)))
			b = append(b, part...)
		}
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

// parseRoot reads the root key's file.
func parseRoot(b []byte) (p rootFile, err error) {
	if len(b) < rootHeader+sha256.Size || len(b) > maxRootFile {
		return p, fmt.Errorf("%d bytes, may have %d to %d: not a root key", len(b), rootHeader+sha256.Size, maxRootFile)
	}
	body, sum := b[:len(b)-sha256.Size], sha256.Sum256(b[:len(b)-sha256.Size])
	switch {
	case !bytes.HasPrefix(b, []byte(rootMagic)):
		return p, errors.New("not a root key: no magic at offset 0")
	case b[8] != rootVersion:
		return p, fmt.Errorf("version %d at offset 8, this program reads %d", b[8], rootVersion)
	case !bytes.Equal(sum[:], b[len(body):]):
		return p, fmt.Errorf("damaged: the digest at offset %d does not match; restore it from a copy", len(body))
	}
	p.kind = b[9]
	rest := body[rootHeader:]
	switch p.kind {
	case kindPlain:
		if len(rest) != Size {
			return p, fmt.Errorf("key of %d bytes at offset %d, must be %d", len(rest), rootHeader, Size)
		}
		p.key = rest
	case kindSealed:
		for _, part := range []*[]byte{&p.public, &p.private} {
			at := len(body) - len(rest)
			if len(rest) < 2 {
				return p, fmt.Errorf("ends at offset %d in a length", at)
			}
			n := int(binary.BigEndian.Uint16(rest))
			if rest = rest[2:]; n == 0 || n > len(rest) {
				return p, fmt.Errorf("part of %d bytes at offset %d, %d are left", n, at, len(rest))
			}
			*part, rest = rest[:n], rest[n:]
		}
		if len(rest) != 0 {
			return p, fmt.Errorf("%d bytes too many at offset %d", len(rest), len(body)-len(rest))
		}
	default:
		return p, fmt.Errorf("kind %d at offset 9", p.kind)
	}
	return p, nil
}
