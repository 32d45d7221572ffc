package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/attest/ima"
)

// Options are what a verifier brings.
type Options struct {
	// Nonce is what the quote was asked for with: fresh, 1 to 64 bytes.
	Nonce []byte
	// Roots are the certificates of the hosts' CAs that are trusted.
	Roots *x509.CertPool
	// Activate has the guest's TPM open a credential made by [MakeCredential] and returns its
	// answer: it is what ties the AK to the EK.
	Activate func(blob, secret []byte) ([]byte, error)
	// WithoutActivation skips that step where Activate is nil, for evidence from a file. The
	// report then says so and is never OK.
	WithoutActivation bool
	// Policy is what is good; without one the step is skipped.
	Policy *Policy
	// Allow are the files that the guest may have measured, beside those of the policy; nil: any.
	Allow *ima.Allowlist
	// Known is what an earlier report of this guest vouched for of its IMA list; nil: nothing.
	Known *KnownIMA
	// Time is when the certificates must be valid; zero is now.
	Time time.Time
}

// errSkipped ends a step that was not asked for.
type errSkipped struct{ reason string }

func (e *errSkipped) Error() string { return e.reason }

// A verifier carries what the steps hand on.
type verifier struct {
	e      *Evidence
	o      Options
	report *Report

	cert   *x509.Certificate // of the EK
	ak     *attestationKey
	key    *ecdsa.PublicKey // the AK, once it is trusted
	quote  *tpm2.TPMSAttest // once its signature holds
	events []eventlog.Event // once they explain the registers
	host   int              // how many of them are the host's
}

// Verify takes evidence through its steps: EK chain, credential activation, AK, signature,
// nonce, PCR digest, log replay, IMA list, policy. After the first that fails no other is tried.
// Every part of the evidence may be hostile. It is safe for concurrent use.
//
// The log must explain PCRs 0 to 9 and 13 exactly, and the IMA list, where there is one, PCR 10. The others are
// extended while the guest runs: a policy may ask for their values, but no log of the boot can.
func Verify(e *Evidence, o Options) *Report {
	v := &verifier{e: e, o: o, report: &Report{OK: true, Guest: e.Guest}}
	if o.Time.IsZero() {
		v.o.Time = time.Now()
	}
	stopped := false
	for _, s := range []struct {
		name string
		run  func() (string, error)
	}{
		{StepEK, v.stepEK},
		{StepActivation, v.stepActivation},
		{StepAK, v.stepAK},
		{StepSignature, v.stepSignature},
		{StepNonce, v.stepNonce},
		{StepPCRs, v.stepPCRs},
		{StepLog, v.stepLog},
		{StepIMA, v.stepIMA},
		{StepPolicy, v.stepPolicy},
	} {
		step := Step{Name: s.name, Status: NotReached}
		if !stopped {
			reason, err := s.run()
			var skipped *errSkipped
			switch {
			case err == nil:
				step.Status, step.Reason = Passed, reason
			case errors.As(err, &skipped):
				step.Status, step.Reason = Skipped, skipped.reason
				v.report.OK = v.report.OK && (s.name == StepPolicy || s.name == StepIMA)
			default:
				step.Status, step.Reason = Failed, err.Error()
				v.report.OK, stopped = false, true
			}
		}
		step.Reason = oneLine(step.Reason)
		v.report.Steps = append(v.report.Steps, step)
	}
	return v.report
}

func (v *verifier) stepEK() (string, error) {
	cert, err := checkEK(v.e, v.o.Roots, v.o.Time)
	if err != nil {
		return "", err
	}
	v.cert = cert
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	v.report.EK = sum[:]
	return fmt.Sprintf("key %s, issued by %q", short(sum[:]), cert.Issuer.String()), nil
}

func (v *verifier) stepActivation() (string, error) {
	ak, err := parseAK(v.e.AK)
	if err != nil {
		return "", fmt.Errorf("AK: %w", err)
	}
	v.ak = ak
	if v.o.Activate == nil {
		if v.o.WithoutActivation {
			return "", &errSkipped{"without the guest's TPM: nothing says that the AK is in the EK's TPM"}
		}
		return "", errors.New("no way to the guest's TPM: nothing says that the AK is in the EK's TPM")
	}
	blob, secret, want, err := MakeCredential(v.cert.PublicKey, ak.name)
	if err != nil {
		return "", err
	}
	got, err := v.o.Activate(blob, secret)
	if err != nil {
		return "", fmt.Errorf("the TPM did not open a credential for this EK and AK: %w", err)
	}
	if subtle.ConstantTimeCompare(got, want) != 1 {
		return "", errors.New("the answer is not the credential's secret: the AK is not in the EK's TPM")
	}
	return "the AK is in the EK's TPM", nil
}

func (v *verifier) stepAK() (string, error) {
	key, err := v.ak.check()
	if err != nil {
		return "", err
	}
	v.key = key
	return fmt.Sprintf("name %s, ECC P-256, restricted, never outside its TPM", short(v.ak.name[2:])), nil
}

func (v *verifier) stepSignature() (string, error) {
	quote, err := checkSignature(v.key, v.e.Quote, v.e.Signature)
	if err != nil {
		return "", err
	}
	v.quote = quote
	return "the AK signed this quote", nil
}

func (v *verifier) stepNonce() (string, error) {
	got := v.quote.ExtraData.Buffer
	switch {
	case len(v.o.Nonce) == 0:
		return "", errors.New("no nonce was asked for: the quote may be old")
	case len(v.o.Nonce) > maxNonce:
		return "", fmt.Errorf("nonce of %d bytes: the most is %d", len(v.o.Nonce), maxNonce)
	case !bytes.Equal(got, v.o.Nonce):
		return "", fmt.Errorf("the quote answers %s, not %s: it was made for another challenge", short(got), short(v.o.Nonce))
	}
	return short(got), nil
}

func (v *verifier) stepPCRs() (string, error) {
	if len(v.e.PCRs) != PCRCount {
		return "", fmt.Errorf("%d registers: a quote covers %d", len(v.e.PCRs), PCRCount)
	}
	info, err := v.quote.Attested.Quote()
	if err != nil {
		return "", fmt.Errorf("quote: %w", err)
	}
	if s := info.PCRSelect.PCRSelections; len(s) != 1 || s[0].Hash != tpm2.TPMAlgSHA256 || !bytes.Equal(s[0].PCRSelect, []byte{0xff, 0xff, 0xff}) {
		return "", errors.New("the quote does not cover all registers of the SHA-256 bank and nothing else")
	}
	all := sha256.New() // the hash of the signature, which checkSignature has fixed (Part 3 §18.4)
	for i, value := range v.e.PCRs {
		if len(value) != sha256.Size {
			return "", fmt.Errorf("PCR %d: %d bytes, not %d", i, len(value), sha256.Size)
		}
		all.Write(value)
	}
	if got := all.Sum(nil); !bytes.Equal(got, info.PCRDigest.Buffer) {
		return "", fmt.Errorf("the registers' digest is %s, the quote's %s: these are not the registers quoted", short(got), short(info.PCRDigest.Buffer))
	}
	return fmt.Sprintf("%d registers of the SHA-256 bank are those quoted", PCRCount), nil
}

// explained reports whether the log must give the register's value exactly.
func explained(pcr uint32) bool { return pcr <= eventlog.PCRInitrd || pcr == eventlog.PCRFirmware }

func (v *verifier) stepLog() (string, error) {
	events, host, err := v.e.events()
	if err != nil {
		return "", err
	}
	replayed, err := eventlog.Replay(events)
	if err != nil {
		return "", err
	}
	v.events, v.host = events, host
	var findings []string
	for pcr, quoted := range v.e.PCRs {
		pcr := uint32(pcr)
		if !explained(pcr) {
			continue
		}
		if said := replayed.Value(tpm2.TPMAlgSHA256, pcr); !bytes.Equal(said, quoted) {
			findings = append(findings, fmt.Sprintf("%s: log says %s, quote says %s", registerName(pcr, v.firmware()), short(said), short(quoted)))
			v.report.Differences = append(v.report.Differences, Difference{PCR: pcr, Got: fmt.Sprintf("%x", quoted), Want: fmt.Sprintf("%x", said)})
		}
	}
	if len(findings) == 0 && v.firmware() && len(bytes.Trim(v.e.PCRs[0], "\x00")) == 0 {
		return "", errors.New("the guest's firmware has measured nothing: PCR 0 is as at power-on")
	}
	if len(findings) > 0 {
		if v.firmware() && len(v.e.GuestLog) == 0 {
			findings = append([]string{"the log of the guest's firmware is missing"}, findings...)
		}
		return "", brief(findings)
	}
	return fmt.Sprintf("%d events give PCRs 0 to 9 and 13", len(events)), nil
}

// firmware reports whether the host booted firmware, which it measures elsewhere.
func (v *verifier) firmware() bool {
	for _, e := range v.events[:v.host] {
		if e.PCR == eventlog.PCRFirmware && e.Type != eventlog.TypeNoAction {
			return true
		}
	}
	return false
}

func (v *verifier) stepPolicy() (string, error) {
	if v.o.Policy == nil {
		return "", &errSkipped{"none was given: the evidence is sound, but nothing says what is good"}
	}
	return v.checkPolicy(v.o.Policy)
}
