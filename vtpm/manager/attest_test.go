package manager

import (
	"crypto/x509"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/attest"
)

// What a device says convinces a verifier who trusts the host's CA, credential activation
// included, and nobody who trusts another.
func TestEvidenceVerifies(t *testing.T) {
	m := newManager(t, stateDir(t))
	d := start(t, m, guestA, "quiet")
	defer stop(t, d)
	nonce := []byte("a verifier's nonce")
	q, err := d.Quote(t.Context(), nonce, Selection(tpm2.TPMAlgSHA256, allPCRs...))
	if err != nil {
		t.Fatal(err)
	}
	e := &attest.Evidence{
		Quote: q.Attest, Signature: q.Signature, EventLog: q.EventLog,
		AK: q.AK, EKCertificate: q.EKCertificate, EKChain: q.Chain,
	}
	for _, p := range q.PCRs {
		e.PCRs = append(e.PCRs, p.Value)
	}
	policy, err := attest.PolicyFrom(e)
	if err != nil {
		t.Fatal(err)
	}
	verify := func(m *Manager) *attest.Report {
		roots := x509.NewCertPool()
		ca, err := x509.ParseCertificate(m.CACertificate())
		if err != nil {
			t.Fatal(err)
		}
		roots.AddCert(ca)
		return attest.Verify(e, attest.Options{
			Nonce: nonce, Roots: roots, Policy: policy,
			Activate: func(blob, secret []byte) ([]byte, error) { return d.Activate(t.Context(), blob, secret) },
		})
	}
	for _, s := range verify(m).Steps {
		want := attest.Passed
		if s.Name == attest.StepIMA { // no kernel runs here that measures
			want = attest.Skipped
		}
		if s.Status != want {
			t.Errorf("%+v", s)
		}
	}
	other := newManager(t, stateDir(t))
	if r := verify(other); r.OK || r.Steps[0].Status != attest.Failed {
		t.Errorf("another host's CA: %+v", r)
	}
}
