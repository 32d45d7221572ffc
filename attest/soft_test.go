package attest

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/attest/eventlog"
)

// A softTPM does in Go what a verifier sees of a TPM: fast, and ready to lie.
type softTPM struct {
	ek, ak *ecdsa.PrivateKey
	akPub  tpm2.TPMTPublic
	pcrs   [PCRCount]Hash
}

// akTemplate is that of an attestation key as the vTPM manager makes it.
func akTemplate() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true,
			NoDA: true, Restricted: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			CurveID: tpm2.TPMECCNistP256,
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
		}),
	}
}

// newSoftTPM makes a TPM with the keys, EK and AK, or with new ones.
func newSoftTPM(t testing.TB, keys ...*ecdsa.PrivateKey) *softTPM {
	t.Helper()
	if keys == nil {
		keys = []*ecdsa.PrivateKey{newKey(t), newKey(t)}
	}
	s := &softTPM{ek: keys[0], ak: keys[1], akPub: akTemplate()}
	point, err := s.ak.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	s.akPub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
	})
	for i := 17; i <= 22; i++ {
		for j := range s.pcrs[i] {
			s.pcrs[i][j] = 0xff
		}
	}
	return s
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// fixedKey is the same in every process, as the corpus of a fuzz test needs it.
func fixedKey(t testing.TB, n byte) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), bytes.Repeat([]byte{n}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (s *softTPM) extend(pcr uint32, sum []byte) {
	s.pcrs[pcr] = sha256.Sum256(append(s.pcrs[pcr][:], sum...))
}

// quote signs the registers.
func (s *softTPM) quote(t testing.TB, nonce []byte) (quote, signature []byte, pcrs []Hex) {
	t.Helper()
	all := sha256.New()
	for _, v := range s.pcrs {
		all.Write(v[:])
		pcrs = append(pcrs, Hex(v[:]))
	}
	quote = tpm2.Marshal(tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote, ExtraData: tpm2.TPM2BData{Buffer: nonce},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: allPCRs(), PCRDigest: tpm2.TPM2BDigest{Buffer: all.Sum(nil)},
		}),
	})
	return quote, s.sign(t, quote), pcrs
}

func allPCRs() tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0xff, 0xff, 0xff}}}}
}

func (s *softTPM) sign(t testing.TB, message []byte) []byte {
	t.Helper()
	sum := sha256.Sum256(message)
	r, ss, err := ecdsa.Sign(rand.Reader, s.ak, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return tpm2.Marshal(tpm2.TPMTSignature{
		SigAlg: tpm2.TPMAlgECDSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash:       tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: r.FillBytes(make([]byte, 32))},
			SignatureS: tpm2.TPM2BECCParameter{Buffer: ss.FillBytes(make([]byte, 32))},
		}),
	})
}

// activate is TPM2_ActivateCredential (Part 1 §24): ECDH, integrity, decryption.
func (s *softTPM) activate(blob, secret []byte) ([]byte, error) {
	point, err := tpm2.Unmarshal[tpm2.TPMSECCPoint](secret)
	if err != nil {
		return nil, err
	}
	peer, err := ecdh.P256().NewPublicKey(append(append([]byte{4}, point.X.Buffer...), point.Y.Buffer...))
	if err != nil {
		return nil, err
	}
	own, err := s.ek.ECDH()
	if err != nil {
		return nil, err
	}
	z, err := own.ECDH(peer)
	if err != nil {
		return nil, err
	}
	name, err := tpm2.ObjectName(&s.akPub)
	if err != nil {
		return nil, err
	}
	seed := tpm2.KDFe(crypto.SHA256, z, "IDENTITY", point.X.Buffer, own.PublicKey().Bytes()[1:33], 256)
	if len(blob) < 34 {
		return nil, errors.New("short credential")
	}
	tag, sealed := blob[2:34], blob[34:]
	mac := hmac.New(sha256.New, tpm2.KDFa(crypto.SHA256, seed, "INTEGRITY", nil, nil, 256))
	mac.Write(sealed)
	mac.Write(name.Buffer)
	if !hmac.Equal(mac.Sum(nil), tag) {
		return nil, errors.New("TPM_RC_INTEGRITY")
	}
	block, err := aes.NewCipher(tpm2.KDFa(crypto.SHA256, seed, "STORAGE", name.Buffer, nil, 128))
	if err != nil {
		return nil, err
	}
	plain := make([]byte, len(sealed))
	cipher.NewCFBDecrypter(block, make([]byte, 16)).XORKeyStream(plain, sealed) //nolint:staticcheck // what the specification asks for
	return plain[2:], nil
}

// A testCA issues EK certificates through an intermediate.
type testCA struct {
	roots *x509.CertPool
	chain [][]byte
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
}

// newTestCA makes a CA with the keys, of root and intermediate, or with new ones.
func newTestCA(t testing.TB, keys ...*ecdsa.PrivateKey) *testCA {
	t.Helper()
	if keys == nil {
		keys = []*ecdsa.PrivateKey{newKey(t), newKey(t)}
	}
	ca := &testCA{roots: x509.NewCertPool()}
	authority := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
			NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<37, 0), KeyUsage: x509.KeyUsageCertSign,
		}
	}
	rootKey := keys[0]
	root := ca.issue(t, authority("root"), authority("root"), rootKey, &rootKey.PublicKey)
	ca.key = keys[1]
	ca.cert = ca.issue(t, authority("host CA"), root, rootKey, &ca.key.PublicKey)
	ca.roots.AddCert(root)
	ca.chain = [][]byte{ca.cert.Raw}
	return ca
}

func (*testCA) issue(t testing.TB, cert, parent *x509.Certificate, by *ecdsa.PrivateKey, key *ecdsa.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, key, by)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// endorse certifies an EK: empty subject, the TPM's maker in a critical alternative name.
func (ca *testCA) endorse(t testing.TB, ek *ecdsa.PublicKey, usage ...asn1.ObjectIdentifier) []byte {
	t.Helper()
	maker, err := asn1.Marshal(pkix.Name{ExtraNames: []pkix.AttributeTypeAndValue{
		{Type: asn1.ObjectIdentifier{2, 23, 133, 2, 1}, Value: "id:00001014"},
	}}.ToRDNSequence())
	if err != nil {
		t.Fatal(err)
	}
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: maker}})
	if err != nil {
		t.Fatal(err)
	}
	return ca.issue(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<37, 0),
		KeyUsage: x509.KeyUsageKeyAgreement, UnknownExtKeyUsage: usage, BasicConstraintsValid: true,
		ExtraExtensions: []pkix.Extension{{Id: oidSubjectAltName, Critical: true, Value: san}},
	}, ca.cert, ca.key, ek).Raw
}

// A lab is a guest whose evidence is good, and what a verifier needs for it.
type lab struct {
	tpm   *softTPM
	ca    *testCA
	nonce []byte
}

func newLab(t testing.TB) *lab {
	t.Helper()
	return &lab{tpm: newSoftTPM(t), ca: newTestCA(t), nonce: []byte("sixteen byte non")}
}

func (l *lab) options() Options {
	return Options{Nonce: l.nonce, Roots: l.ca.roots, Activate: l.tpm.activate}
}

// boot measures a start and returns evidence of it.
func (l *lab) boot(t testing.TB, events []eventlog.Event) *Evidence {
	t.Helper()
	log, err := eventlog.Encode(events)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		l.tpm.extend(e.PCR, e.Digest(tpm2.TPMAlgSHA256))
	}
	ima := sha256.Sum256([]byte("boot_aggregate"))
	l.tpm.extend(eventlog.PCRIMA, ima[:])
	e := &Evidence{
		Guest: "web", EventLog: log, AK: tpm2.Marshal(l.tpm.akPub),
		EKCertificate: l.ca.endorse(t, &l.tpm.ek.PublicKey, oidEKCertificate), EKChain: l.ca.chain,
	}
	e.Quote, e.Signature, e.PCRs = l.tpm.quote(t, l.nonce)
	return e
}

func bootEvents(t testing.TB, kernel, cmdline string) []eventlog.Event {
	t.Helper()
	events, err := eventlog.Boot(eventlog.BootConfig{
		MonitorVersion: "Redoubt 0.1.0 native", MachineConfig: []byte(`{"cpus":2}`),
		Kernel: strings.NewReader(kernel), Initrd: strings.NewReader("070701"), Cmdline: cmdline,
	})
	if err != nil {
		t.Fatal(err)
	}
	return events
}
