package attest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"

	"redoubt.dev/redoubt/attest/ima"
)

// KnownIMA is how much of a guest's IMA list a report has vouched for. A later one goes on behind it, if the guest has not
// been booted anew and the same is allowed.
type KnownIMA struct {
	ima.Prefix
	EK       Hex    `json:"ek"`              // whose list it is
	Resets   uint32 `json:"resets"`          // of its TPM: TPMS_CLOCK_INFO's resetCount
	Restarts uint32 `json:"restarts"`        // and restartCount
	Allow    Hex    `json:"allow,omitempty"` // the allowlist it was held against
}

// Known is where a request for evidence may begin: the entries that are known, 0 without any.
func (k *KnownIMA) Known() int {
	if k == nil {
		return 0
	}
	return k.Count
}

// allowlist is what the caller and the policy allow together, nil for anything.
func (v *verifier) allowlist() (*ima.Allowlist, error) {
	if v.o.Policy == nil || len(v.o.Policy.IMA) == 0 {
		return v.o.Allow, nil
	}
	all := &ima.Allowlist{}
	for _, line := range v.o.Policy.IMA {
		if err := all.Add(line); err != nil {
			return nil, fmt.Errorf("policy: ima: %w", err)
		}
	}
	if v.o.Allow != nil {
		all.Merge(v.o.Allow)
	}
	return all, nil
}

// stepIMA holds the list of what the guest's kernel measured against PCR 10 as quoted. The list was read after that:
// the part of it counts that the register vouches for.
func (v *verifier) stepIMA() (string, error) {
	allow, err := v.allowlist()
	if err != nil {
		return "", err
	}
	none := func(why string) (string, error) {
		if allow != nil {
			return "", fmt.Errorf("%s: nothing says what the guest has measured", why)
		}
		return "", &errSkipped{why}
	}
	l := v.e.IMA
	quoted := v.e.PCRs[ima.PCR]
	booted, only := onlyBooted(v.e)
	switch {
	case l == nil && only:
		v.vouch(booted, allow)
		return "1 entry gives PCR 10: that of the boot, and nothing was measured since", nil
	case l == nil:
		return none("the evidence has none")
	case l.After == 0 && len(l.List) == 0 && bytes.Equal(quoted, make([]byte, len(quoted))):
		return none("the guest's kernel has measured nothing")
	case l.Error != "":
		return "", fmt.Errorf("it could not be read: %s", l.Error)
	case l.Missing != "":
		return none(l.Missing)
	}
	entries, err := ima.Parse(l.List)
	if err != nil {
		return "", err
	}
	var from ima.Prefix
	if l.After > 0 {
		if from, err = v.known(l.After, allow); err != nil {
			return "", err
		}
	}
	prefix, err := ima.Match(entries, from, quoted)
	if err != nil {
		return "", err
	}
	// What is behind was measured after the quote: the next one vouches for it.
	vouched := entries[:prefix.Count-from.Count]
	if l.After == 0 {
		if err := v.checkAggregate(vouched); err != nil {
			return "", err
		}
	}
	text := fmt.Sprintf("%d entries give PCR 10", prefix.Count)
	if l.After > 0 {
		text += fmt.Sprintf(", %d of them new", len(vouched))
	}
	if later := len(entries) - len(vouched); later > 0 {
		text += fmt.Sprintf("; %d were measured after the quote", later)
	}
	if others := otherRegisters(vouched); others > 0 {
		text += fmt.Sprintf("; %d are of other registers and not looked at", others)
	}
	if allow != nil {
		if err := allow.Check(vouched, from.Count+1); err != nil {
			return "", err
		}
		text += "; all are allowed"
	}
	v.vouch(prefix, allow)
	return text, nil
}

// vouch has the report say what is vouched for.
func (v *verifier) vouch(p ima.Prefix, allow *ima.Allowlist) {
	v.report.IMA = &KnownIMA{
		Prefix: p, EK: v.report.EK, Allow: allow.ID(),
		Resets: v.quote.ClockInfo.ResetCount, Restarts: v.quote.ClockInfo.RestartCount,
	}
}

// NeedsIMA reports whether the IMA list must be read to know what the guest has measured: not where PCR 10 is as it must be of a
// kernel that has measured nothing, or nothing but its boot.
func NeedsIMA(e *Evidence) bool {
	if len(e.PCRs) != PCRCount {
		return false // which fails before the list counts
	}
	_, booted := onlyBooted(e)
	return !booted && !bytes.Equal(e.PCRs[ima.PCR], make([]byte, sha256.Size))
}

// onlyBooted is the list of a guest that has measured nothing but its boot.
func onlyBooted(e *Evidence) (ima.Prefix, bool) {
	h := sha256.New()
	for _, p := range e.PCRs[:ima.PCR] {
		h.Write(p)
	}
	for _, entry := range ima.Booted(h.Sum(nil)) {
		if p, err := ima.Match([]ima.Entry{entry}, ima.Prefix{}, e.PCRs[ima.PCR]); err == nil && p.Count == 1 {
			return p, true
		}
	}
	return ima.Prefix{}, false
}

// ErrUnknown says that evidence leaves out entries of the IMA list that are not known: it is to be asked for whole.
var ErrUnknown = errors.New("entries are left out that were not vouched for")

// known is what is known of the first entries, for evidence that leaves them out.
func (v *verifier) known(after int, allow *ima.Allowlist) (ima.Prefix, error) {
	k := v.o.Known
	clock := v.quote.ClockInfo
	switch {
	case k == nil || k.Count != after:
		return ima.Prefix{}, fmt.Errorf("%w: %d of them", ErrUnknown, after)
	case !bytes.Equal(k.EK, v.report.EK):
		return ima.Prefix{}, fmt.Errorf("%w: those that are known are another guest's", ErrUnknown)
	case k.Resets != clock.ResetCount || k.Restarts != clock.RestartCount:
		return ima.Prefix{}, fmt.Errorf("%w: the guest was booted anew", ErrUnknown)
	case !bytes.Equal(k.Allow, allow.ID()):
		return ima.Prefix{}, fmt.Errorf("%w: they were held against another allowlist", ErrUnknown)
	case k.Bank != ima.SHA256 && k.Bank != ima.SHA256Padded || len(k.Value) != sha256.Size:
		return ima.Prefix{}, fmt.Errorf("%w: what is known of them is damaged", ErrUnknown)
	}
	return k.Prefix, nil
}

func otherRegisters(entries []ima.Entry) (n int) {
	for i := range entries {
		if entries[i].PCR != ima.PCR {
			n++
		}
	}
	return n
}

// checkAggregate holds the list's first entry against the registers it stands for: PCRs 0 to 9, or 0 to 7 where it is a SHA-1
// (ima_calc_boot_aggregate_tfm), which the evidence does not have.
func (v *verifier) checkAggregate(entries []ima.Entry) error {
	if len(entries) == 0 {
		return errors.New("the list is empty, PCR 10 is not")
	}
	f, err := entries[0].File()
	if err != nil {
		return fmt.Errorf("entry 1: %w", err)
	}
	if !f.Aggregate() {
		return fmt.Errorf("entry 1: %s is not boot_aggregate", quote(f.Path))
	}
	if f.Algorithm != "sha256" {
		return fmt.Errorf("entry 1: %s by %s: only that of SHA-256 can be held against the quote (ima_hash=sha256)", f.Path, quote(f.Algorithm))
	}
	h := sha256.New()
	for _, p := range v.e.PCRs[:ima.PCR] {
		h.Write(p)
	}
	if want := h.Sum(nil); !bytes.Equal(f.Digest, want) {
		return fmt.Errorf("entry 1: %s is %s, PCRs 0 to 9 give %s", f.Path, short(f.Digest), short(want))
	}
	return nil
}

// VouchedIMA are the entries of evidence that a report vouched for, where the evidence has them all.
func VouchedIMA(e *Evidence, r *Report) ([]ima.Entry, error) {
	if r.IMA == nil || e.IMA == nil || e.IMA.After > 0 {
		return nil, errors.New("the report vouches for no whole IMA list")
	}
	all, err := ima.Parse(e.IMA.List)
	if err != nil || len(all) < r.IMA.Count {
		return nil, errors.Join(err, errors.New("the evidence is not the report's"))
	}
	return all[:r.IMA.Count], nil
}
