package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/attest/ima"
)

// statuses is the report as one word a step.
func statuses(r *Report) string {
	var out []string
	for _, s := range r.Steps {
		out = append(out, string(s.Status))
	}
	return strings.Join(out, " ")
}

func TestVerifyPasses(t *testing.T) {
	l := newLab(t)
	e := l.boot(t, bootEvents(t, "kernel", "quiet ro"))
	o := l.options()
	if r := Verify(e, o); !r.OK || statuses(r) != strings.Repeat("passed ", 7)+"skipped skipped" {
		t.Errorf("without policy: %v: %+v", statuses(r), r.Failed())
	}
	var err error
	if o.Policy, err = PolicyFrom(e); err != nil {
		t.Fatal(err)
	}
	r := Verify(e, o)
	if !r.OK || statuses(r) != strings.Repeat("passed ", 7)+"skipped passed" || len(r.Differences) != 0 {
		t.Errorf("with its own policy: %v: %+v", statuses(r), r.Failed())
	}
	var text bytes.Buffer
	if err := r.WriteText(&text); err != nil || !strings.HasSuffix(text.String(), "trusted\n") {
		t.Errorf("report is %q, %v", text.String(), err)
	}
	o.Activate, o.WithoutActivation = nil, true
	if r := Verify(e, o); r.OK || r.Failed() != nil || r.Steps[1].Status != Skipped {
		t.Errorf("without activation: OK %v, %s", r.OK, statuses(r))
	}
}

// Each step fails on what it is there for, with its reason, and no later one is tried.
func TestVerifyFails(t *testing.T) {
	type bench struct {
		*lab
		e *Evidence
		o Options
	}
	resign := func(b *bench) { b.e.Signature = b.tpm.sign(t, b.e.Quote) }
	attributes := func(edit func(*tpm2.TPMAObject)) func(*bench) {
		return func(b *bench) {
			edit(&b.tpm.akPub.ObjectAttributes)
			b.e.AK = tpm2.Marshal(b.tpm.akPub)
		}
	}
	requote := func(edit func(*tpm2.TPMSAttest)) func(*bench) {
		return func(b *bench) {
			a, err := tpm2.Unmarshal[tpm2.TPMSAttest](b.e.Quote)
			if err != nil {
				t.Fatal(err)
			}
			edit(a)
			b.e.Quote = tpm2.Marshal(*a)
			resign(b)
		}
	}
	for _, c := range []struct {
		name string
		step int
		want string
		edit func(*bench)
	}{
		{"no roots", 0, "no root certificate", func(b *bench) { b.o.Roots = nil }},
		{"no certificate", 0, "EK certificate: missing", func(b *bench) { b.e.EKCertificate = nil }},
		{"another CA", 0, "unknown authority", func(b *bench) { b.o.Roots = newTestCA(t).roots }},
		{"chain withheld", 0, "unknown authority", func(b *bench) { b.e.EKChain = nil }},
		{"long chain", 0, "chain of 9", func(b *bench) { b.e.EKChain = make([][]byte, 9) }},
		{"large certificate", 0, "the most is", func(b *bench) { b.e.EKCertificate = make([]byte, 1<<20) }},
		{"expired", 0, "expired", func(b *bench) { b.o.Time = time.Unix(1<<38, 0) }},
		{"certificate of a server", 0, "not for an endorsement key", func(b *bench) { b.e.EKCertificate = b.ca.endorse(t, &b.tpm.ek.PublicKey) }},
		{"certificate of the CA", 0, "not for an endorsement key", func(b *bench) { b.e.EKCertificate = b.ca.chain[0] }},
		{"AK is garbage", 1, "AK: public area", func(b *bench) { b.e.AK = []byte("garbage") }},
		{"AK with more behind", 1, "where the structure takes", func(b *bench) { b.e.AK = append(b.e.AK, 0) }},
		{"no way to activate", 1, "no way to the guest's TPM", func(b *bench) { b.o.Activate = nil }},
		{"EK of another TPM", 1, "did not open", func(b *bench) { b.e.EKCertificate = b.ca.endorse(t, &newKey(t).PublicKey, oidEKCertificate) }},
		{"AK of another TPM", 1, "TPM_RC_INTEGRITY", func(b *bench) { b.e.AK = tpm2.Marshal(newSoftTPM(t).akPub) }},
		{"activation with lines of its own", 1, "no\ufffd\ufffd[2Jtpm", func(b *bench) {
			b.o.Activate = func(_, _ []byte) ([]byte, error) { return nil, errors.New("no\n\x1b[2Jtpm") }
		}},
		{"wrong answer", 1, "not the credential's secret", func(b *bench) {
			b.o.Activate = func(_, _ []byte) ([]byte, error) { return make([]byte, 32), nil }
		}},
		{"AK not restricted", 2, "not restricted", attributes(func(a *tpm2.TPMAObject) { a.Restricted = false })},
		{"AK decrypts", 2, "may decrypt", attributes(func(a *tpm2.TPMAObject) { a.Decrypt = true })},
		{"AK does not sign", 2, "not a signing key", attributes(func(a *tpm2.TPMAObject) { a.SignEncrypt = false })},
		{"AK may move", 2, "not fixedTPM", attributes(func(a *tpm2.TPMAObject) { a.FixedTPM = false })},
		{"AK's parent may move", 2, "not fixedParent", attributes(func(a *tpm2.TPMAObject) { a.FixedParent = false })},
		{"AK imported", 2, "not sensitiveDataOrigin", attributes(func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false })},
		{"signature is garbage", 3, "signature", func(b *bench) { b.e.Signature = []byte("garbage") }},
		{"signed by another key", 3, "did not sign", func(b *bench) { b.e.Signature = newSoftTPM(t).sign(t, b.e.Quote) }},
		{"quote changed", 3, "did not sign", func(b *bench) { b.e.Quote[len(b.e.Quote)-1] ^= 1 }},
		{"no quote of a TPM", 3, "is no quote: magic", requote(func(a *tpm2.TPMSAttest) { a.Magic = 0 })},
		{"quote is large", 3, "the most is", func(b *bench) { b.e.Quote = make([]byte, 1<<20) }},
		{"no nonce", 4, "no nonce", func(b *bench) { b.o.Nonce = nil }},
		{"old quote", 4, "another challenge", func(b *bench) { b.o.Nonce = []byte("another") }},
		{"few registers", 5, "23 registers", func(b *bench) { b.e.PCRs = b.e.PCRs[:23] }},
		{"long register", 5, "PCR 3: 33 bytes", func(b *bench) { b.e.PCRs[3] = make(Hex, 33) }},
		{"register changed", 5, "not the registers quoted", func(b *bench) { b.e.PCRs[8] = make(Hex, 32) }},
		{"fewer quoted", 5, "does not cover all", requote(func(a *tpm2.TPMSAttest) {
			q, err := a.Attested.Quote()
			if err != nil {
				t.Fatal(err)
			}
			q.PCRSelect.PCRSelections[0].PCRSelect = []byte{0xff, 0, 0}
			a.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, q)
		})},
		{"log cut", 6, "the host's log: event log: offset", func(b *bench) { b.e.EventLog = b.e.EventLog[:200] }},
		{"no log", 6, "no event before the end", func(b *bench) { b.e.EventLog = nil }},
		{"log is large", 6, "the most is", func(b *bench) { b.e.GuestLog = make([]byte, MaxLog+1) }},
		{"log lies of the command line", 6, "PCR 8 (kernel command line): log says ", func(b *bench) {
			log, err := eventlog.Encode(bootEvents(t, "kernel", "quiet"))
			if err != nil {
				t.Fatal(err)
			}
			b.e.EventLog = log
		}},
		{"IMA list changed", 7, `entry 2 ("/sbin/inix")`, func(b *bench) { b.e.IMA.List[len(b.e.IMA.List)-2] = 'x' }},
		{"IMA list cut", 7, "gives PCR 10 as quoted", func(b *bench) { b.e.IMA.List = listOf(b.measured(b.e)[:1]) }},
		{"IMA list damaged", 7, "is damaged: entry 2, at offset", func(b *bench) { b.e.IMA.List = b.e.IMA.List[:len(b.e.IMA.List)-1] }},
		{"IMA list empty", 7, "gives PCR 10 as quoted", func(b *bench) { b.e.IMA.List = nil }},
		{"IMA list damaged in the guest", 7, "could not be read: loop", func(b *bench) { b.e.IMA.Error = "loop" }},
		{"IMA list unknown to the policy", 7, "\"/sbin/init\", sha256:", func(b *bench) { b.o.Policy = &Policy{IMA: []string{strings.Repeat("00", 32)}} }},
		{"IMA list not allowed", 7, "is not in the allowlist", func(b *bench) { b.o.Allow = allowlist(t, strings.Repeat("00", 32)+" /sbin/init") }},
		{"IMA list missing, but judged", 7, "no kernel: nothing says", func(b *bench) {
			b.e.IMA = &ima.List{Missing: "no kernel"}
			b.o.Allow = allowlist(t, strings.Repeat("00", 32))
		}},
		{"IMA list not in the evidence, but judged", 7, "has none: nothing says", func(b *bench) {
			b.e.IMA = nil
			b.o.Policy = &Policy{IMA: []string{strings.Repeat("00", 32)}}
		}},
		{"IMA list from the middle", 7, "left out", func(b *bench) { b.e.IMA.After = 1; b.e.IMA.List = listOf(b.measured(b.e)[1:]) }},
		{"IMA list of another boot", 7, "entry 1: boot_aggregate is ", func(b *bench) {
			all := b.measured(b.e)
			b.remeasure(t, b.e, aggregateOf(make([]Hex, 10)), all[1])
		}},
		{"IMA list without boot_aggregate", 7, "entry 1: '/sbin/init' is not boot_aggregate", func(b *bench) {
			b.remeasure(t, b.e, b.measured(b.e)[1])
		}},
		{"IMA list by SHA-1", 7, "only that of SHA-256", func(b *bench) {
			b.remeasure(t, b.e, entryOf("sha1", make([]byte, 20), "boot_aggregate"))
		}},
		{"policy of another kernel", 8, "PCR 4 (kernel): event 3 ", func(b *bench) { b.o.Policy = &Policy{Kernel: []Hash{{1}, {2}, {3}, {4}, {5}}} }},
		{"policy of another command line", 8, "PCR 8 (kernel command line): event 4 'quiet ro' is not 'quiet' or 'debug'", func(b *bench) {
			b.o.Policy = &Policy{Cmdline: []string{"quiet", "debug"}}
		}},
		{"policy of another monitor", 8, "PCR 0 (monitor version): event 1 'Redoubt 0.1.0 native' is not 'Redoubt 9'", func(b *bench) {
			b.o.Policy = &Policy{Monitor: []string{"Redoubt 9"}}
		}},
		{"policy without initrd", 8, "PCR 9 (initrd): event 5 ", func(b *bench) { b.o.Policy = &Policy{NoInitrd: true} }},
		{"policy of firmware", 8, "PCR 13 (firmware guest): no firmware", func(b *bench) { b.o.Policy = &Policy{Firmware: []Hash{{1}}} }},
		{"policy of another TPM", 8, "another TPM than", func(b *bench) { b.o.Policy = &Policy{EK: []Hash{{1}}} }},
		{"policy of another register", 8, "PCR 1 (machine configuration): ", func(b *bench) {
			b.o.Policy = &Policy{PCRs: map[uint32][]Hash{1: {{1}, {2}}}}
		}},
		{"policy of IMA", 8, "PCR 10 (IMA): ", func(b *bench) { b.o.Policy = &Policy{PCRs: map[uint32][]Hash{10: {{1}}}} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			b := &bench{l, l.bootIMA(t, bootEvents(t, "kernel", "quiet ro")), l.options()}
			b.o.Policy = &Policy{Cmdline: []string{"quiet ro"}}
			c.edit(b)
			r := Verify(b.e, b.o)
			for i, s := range r.Steps {
				want := Passed
				if i == c.step {
					want = Failed
				} else if i > c.step {
					want = NotReached
				}
				if s.Status != want {
					t.Errorf("step %s %s, not %s: %s", s.Name, s.Status, want, s.Reason)
				}
			}
			if r.OK || len(r.Steps) != 9 {
				t.Fatalf("OK is %v, %d steps", r.OK, len(r.Steps))
			}
			if reason := r.Steps[c.step].Reason; !strings.Contains(reason, c.want) || strings.Contains(reason, "\n") {
				t.Errorf("reason is %q, want %q", reason, c.want)
			}
		})
	}
}

// A changed start names the register, under the policy of the good one.
func TestChangedStart(t *testing.T) {
	good := newLab(t)
	p, err := PolicyFrom(good.boot(t, bootEvents(t, "kernel", "quiet ro")))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		kernel, cmdline string
		pcr             uint32
		event           int
		want            string
	}{
		{"kernel", "quiet", 8, 4, "PCR 8 (kernel command line): event 4 'quiet' is not 'quiet ro'"},
		{"another", "quiet ro", 4, 3, "PCR 4 (kernel): event 3 "},
	} {
		l := newLab(t)
		o := l.options()
		o.Policy = p
		r := Verify(l.boot(t, bootEvents(t, c.kernel, c.cmdline)), o)
		f := r.Failed()
		if f == nil || f.Name != StepPolicy || !strings.HasPrefix(f.Reason, c.want) || strings.Contains(f.Reason, ";") {
			t.Errorf("failed step %+v, want %q", f, c.want)
		}
		if len(r.Differences) != 1 || r.Differences[0].PCR != c.pcr || r.Differences[0].Event != c.event ||
			c.pcr == 8 && (r.Differences[0].Got != "quiet" || r.Differences[0].Want != "quiet ro") ||
			c.pcr == 4 && len(r.Differences[0].Got)+len(r.Differences[0].Want) != 128 {
			t.Errorf("differences %+v", r.Differences)
		}
	}
}

// The text of an event proves nothing: a log whose text is what the policy wants, but whose
// digest is that of another command line, fails.
func TestTextIsNotTrusted(t *testing.T) {
	l := newLab(t)
	events := bootEvents(t, "kernel", "quiet init=/bin/sh")
	events[3].Data = []byte(eventlog.CmdlinePrefix + "quiet ro")
	o := l.options()
	o.Policy = &Policy{Cmdline: []string{"quiet ro"}}
	f := Verify(l.boot(t, events), o).Failed()
	if f == nil || f.Name != StepPolicy || strings.Contains(f.Reason, "event 4 'quiet ro'") {
		t.Errorf("failed step is %+v", f)
	}
}

// An extension hidden behind a good one is found, whatever the log calls it.
func TestSecondMeasurement(t *testing.T) {
	l := newLab(t)
	more, err := eventlog.Measure(nil, eventlog.PCRKernel, eventlog.TypeSeparator, []byte("more"), nil)
	if err != nil {
		t.Fatal(err)
	}
	kernel := Hash(sha256.Sum256([]byte("kernel")))
	o := l.options()
	o.Policy = &Policy{Kernel: []Hash{kernel}}
	f := Verify(l.boot(t, append(bootEvents(t, "kernel", "ro"), more)), o).Failed()
	if f == nil || f.Name != StepPolicy || !strings.Contains(f.Reason, "3 measurements, not 1") {
		t.Errorf("failed step is %+v", f)
	}
}

func TestFirmwareGuest(t *testing.T) {
	l := newLab(t)
	host, err := eventlog.BootFirmware(eventlog.FirmwareConfig{
		MonitorVersion: "Redoubt 0.1.0 qemu", MachineConfig: []byte("{}"), Firmware: strings.NewReader("bios"),
	})
	if err != nil {
		t.Fatal(err)
	}
	own := bootEvents(t, "grub", "linux") // what the firmware and boot loader measured
	e := l.boot(t, append(host, own...))
	encode := func(events []eventlog.Event) []byte {
		b, err := eventlog.Encode(events)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	e.EventLog = encode(host)
	o := l.options()
	if f := Verify(e, o).Failed(); f == nil || f.Name != StepLog || !strings.Contains(f.Reason, "firmware is missing") {
		t.Errorf("without the guest's log: %+v", f)
	}
	e.GuestLog = append(encode(own), make([]byte, 1000)...)
	if o.Policy, err = PolicyFrom(e); err != nil {
		t.Fatal(err)
	}
	if len(o.Policy.Firmware) != 1 || len(o.Policy.Monitor) != 1 || len(o.Policy.Kernel) != 0 || len(o.Policy.PCRs) != 10 {
		t.Errorf("policy is %+v", o.Policy)
	}
	if r := Verify(e, o); !r.OK {
		t.Errorf("%+v", r.Failed())
	}
	o.Policy.Firmware[0][0] ^= 1
	if f := Verify(e, o).Failed(); f == nil || !strings.HasPrefix(f.Reason, "PCR 13 (firmware guest): event 3 ") {
		t.Errorf("another firmware: %+v", f)
	}
}

func TestEvidenceJSON(t *testing.T) {
	l := newLab(t)
	e := l.boot(t, bootEvents(t, "kernel", "ro"))
	b, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b, fmt.Appendf(nil, `"%x"`, []byte(e.PCRs[8]))) {
		t.Error("registers are not in hexadecimal")
	}
	again, err := DecodeEvidence(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if r := Verify(again, l.options()); !r.OK {
		t.Errorf("after JSON: %+v", r.Failed())
	}
	for text, want := range map[string]string{
		"":                                 "offset 0",
		"{}{}":                             "more behind",
		`{"quote": 5}`:                     "quote",
		`{"pcrs": ["xy"]}`:                 "invalid byte",
		`{"unknown": 1}`:                   "unknown field",
		strings.Repeat(" ", MaxEvidence+1): "over",
	} {
		if _, err := DecodeEvidence(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v", text, err)
		}
	}
}

func TestReplayReport(t *testing.T) {
	log, err := eventlog.Encode(bootEvents(t, "kernel", "quiet ro"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := ReplayReport(log)
	if err != nil || r.Damage != "" || len(r.Events) != 13 || len(r.PCRs) != 4 {
		t.Fatalf("%d events, %d banks, %v", len(r.Events), len(r.PCRs), err)
	}
	cut, err := ReplayReport(log[:len(log)-1])
	if d := (*eventlog.DamageError)(nil); !errors.As(err, &d) || len(cut.Events) != 12 {
		t.Fatalf("cut log: %d events, %v", len(cut.Events), err)
	}
	var text, js bytes.Buffer
	if err := cut.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"PCR  8  EV_IPL ", "kernel_cmdline: quiet ro\n", "sha512:\n", "damaged: event log: offset 0x"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the text lacks %q:\n%s", want, text.String())
		}
	}
	if err := cut.WriteJSON(&js); err != nil || !json.Valid(js.Bytes()) {
		t.Errorf("JSON: %v", err)
	}
	if r, err := ReplayReport(nil); err == nil || r == nil {
		t.Error("no log was read")
	}
	late, err := eventlog.Encode(append(bootEvents(t, "k", ""), eventlog.Event{
		Type: eventlog.TypeNoAction, Data: []byte("StartupLocality\x00\x03"),
	}))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := ReplayReport(late); err == nil || len(r.Events) != 14 || !strings.Contains(r.Damage, "event 14: StartupLocality") || !strings.Contains(r.Damage, "offset 0x") {
		t.Errorf("late locality: %v", err)
	}
}
