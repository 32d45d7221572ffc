package baseline

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// Keys that openssl made: `openssl genpkey -algorithm ed25519`, `openssl pkey -pubout`, and an elliptic curve's.
const (
	opensslPrivate = `-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEINy7R6fGikt1OFu6H+VNKCXwqKAYy8HZV6PgS+EX/4AT
-----END PRIVATE KEY-----
`
	opensslPublic = `-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAupKTe0F3xUv/zRTsEyPGR4JjUHsB+Xqpy+yS4XKU2L4=
-----END PUBLIC KEY-----
`
	curvePrivate = `-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgsFjU+s8jFcZGp4xf
5LuW5+XC9QnwgF8i/mt7EnSC2RahRANCAASnSPOt98/mpyXb9qCrbraQpCkRfo+U
M+x7YxoL4qXpne6+BhAM0Dwx+KybgRXQmbHfwtzNE0opgh/zwjoFvinN
-----END PRIVATE KEY-----
`
	curvePublic = `-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEp0jzrffP5qcl2/agq262kKQpEX6P
lDPse2MaC+Kl6Z3uvgYQDNA8Mfism4EV0Jmx38LczRNKKYIf88I6Bb4pzQ==
-----END PUBLIC KEY-----
`
)

func testKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	key, err := ParsePrivateKey([]byte(opensslPrivate))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func public(key ed25519.PrivateKey) ed25519.PublicKey { return key.Public().(ed25519.PublicKey) }

func signed(t testing.TB, key ed25519.PrivateKey) []byte {
	t.Helper()
	s, err := Sign(draft(t, testHeader(t), odd()), key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestVerify: each thing that may be wrong with a signed baseline has an error of its own.
func TestVerify(t *testing.T) {
	key := testKey(t)
	other, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	file := signed(t, key)
	unsigned := draft(t, testHeader(t), odd())
	allowed := []ed25519.PublicKey{public(other), public(key)}
	b, err := Verify(file, allowed, testGuest, 3)
	if err != nil || !b.Signed() || b.Check() != nil || b.Len() != len(odd()) {
		t.Fatalf("%v %v", b, err)
	}
	// Another key's signature under this one's ID.
	sum := sha512.Sum512(unsigned)
	line := func(key ed25519.PrivateKey, id string, o *ed25519.Options, message []byte) []byte {
		s, err := key.Sign(nil, message, o)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Appendf(bytes.Clone(unsigned), "signature: ed25519 %s %s\n", id, base64.StdEncoding.EncodeToString(s))
	}
	id := KeyID(public(key))
	for name, c := range map[string]struct {
		file    []byte
		allowed []ed25519.PublicKey
		guest   string
		minimal uint64
		want    error
	}{
		"unsigned":       {unsigned, allowed, testGuest, 0, ErrUnsigned},
		"unknown key":    {file, allowed[:1], testGuest, 0, ErrUnknownKey},
		"no key":         {file, nil, testGuest, 0, ErrUnknownKey},
		"short key":      {file, []ed25519.PublicKey{{1, 2}}, testGuest, 0, ErrUnknownKey},
		"changed":        {bytes.Replace(file, []byte("/all/owned f 4755"), []byte("/all/owned f 4777"), 1), allowed, testGuest, 0, ErrSignature},
		"header changed": {bytes.Replace(file, []byte("version 3"), []byte("version 4"), 1), allowed, testGuest, 0, ErrSignature},
		"rules changed":  {bytes.Replace(file, []byte("critical"), []byte("info"), 1), allowed, testGuest, 0, ErrSignature},
		"other's":        {line(other, id, signOptions(), sum[:]), allowed, testGuest, 0, ErrSignature},
		"no context":     {line(key, id, &ed25519.Options{Hash: crypto.SHA512}, sum[:]), allowed, testGuest, 0, ErrSignature},
		"other context":  {line(key, id, &ed25519.Options{Hash: crypto.SHA512, Context: "x"}, sum[:]), allowed, testGuest, 0, ErrSignature},
		"no hash":        {line(key, id, &ed25519.Options{}, unsigned), allowed, testGuest, 0, ErrSignature},
		"other guest":    {file, allowed, strings.Replace(testGuest, "7", "8", 1), 0, ErrForeign},
		"rollback":       {file, allowed, testGuest, 4, ErrRollback},
		"two signatures": {append(bytes.Clone(file), bytes.TrimPrefix(file, unsigned)...), allowed, testGuest, 0, ErrSignature},
		"other kind":     {bytes.Replace(file, []byte("signature: ed25519"), []byte("signature: ed25510"), 1), allowed, testGuest, 0, ErrFormat},
		"base64":         {append(bytes.TrimSuffix(bytes.Clone(file), []byte("=\n")), "\n"...), allowed, testGuest, 0, ErrFormat},
		"behind":         {append(bytes.Clone(file), "x\n"...), allowed, testGuest, 0, ErrUnsigned},
		"cut off":        {file[:len(file)-1], allowed, testGuest, 0, ErrFormat},
		"empty":          {nil, allowed, testGuest, 0, ErrFormat},
	} {
		if _, err := Verify(c.file, c.allowed, c.guest, c.minimal); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, not %v", name, err, c.want)
		}
	}
	if _, err := Sign(file, key); err == nil {
		t.Error("signed twice")
	}
	if _, err := Sign(bytes.Replace(unsigned, []byte("0755"), []byte("0955"), 1), key); err == nil {
		t.Error("a damaged draft was signed")
	}
	if _, err := Sign(unsigned, nil); !errors.Is(err, ErrKey) {
		t.Errorf("no key: %v", err)
	}
}

// TestSignatureCovers: whichever byte of a signed file is changed, it is refused.
func TestSignatureCovers(t *testing.T) {
	key := testKey(t)
	file, err := Sign(draft(t, testHeader(t), odd()[:2]), key)
	if err != nil {
		t.Fatal(err)
	}
	for i := range file {
		file[i] ^= 1
		if _, err := Verify(file, []ed25519.PublicKey{public(key)}, testGuest, 0); err == nil {
			t.Fatalf("byte %d", i)
		}
		file[i] ^= 1
	}
}

// TestKeys: keys are read as openssl writes them, and as we do; anything else is refused.
func TestKeys(t *testing.T) {
	key := testKey(t)
	fromPEM, err := ParsePublicKey([]byte(opensslPublic))
	if err != nil || !fromPEM.Equal(key.Public()) {
		t.Fatalf("%x %v", fromPEM, err)
	}
	line, err := ParsePublicKey([]byte(FormatPublicKey(fromPEM) + "\n"))
	if err != nil || !line.Equal(fromPEM) {
		t.Errorf("%v %v", line, err)
	}
	text, err := FormatPrivateKey(key)
	if err != nil || string(text) != opensslPrivate {
		t.Errorf("%s %v", text, err)
	}
	encrypted := strings.ReplaceAll(opensslPrivate, "PRIVATE", "ENCRYPTED PRIVATE")
	for _, bad := range []string{"", "x", opensslPublic, curvePrivate, opensslPrivate + opensslPrivate, encrypted, strings.Repeat("x", maxKeyFile+1), opensslPrivate[:60] + "AA" + opensslPrivate[60:]} {
		if _, err := ParsePrivateKey([]byte(bad)); !errors.Is(err, ErrKey) {
			t.Errorf("%.60q: %v", bad, err)
		}
	}
	if _, err := ParsePrivateKey([]byte(encrypted)); !strings.Contains(err.Error(), "openssl pkey") {
		t.Errorf("an encrypted one: %v", err)
	}
	short := FormatPublicKey(fromPEM[:31])
	for _, bad := range []string{"", "ed25519:", "ed25519:****", short, FormatPublicKey(fromPEM)[8:], opensslPrivate, curvePublic, opensslPublic + opensslPublic, strings.Repeat(" ", maxKeyFile+1)} {
		if _, err := ParsePublicKey([]byte(bad)); !errors.Is(err, ErrKey) {
			t.Errorf("%.60q: %v", bad, err)
		}
	}
}

// FuzzPublicKey: what is taken for a public key is the same one in its one-line form.
func FuzzPublicKey(f *testing.F) {
	key := testKey(f)
	f.Add([]byte(FormatPublicKey(public(key))))
	f.Add([]byte(opensslPublic))
	f.Fuzz(func(t *testing.T, b []byte) {
		key, err := ParsePublicKey(b)
		if err != nil {
			return
		}
		if again, err := ParsePublicKey([]byte(FormatPublicKey(key))); err != nil || !again.Equal(key) {
			t.Fatalf("%v %v", again, err)
		}
	})
}
