package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"
)

var (
	oidEKCertificate  = asn1.ObjectIdentifier{2, 23, 133, 8, 1} // tcg-kp-EKCertificate (TCG EK Credential Profile)
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// checkEK checks that the certificate is an endorsement key's and leads to a root.
func checkEK(e *Evidence, roots *x509.CertPool, now time.Time) (*x509.Certificate, error) {
	if roots == nil {
		return nil, errors.New("no root certificate to trust: give the host's CA")
	}
	cert, err := certificate("EK certificate", e.EKCertificate)
	if err != nil {
		return nil, err
	}
	if len(e.EKChain) > maxIntermediate {
		return nil, fmt.Errorf("chain of %d certificates: the most is %d", len(e.EKChain), maxIntermediate)
	}
	between := x509.NewCertPool()
	for i, der := range e.EKChain {
		c, err := certificate(fmt.Sprintf("chain certificate %d", i+1), der)
		if err != nil {
			return nil, err
		}
		between.AddCert(c)
	}
	// Without it any certificate of the same issuer, such as a server's, would name a TPM.
	if !slices.ContainsFunc(cert.UnknownExtKeyUsage, oidEKCertificate.Equal) || cert.IsCA {
		return nil, errors.New("EK certificate: it is not for an endorsement key (extended key usage 2.23.133.8.1)")
	}
	// The alternative name holds the TPM's maker as a directory name, critical where the subject
	// is empty (TCG EK Credential Profile); Go does not know that form, and nothing here rests on it.
	cert.UnhandledCriticalExtensions = slices.DeleteFunc(cert.UnhandledCriticalExtensions, oidSubjectAltName.Equal)
	if _, err := cert.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}); err != nil {
		return nil, fmt.Errorf("EK certificate of issuer %q: %w", cert.Issuer.String(), err)
	}
	return cert, nil
}

func certificate(what string, der []byte) (*x509.Certificate, error) {
	if len(der) == 0 {
		return nil, fmt.Errorf("%s: missing", what)
	}
	if len(der) > maxCertificate {
		return nil, fmt.Errorf("%s: %d bytes: the most is %d", what, len(der), maxCertificate)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return c, nil
}

// secretSize is the length of a credential: what a digest of the EK's name algorithm holds.
const secretSize = sha256.Size

// MakeCredential encrypts a fresh secret so that only the TPM that holds both keys can open it:
// the endorsement key ek and the key whose name is akName (TPM 2.0 Part 1 §24). The EK is of
// the template L-2 (*ecdsa.PublicKey of P-256) or L-1 (*rsa.PublicKey of 2048 bits) of the EK
// Credential Profile, annex B.
//
// TPM2_ActivateCredential takes blob as the content of its TPM2B_ID_OBJECT and secret as the
// content of its TPM2B_ENCRYPTED_SECRET (neither has the leading size), and answers want.
func MakeCredential(ek crypto.PublicKey, akName []byte) (blob, secret, want []byte, err error) {
	pub, err := ekTemplate(ek)
	if err != nil {
		return nil, nil, nil, err
	}
	key, err := tpm2.ImportEncapsulationKey(pub)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("endorsement key: %w", err)
	}
	want = make([]byte, secretSize)
	_, _ = rand.Read(want) // never fails (crypto/rand)
	blob, secret, err = tpm2.CreateCredential(rand.Reader, key, akName, want)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("make a credential: %w", err)
	}
	return blob, secret, want, nil
}

func ekTemplate(ek crypto.PublicKey) (*tpm2.TPMTPublic, error) {
	switch k := ek.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() {
			return nil, fmt.Errorf("endorsement key: curve %s: use P-256", k.Curve.Params().Name)
		}
		point, err := k.Bytes() // 4, X, Y
		if err != nil {
			return nil, fmt.Errorf("endorsement key: %w", err)
		}
		pub := tpm2.ECCEKTemplate
		pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1:33]},
			Y: tpm2.TPM2BECCParameter{Buffer: point[33:65]},
		})
		return &pub, nil
	case *rsa.PublicKey:
		if k.N.BitLen() != 2048 || k.E != 65537 {
			return nil, fmt.Errorf("endorsement key: RSA of %d bits, exponent %d: use 2048 and 65537", k.N.BitLen(), k.E)
		}
		pub := tpm2.RSAEKTemplate
		pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.FillBytes(make([]byte, 256))})
		return &pub, nil
	}
	return nil, fmt.Errorf("endorsement key: type %T: use ECC P-256 or RSA 2048", ek)
}

// An attestationKey is an AK as its public area describes it.
type attestationKey struct {
	public *tpm2.TPMTPublic
	name   []byte // what a credential is bound to: algorithm and digest of the public area (Part 1 §16)
}

// parseAK reads a public area, with or without its size in front.
func parseAK(b []byte) (*attestationKey, error) {
	if len(b) > maxStructure {
		return nil, fmt.Errorf("public area of %d bytes: the most is %d", len(b), maxStructure)
	}
	if len(b) >= 2 && int(binary.BigEndian.Uint16(b)) == len(b)-2 {
		b = b[2:]
	}
	pub, err := unmarshal[tpm2.TPMTPublic](b)
	if err != nil {
		return nil, fmt.Errorf("public area: %w", err)
	}
	if pub.NameAlg != tpm2.TPMAlgSHA256 {
		return nil, fmt.Errorf("name algorithm %#04x: use SHA-256", uint16(pub.NameAlg))
	}
	name, err := tpm2.ObjectName(pub)
	if err != nil {
		return nil, fmt.Errorf("name: %w", err)
	}
	return &attestationKey{pub, name.Buffer}, nil
}

// check says why the key cannot be trusted to sign nothing but what its TPM states, and returns
// it as a key of Go. A restricted signing key signs no outside data that looks like an
// attestation; fixedTPM, fixedParent and sensitiveDataOrigin say that it was
// made in this TPM and exists nowhere else (Part 2 §8.3.3).
func (k *attestationKey) check() (*ecdsa.PublicKey, error) {
	a := k.public.ObjectAttributes
	for _, c := range []struct {
		bad  bool
		text string
	}{
		{!a.SignEncrypt, "not a signing key"},
		{a.Decrypt, "may decrypt too"},
		{!a.Restricted, "not restricted: it could sign a quote made up outside the TPM"},
		{!a.FixedTPM, "not fixedTPM: it may exist in another TPM"},
		{!a.FixedParent, "not fixedParent: it may exist in another TPM"},
		{!a.SensitiveDataOrigin, "not sensitiveDataOrigin: its private part was made outside the TPM"},
		{k.public.Type != tpm2.TPMAlgECC, "not of elliptic curves: use ECC P-256"},
	} {
		if c.bad {
			return nil, errors.New(c.text)
		}
	}
	parms, err := k.public.Parameters.ECCDetail()
	if err != nil {
		return nil, err
	}
	point, err := k.public.Unique.ECC()
	if err != nil {
		return nil, err
	}
	if parms.CurveID != tpm2.TPMECCNistP256 || len(point.X.Buffer) > 32 || len(point.Y.Buffer) > 32 {
		return nil, fmt.Errorf("curve %#04x: use ECC P-256", uint16(parms.CurveID))
	}
	if parms.Scheme.Scheme != tpm2.TPMAlgECDSA {
		return nil, fmt.Errorf("signing scheme %#04x: use ECDSA", uint16(parms.Scheme.Scheme))
	}
	if s, err := parms.Scheme.Details.ECDSA(); err != nil || s.HashAlg != tpm2.TPMAlgSHA256 {
		return nil, errors.New("signing hash: use SHA-256")
	}
	raw := make([]byte, 65) // 4, X, Y; coordinates may come without leading zeros
	raw[0] = 4
	copy(raw[33-len(point.X.Buffer):33], point.X.Buffer)
	copy(raw[65-len(point.Y.Buffer):], point.Y.Buffer)
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), raw)
}

// checkSignature checks a TPMT_SIGNATURE over a quote and returns what was signed. A quote is
// only a quote with the TPM's own mark in front, which the AK's TPM lets nobody else sign.
func checkSignature(key *ecdsa.PublicKey, quote, signature []byte) (*tpm2.TPMSAttest, error) {
	if len(quote) > maxStructure || len(signature) > maxStructure {
		return nil, fmt.Errorf("quote of %d and signature of %d bytes: the most is %d", len(quote), len(signature), maxStructure)
	}
	sig, err := unmarshal[tpm2.TPMTSignature](signature)
	if err != nil {
		return nil, fmt.Errorf("signature: %w", err)
	}
	if sig.SigAlg != tpm2.TPMAlgECDSA {
		return nil, fmt.Errorf("signature of algorithm %#04x: use ECDSA", uint16(sig.SigAlg))
	}
	ec, err := sig.Signature.ECDSA()
	if err != nil {
		return nil, fmt.Errorf("signature: %w", err)
	}
	if ec.Hash != tpm2.TPMAlgSHA256 || len(ec.SignatureR.Buffer) > 32 || len(ec.SignatureS.Buffer) > 32 {
		return nil, fmt.Errorf("signature with hash %#04x: use SHA-256", uint16(ec.Hash))
	}
	sum := sha256.Sum256(quote)
	r, s := new(big.Int).SetBytes(ec.SignatureR.Buffer), new(big.Int).SetBytes(ec.SignatureS.Buffer)
	if !ecdsa.Verify(key, sum[:], r, s) {
		return nil, errors.New("the AK did not sign this quote")
	}
	attest, err := unmarshal[tpm2.TPMSAttest](quote)
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	if attest.Magic != tpm2.TPMGeneratedValue || attest.Type != tpm2.TPMSTAttestQuote {
		return nil, fmt.Errorf("what was signed is no quote: magic %#08x, type %#04x", uint32(attest.Magic), uint16(attest.Type))
	}
	return attest, nil
}

// unmarshal reads a structure that takes all of b.
func unmarshal[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](b []byte) (*T, error) {
	v, err := tpm2.Unmarshal[T, P](b)
	if err != nil {
		return nil, fmt.Errorf("%d bytes: %w", len(b), err)
	}
	// Two forms of one structure would have two names or two digests.
	if again := tpm2.Marshal(*v); !bytes.Equal(again, b) {
		return nil, fmt.Errorf("%d bytes where the structure takes %d", len(b), len(again))
	}
	return v, nil
}
