// Package keys holds the vTPM manager's root key and wraps with it the keys that rest on disk.
//
// The root key is sealed to the host's TPM where there is one, else it lies in a file that only
// its owner can read. It is made once and never replaced: a file that is there but does not open
// is an error.
//
// A wrapped key is bound to a context (whose key it is, for what): it opens only under the same
// root key and with the same context, so that a key copied to another guest's place, or a
// record that was altered, is refused.
package keys

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
)

// Size is the length of every key here in bytes: AES-256.
const Size = 32

// wrapVersion begins each wrapped key; the rest is nonce (12), ciphertext, tag (16).
const wrapVersion = 1

const wrapOverhead = 1 + 12 + 16

// maxWrapped bounds what Unwrap reads: no key is near it.
const maxWrapped = 4096

// ErrUnwrap says that a wrapped key is damaged, bound to something else, or another root key's:
// the cipher cannot tell these apart.
var ErrUnwrap = errors.New("wrapped key does not open: damaged, altered, or of another host")

// A Root is the root key, open.
type Root struct {
	aead   cipher.AEAD
	sealed bool
}

func newRoot(key []byte, sealed bool) (*Root, error) {
	if len(key) != Size {
		return nil, fmt.Errorf("root key of %d bytes, must be %d", len(key), Size)
	}
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	a, err := cipher.NewGCMWithRandomNonce(b)
	if err != nil {
		return nil, err
	}
	return &Root{a, sealed}, nil
}

// Sealed says whether the root key rests in the host's TPM rather than in a file.
func (r *Root) Sealed() bool { return r.sealed }

// Wrap encrypts secret, at most 2 KiB, bound to context.
func (r *Root) Wrap(secret, context []byte) []byte {
	return r.aead.Seal([]byte{wrapVersion}, nil, secret, bound(context))
}

// Unwrap opens what Wrap made with the same context.
func (r *Root) Unwrap(wrapped, context []byte) ([]byte, error) {
	if len(wrapped) < wrapOverhead || len(wrapped) > maxWrapped {
		return nil, fmt.Errorf("wrapped key of %d bytes, may have %d to %d", len(wrapped), wrapOverhead, maxWrapped)
	}
	if wrapped[0] != wrapVersion {
		return nil, fmt.Errorf("wrapped key of version %d at offset 0, this program reads %d", wrapped[0], wrapVersion)
	}
	secret, err := r.aead.Open(nil, nil, wrapped[1:], bound(context))
	if err != nil {
		return nil, ErrUnwrap
	}
	return secret, nil
}

// bound is the additional data: the version is authenticated with the context.
func bound(context []byte) []byte {
	return append([]byte("redoubt wrapped key \x01"), context...)
}

// New is a fresh random key.
func New() (k [Size]byte) {
	_, _ = rand.Read(k[:]) // never fails (crypto/rand)
	return k
}
