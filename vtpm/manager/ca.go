package manager

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"time"

	"redoubt.dev/redoubt/vtpm/keys"
)

// An authority is the host's CA: it says that an EK is of a vTPM of this host.
type authority struct {
	host string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	der  []byte
}

// noExpiry is RFC 5280 §4.1.2.5's date for a certificate that does not expire, which the EK
// Credential Profile §3.2.4 recommends: the TPM does not expire either.
var noExpiry = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

func newAuthority(host string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "Redoubt vTPM CA " + host},
		// An hour's grace for a verifier whose clock is behind.
		NotBefore: time.Now().Add(-time.Hour), NotAfter: noExpiry,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:     true, BasicConstraintsValid: true, MaxPathLenZero: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("CA certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("CA certificate: %w", err)
	}
	return &authority{host, key, cert, der}, nil
}

// newSerial is a positive number of 127 random bits.
func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

// savedManager is manager.json.
type savedManager struct {
	Version     int    `json:"version"`
	Host        string `json:"host"`
	Certificate []byte `json:"ca_certificate"` // DER
	WrappedKey  []byte `json:"wrapped_ca_key"` // PKCS #8, bound to the other fields
}

func (s *savedManager) context() []byte {
	sum := sha256.Sum256(s.Certificate)
	return fmt.Appendf(nil, "manager %d %q %x", s.Version, s.Host, sum)
}

func (a *authority) encode(root *keys.Root) ([]byte, error) {
	k, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		return nil, err
	}
	s := savedManager{Version: managerVersion, Host: a.host, Certificate: a.der}
	s.WrappedKey = root.Wrap(k, s.context())
	return encodeJSON(&s)
}

func parseAuthority(b []byte, root *keys.Root) (*authority, error) {
	var s savedManager
	if err := decodeJSON(b, &s); err != nil {
		return nil, err
	}
	if s.Version != managerVersion {
		return nil, fmt.Errorf("version %d, this program reads %d", s.Version, managerVersion)
	}
	k, err := root.Unwrap(s.WrappedKey, s.context())
	if err != nil {
		return nil, fmt.Errorf("CA key: %w", err)
	}
	any, err := x509.ParsePKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("CA key: %w", err)
	}
	key, ok := any.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("CA key: not an ECDSA key")
	}
	cert, err := x509.ParseCertificate(s.Certificate)
	if err != nil {
		return nil, fmt.Errorf("CA certificate: %w", err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("CA certificate is not the CA key's")
	}
	return &authority{s.Host, key, cert, s.Certificate}, nil
}

// Object identifiers of the TCG EK Credential Profile 2.5 (§3.1.1, §3.2).
var (
	oidEKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidManufacturer  = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidModel         = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidVersion       = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
	oidSpecification = asn1.ObjectIdentifier{2, 23, 133, 2, 16}
	oidSubjectAlt    = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidDirectoryAttr = asn1.ObjectIdentifier{2, 5, 29, 9}
)

// tpmFacts are what a TPM says about itself (TPM2_GetCapability, Part 2 §6.13).
type tpmFacts struct {
	manufacturer uint32 // four characters
	firmware     uint32
	revision     int // of the specification, times 100
}

// issueEK certifies the EK of a guest's vTPM.
func (a *authority) issueEK(guest string, ek *ecdsa.PublicKey, f tpmFacts) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	san, err := ekSubjectAlt(f)
	if err != nil {
		return nil, err
	}
	attrs, err := ekDirectoryAttributes(f)
	if err != nil {
		return nil, err
	}
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "Redoubt vTPM " + guest},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: noExpiry,
		KeyUsage:              x509.KeyUsageKeyAgreement, // an EK of ECC: profile §3.5.3
		UnknownExtKeyUsage:    []asn1.ObjectIdentifier{oidEKCertificate},
		BasicConstraintsValid: true,
		ExtraExtensions: []pkix.Extension{
			{Id: oidSubjectAlt, Value: san}, // not critical, because the subject is not empty
			{Id: oidDirectoryAttr, Value: attrs},
		},
	}, a.cert, ek, a.key)
}

// ekSubjectAlt is the alternative name with manufacturer, model and version (profile §3.2.9).
func ekSubjectAlt(f tpmFacts) ([]byte, error) {
	var name pkix.RDNSequence
	for _, v := range []struct {
		oid asn1.ObjectIdentifier
		s   string
	}{
		{oidManufacturer, fmt.Sprintf("id:%08X", f.manufacturer)},
		{oidModel, "swtpm"},
		{oidVersion, fmt.Sprintf("id:%08X", f.firmware)},
	} {
		name = append(name, pkix.RelativeDistinguishedNameSET{{Type: v.oid, Value: v.s}})
	}
	der, err := asn1.Marshal(name)
	if err != nil {
		return nil, err
	}
	// GeneralNames with one directoryName [4], which is tagged explicitly (RFC 5280 §4.2.1.6).
	return asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: der}})
}

// ekDirectoryAttributes names the TPM specification (profile §3.2.10).
func ekDirectoryAttributes(f tpmFacts) ([]byte, error) {
	type specification struct {
		Family   string `asn1:"utf8"`
		Level    int
		Revision int
	}
	type attribute struct {
		Type   asn1.ObjectIdentifier
		Values []specification `asn1:"set"`
	}
	return asn1.Marshal([]attribute{{oidSpecification, []specification{{"2.0", 0, f.revision}}}})
}

// issued says whether a certificate is this authority's.
func (a *authority) issued(der []byte) error {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	if !bytes.Equal(c.RawIssuer, a.cert.RawSubject) {
		return errors.New("issued by another CA")
	}
	return c.CheckSignatureFrom(a.cert)
}
