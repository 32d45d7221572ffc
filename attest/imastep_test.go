package attest

import (
	"bytes"
	"crypto/sha1" //nolint:gosec // the list's own
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"strings"
	"testing"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/attest/ima"
)

// entryOf is an entry of template ima-ng.
func entryOf(algorithm string, digest []byte, path string) ima.Entry {
	e := ima.Entry{PCR: ima.PCR, Template: "ima-ng"}
	for _, f := range []string{algorithm + ":\x00" + string(digest), path + "\x00"} {
		e.Data = binary.LittleEndian.AppendUint32(e.Data, uint32(len(f)))
		e.Data = append(e.Data, f...)
	}
	e.SHA1 = sha1.Sum(e.Data) //nolint:gosec // the format's
	return e
}

// aggregateOf is the list's first entry for registers.
func aggregateOf(pcrs []Hex) ima.Entry {
	h := sha256.New()
	for _, p := range pcrs[:10] {
		h.Write(p)
	}
	return entryOf("sha256", h.Sum(nil), "boot_aggregate")
}

func fileOf(path, content string) ima.Entry {
	sum := sha256.Sum256([]byte(content))
	return entryOf("sha256", sum[:], path)
}

func listOf(entries []ima.Entry) (b []byte) {
	for i := range entries {
		b = entries[i].Append(b)
	}
	return b
}

func allowlist(t testing.TB, lines string) *ima.Allowlist {
	t.Helper()
	l, err := ima.ParseAllowlist([]byte(lines))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// bootIMA is boot of a guest whose kernel has measured one program.
func (l *lab) bootIMA(t testing.TB, events []eventlog.Event) *Evidence {
	t.Helper()
	e := l.boot(t, events)
	l.remeasure(t, e, aggregateOf(e.PCRs), fileOf("/sbin/init", "init"))
	return e
}

// remeasure makes the evidence that of a kernel that has measured these entries.
func (l *lab) remeasure(t testing.TB, e *Evidence, entries ...ima.Entry) {
	t.Helper()
	l.tpm.pcrs[ima.PCR] = Hash{}
	for i := range entries {
		sum := sha256.Sum256(entries[i].Data)
		l.tpm.extend(ima.PCR, sum[:])
	}
	e.IMA = &ima.List{List: listOf(entries)}
	e.Quote, e.Signature, e.PCRs = l.tpm.quote(t, l.nonce)
}

// measured are the evidence's entries.
func (l *lab) measured(e *Evidence) []ima.Entry {
	all, _ := ima.Parse(e.IMA.List)
	return all
}

func imaStep(r *Report) Step {
	for _, s := range r.Steps {
		if s.Name == StepIMA {
			return s
		}
	}
	return Step{}
}

// TestIMAGrows: a list that grows is vouched for up to the quote; what is behind is not judged; the next report needs only
// what is new, and takes nothing for known that is another's.
func TestIMAGrows(t *testing.T) {
	l := newLab(t)
	e := l.bootIMA(t, bootEvents(t, "kernel", "ro"))
	quoted := l.measured(e)
	e.IMA.List = listOf(append(quoted[:2:2], fileOf("/tmp/later", "x")))
	o := l.options()
	o.Allow = allowlist(t, string(ima.Allow(quoted)))
	r := Verify(e, o)
	if s := imaStep(r); !r.OK || s.Status != Passed || r.IMA == nil || r.IMA.Count != 2 || !strings.Contains(s.Reason, "1 were measured after the quote") {
		t.Fatalf("%+v, %+v", s, r.IMA)
	}
	if all, err := VouchedIMA(e, r); err != nil || len(all) != 2 {
		t.Errorf("%d entries, %v", len(all), err)
	}
	// As it is kept from report to report.
	kept, err := json.Marshal(r.IMA)
	if err != nil {
		t.Fatal(err)
	}
	known := func() *KnownIMA {
		var k KnownIMA
		if err := json.Unmarshal(kept, &k); err != nil {
			t.Fatal(err)
		}
		return &k
	}
	if n := known().Known(); n != 2 || (*KnownIMA)(nil).Known() != 0 {
		t.Errorf("%d known", n)
	}
	grown := append(quoted[:2:2], fileOf("/bin/sh", "shell"))
	l.remeasure(t, e, grown...)
	part := *e
	part.IMA = &ima.List{After: 2, List: listOf(grown[2:])}
	o.Known = known()
	r = Verify(&part, o)
	if f := r.Failed(); f == nil || f.Name != StepIMA || !strings.HasPrefix(f.Reason, `entry 3: "/bin/sh"`) {
		t.Errorf("a new file that is not allowed: %+v", f)
	}
	// Another allowlist: what was held against the last one is to be held against it, too.
	o.Allow = allowlist(t, string(ima.Allow(grown)))
	if f := Verify(&part, o).Failed(); f == nil || !strings.Contains(f.Reason, "another allowlist") {
		t.Errorf("another allowlist: %+v", f)
	}
	if r := Verify(e, o); !r.OK || r.IMA.Count != 3 {
		t.Errorf("the whole list: %+v", r.Failed())
	}
	o.Allow = allowlist(t, string(ima.Allow(quoted)))
	for name, c := range map[string]struct {
		change func(*KnownIMA)
		want   string
	}{
		"another guest's":  {func(k *KnownIMA) { k.EK = Hex{1} }, "another guest's"},
		"another boot":     {func(k *KnownIMA) { k.Resets++ }, "booted anew"},
		"another resume":   {func(k *KnownIMA) { k.Restarts++ }, "booted anew"},
		"another number":   {func(k *KnownIMA) { k.Count = 1 }, "left out"},
		"another register": {func(k *KnownIMA) { k.Value = make([]byte, 32) }, "gives PCR 10"},
		"cut":              {func(k *KnownIMA) { k.Value = nil }, "damaged"},
		"another bank":     {func(k *KnownIMA) { k.Bank = ima.SHA1 }, "damaged"},
	} {
		o.Known = known()
		c.change(o.Known)
		if f := Verify(&part, o).Failed(); f == nil || f.Name != StepIMA || !strings.Contains(f.Reason, c.want) {
			t.Errorf("%s: %+v", name, f)
		}
	}
	o.Known = known()
	o.Allow, o.Known.Allow = nil, nil
	if r := Verify(&part, o); !r.OK || r.IMA.Count != 3 || !strings.Contains(imaStep(r).Reason, "1 of them new") {
		t.Errorf("only what is new: %+v", r.Failed())
	}
	if _, err := VouchedIMA(&part, Verify(&part, o)); err == nil {
		t.Error("a part is taken for the whole list")
	}
}

// TestIMANotThere: where nothing is measured, or nothing can be had, the report says so, and is not less sound.
func TestIMANotThere(t *testing.T) {
	l := newLab(t)
	e := l.boot(t, bootEvents(t, "kernel", "ro"))
	e.IMA = &ima.List{Missing: "the guest boots firmware"}
	if r := Verify(e, l.options()); !r.OK || imaStep(r).Status != Skipped || imaStep(r).Reason != e.IMA.Missing {
		t.Errorf("%+v", imaStep(r))
	}
	l.remeasure(t, e)
	if r := Verify(e, l.options()); !r.OK || imaStep(r).Status != Skipped {
		t.Errorf("%+v", imaStep(r))
	}
	// By kernels before 5.8, which extend with the SHA-1.
	all := []ima.Entry{aggregateOf(e.PCRs), fileOf("/sbin/init", "init")}
	l.tpm.pcrs[ima.PCR] = Hash{}
	for i := range all {
		l.tpm.extend(ima.PCR, append(bytes.Clone(all[i].SHA1[:]), make([]byte, 12)...))
	}
	e.IMA = &ima.List{List: listOf(all)}
	e.Quote, e.Signature, e.PCRs = l.tpm.quote(t, l.nonce)
	if r := Verify(e, l.options()); !r.OK || r.IMA == nil || r.IMA.Bank != ima.SHA256Padded {
		t.Errorf("%+v", imaStep(r))
	}
	late := all
	late[0] = entryOf("sha256", late[0].Data[12:44], "boot_aggregate_late")
	l.remeasure(t, e, late...)
	if r := Verify(e, l.options()); !r.OK {
		t.Errorf("%+v", imaStep(r))
	}
}

// TestOnlyBooted: a guest that has measured nothing but its boot needs no list; one that has measured more does.
func TestOnlyBooted(t *testing.T) {
	l := newLab(t)
	e := l.boot(t, bootEvents(t, "kernel", "ro"))
	o := l.options()
	o.Allow = allowlist(t, strings.Repeat("00", 32))
	sum := sha256.New()
	for _, p := range e.PCRs[:10] {
		sum.Write(p)
	}
	all := ima.Booted(sum.Sum(nil))
	if len(all) != 8 || !bytes.Equal(all[1].Data, aggregateOf(e.PCRs).Data) {
		t.Fatalf("%+v", all)
	}
	for _, entry := range all {
		if f, err := entry.File(); err != nil || !f.Aggregate() || f.Algorithm != "sha256" || !entry.Sound() {
			t.Errorf("%+v, %v", f, err)
		}
		l.remeasure(t, e, entry)
		e.IMA = nil
		if r := Verify(e, o); !r.OK || imaStep(r).Status != Passed || r.IMA.Count != 1 || NeedsIMA(e) {
			t.Errorf("%s: %+v", entry.Template, imaStep(r))
		}
	}
	l.remeasure(t, e, all[0], fileOf("/bin/sh", "shell"))
	e.IMA = nil
	if r := Verify(e, o); r.OK || imaStep(r).Status != Failed || !NeedsIMA(e) {
		t.Errorf("with one file more: %+v", imaStep(r))
	}
	l.remeasure(t, e)
	if NeedsIMA(e) {
		t.Error("a guest that has measured nothing needs its list to be read")
	}
	e.PCRs = e.PCRs[:9]
	if NeedsIMA(e) {
		t.Error("nonsense needs a list")
	}
}

// TestPolicyIMA: lines of an allowlist in a policy are read, written and refused.
func TestPolicyIMA(t *testing.T) {
	line := "sha256:" + strings.Repeat("ab", 32) + "  /bin/sh"
	p, err := ParsePolicy([]byte("ima: [\"" + line + "\"]\n"))
	if err != nil || len(p.IMA) != 1 || p.IMA[0] != line {
		t.Fatalf("%+v, %v", p, err)
	}
	b, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := ParsePolicy(b); err != nil || again.IMA[0] != line {
		t.Errorf("%+v, %v", again, err)
	}
	if _, err := ParsePolicy([]byte("kernel: " + strings.Repeat("00", 32) + "\nima:\n  - " + strings.Repeat("00", 32) + "\n  - nothing\n")); err == nil || !strings.HasPrefix(err.Error(), "line 4: ima: ") {
		t.Error(err)
	}
}
