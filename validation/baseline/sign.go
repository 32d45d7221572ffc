package baseline

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

// What is wrong with a signed baseline.
var (
	ErrUnsigned   = errors.New("the baseline is not signed")
	ErrUnknownKey = errors.New("the baseline is signed with a key that is not allowed")
	ErrSignature  = errors.New("the baseline's signature is wrong: it was changed since")
	ErrForeign    = errors.New("the baseline is another guest's")
	ErrRollback   = errors.New("the baseline is older than one that was accepted")
	ErrKey        = errors.New("not an Ed25519 key")
)

const (
	// signContext keeps a signature from being one of anything else that the same key signs (RFC 8032 §8.3).
	signContext = "redoubt.dev/baseline/1"
	signPrefix  = "signature: "
	signKind    = "ed25519"
	keyPrefix   = "ed25519:"
	maxKeyFile  = 16 << 10
)

// signOptions are those of Ed25519ph (RFC 8032 §5.1).
func signOptions() *ed25519.Options {
	return &ed25519.Options{Hash: crypto.SHA512, Context: signContext}
}

// splitSignature returns what a signature is of, and its line, nil if there is none.
func splitSignature(file []byte) (draft, line []byte, err error) {
	last := lastLine(file)
	if last == nil {
		return nil, nil, malformed(len(file), "no last line: it is cut off")
	}
	if !bytes.HasPrefix(last, []byte(signPrefix)) {
		return file, nil, nil
	}
	return file[:len(file)-len(last)], last, nil
}

// KeyID names a public key in eight bytes, as 16 hexadecimal digits: a signature says which key it is of.
func KeyID(key ed25519.PublicKey) string {
	sum := sha256.Sum256(key)
	return hex.EncodeToString(sum[:8])
}

// Sign signs a draft with Ed25519ph and returns the signed file. What is signed already, or is not right as
// [Baseline.Check] has it, is refused.
func Sign(draft []byte, key ed25519.PrivateKey) ([]byte, error) {
	if len(key) != ed25519.PrivateKeySize {
		return nil, ErrKey
	}
	b, err := Open(draft)
	if err != nil {
		return nil, err
	}
	if b.Signed() {
		return nil, errors.New("the baseline is signed already")
	}
	if err := b.Check(); err != nil {
		return nil, err
	}
	sum := sha512.Sum512(draft)
	signature, err := key.Sign(nil, sum[:], signOptions())
	if err != nil {
		return nil, err
	}
	public, _ := key.Public().(ed25519.PublicKey)
	out := append(make([]byte, 0, len(draft)+maxTrailer), draft...)
	return fmt.Appendf(out, "%s%s %s %s\n", signPrefix, signKind, KeyID(public), base64.StdEncoding.EncodeToString(signature)), nil
}

// Verify opens a signed baseline of a guest, if one of the allowed keys signed it and its version is minimal or a later one.
// Nothing but the signature's line is read before the signature is known to be right. Errors are [ErrUnsigned],
// [ErrUnknownKey], [ErrSignature], [ErrForeign], [ErrRollback] and [ErrFormat], in that order.
func Verify(signed []byte, allowed []ed25519.PublicKey, guest string, minimal uint64) (*Baseline, error) {
	if len(signed) > MaxFile+maxTrailer {
		return nil, fmt.Errorf("%w: %d bytes: the most is %d", ErrFormat, len(signed), MaxFile)
	}
	if err := verifySignature(signed, allowed); err != nil {
		return nil, err
	}
	b, err := Open(signed)
	if err != nil {
		return nil, err
	}
	if b.Guest != guest {
		return nil, fmt.Errorf("%w: it is of %s, not of %s", ErrForeign, b.Guest, guest)
	}
	if b.Version < minimal {
		return nil, fmt.Errorf("%w: version %d, and %d was accepted", ErrRollback, b.Version, minimal)
	}
	return b, nil
}

func verifySignature(signed []byte, allowed []ed25519.PublicKey) error {
	draft, line, err := splitSignature(signed)
	if err != nil {
		return err
	}
	if line == nil {
		return ErrUnsigned
	}
	id, signature, err := parseSignature(line)
	if err != nil {
		return malformed(len(draft), "signature: %w", err)
	}
	known := false
	var sum [sha512.Size]byte
	for _, key := range allowed {
		if len(key) != ed25519.PublicKeySize || KeyID(key) != id {
			continue
		}
		if !known {
			known, sum = true, sha512.Sum512(draft)
		}
		if ed25519.VerifyWithOptions(key, sum[:], signature, signOptions()) == nil {
			return nil
		}
	}
	if !known {
		return fmt.Errorf("%w: key %s", ErrUnknownKey, id)
	}
	return fmt.Errorf("%w (key %s)", ErrSignature, id)
}

// parseSignature reads the line, in the one form that Sign writes.
func parseSignature(line []byte) (id string, signature []byte, err error) {
	words := strings.Split(strings.TrimSuffix(strings.TrimPrefix(string(line), signPrefix), "\n"), " ")
	if len(words) != 3 || words[0] != signKind {
		return "", nil, errors.New("not of Ed25519, with a key's ID and 64 bytes in base64")
	}
	raw, err := hex.DecodeString(words[1])
	if err != nil || len(raw) != 8 || hex.EncodeToString(raw) != words[1] {
		return "", nil, errors.New("no ID of a key")
	}
	signature, err = base64.StdEncoding.Strict().DecodeString(words[2])
	if err != nil || len(signature) != ed25519.SignatureSize || base64.StdEncoding.EncodeToString(signature) != words[2] {
		return "", nil, errors.New("not 64 bytes in base64")
	}
	return words[1], signature, nil
}

// GenerateKey makes a key of the system's random numbers.
func GenerateKey() (ed25519.PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(nil)
	return key, err
}

// FormatPrivateKey is a private key as PKCS#8 in PEM, as [ParsePrivateKey] and openssl read it.
func FormatPrivateKey(key ed25519.PrivateKey) ([]byte, error) {
	if len(key) != ed25519.PrivateKeySize {
		return nil, ErrKey
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// ParsePrivateKey reads PKCS#8 in PEM, as `openssl genpkey -algorithm ed25519` writes it. Errors are [ErrKey].
func ParsePrivateKey(b []byte) (ed25519.PrivateKey, error) {
	der, err := onePEM(b, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%w: not PKCS#8", ErrKey) // what the library says may tell of the key
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%w: a private key of another kind: use `openssl genpkey -algorithm ed25519`", ErrKey)
	}
	return key, nil
}

// ParsePublicKey reads one line ed25519:BASE64, as specifications have it, or PKIX in PEM, as `openssl pkey -pubout` writes
// it. Errors are [ErrKey].
func ParsePublicKey(b []byte) (ed25519.PublicKey, error) {
	if len(b) > maxKeyFile {
		return nil, fmt.Errorf("%w: %d bytes", ErrKey, len(b))
	}
	if line, ok := strings.CutPrefix(strings.TrimSpace(string(b)), keyPrefix); ok {
		key, err := base64.StdEncoding.Strict().DecodeString(line)
		if err != nil || len(key) != ed25519.PublicKeySize || strings.ContainsAny(line, "\r\n") {
			return nil, fmt.Errorf("%w: %q is for 32 bytes in base64", ErrKey, keyPrefix)
		}
		return key, nil
	}
	der, err := onePEM(b, "PUBLIC KEY")
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	key, ok := parsed.(ed25519.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%w: a %T", ErrKey, parsed)
	}
	return key, nil
}

// FormatPublicKey is a public key as one line ed25519:BASE64, without an end.
func FormatPublicKey(key ed25519.PublicKey) string {
	return keyPrefix + base64.StdEncoding.EncodeToString(key)
}

// onePEM is what the one block of a file holds.
func onePEM(b []byte, kind string) ([]byte, error) {
	if len(b) > maxKeyFile {
		return nil, fmt.Errorf("%w: %d bytes", ErrKey, len(b))
	}
	block, rest := pem.Decode(b)
	switch {
	case block == nil:
		return nil, fmt.Errorf("%w: no PEM of a %s", ErrKey, strings.ToLower(kind))
	case block.Type == "ENCRYPTED PRIVATE KEY":
		return nil, fmt.Errorf("%w: it is encrypted: use `openssl pkey` to decrypt it", ErrKey)
	case block.Type != kind || len(block.Headers) > 0:
		return nil, fmt.Errorf("%w: PEM of a %.40q, not of a %s", ErrKey, block.Type, strings.ToLower(kind))
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, fmt.Errorf("%w: more than one block", ErrKey)
	}
	return block.Bytes, nil
}
