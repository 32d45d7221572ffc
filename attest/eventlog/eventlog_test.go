package eventlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-tpm/tpm2"
)

func bootEvents(t testing.TB) []Event {
	t.Helper()
	events, err := Boot(BootConfig{
		MonitorVersion: "redoubt 1.2.3", MachineConfig: []byte(`{"cpus":2}`), Cmdline: "console=ttyS0 ro",
		Kernel: strings.NewReader(strings.Repeat("kernel", 200_000)), Initrd: strings.NewReader("070701"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return events
}

func encode(t testing.TB, events []Event) []byte {
	t.Helper()
	b, err := Encode(events)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// sha1Log writes events in the older format.
func sha1Log(events []Event) []byte {
	var b []byte
	le := binary.LittleEndian
	for _, e := range events {
		b = le.AppendUint32(b, e.PCR)
		b = le.AppendUint32(b, e.Type)
		b = append(b, e.Digest(tpm2.TPMAlgSHA1)...)
		b = le.AppendUint32(b, u32(len(e.Data)))
		b = append(b, e.Data...)
	}
	return b
}

// locality is the event that gives PCR 0 its start value.
func locality(l byte) Event {
	e := Event{Type: TypeNoAction, Data: append(bytes.Clone(startupLocality), l)}
	for _, id := range Banks {
		e.Digests = append(e.Digests, Digest{id, make([]byte, hashes[id].size)})
	}
	return e
}

func TestMeasure(t *testing.T) {
	for _, size := range []int{0, 1, block - 1, block, block + 1, 5*block + 7} {
		content := bytes.Repeat([]byte("0123456789a"), size/11+1)[:size]
		e, err := Measure(nil, 4, TypeIPL, []byte("x"), iotest.HalfReader(bytes.NewReader(content)))
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range Banks {
			h := hashes[id].new()
			h.Write(content)
			if !bytes.Equal(e.Digest(id), h.Sum(nil)) {
				t.Errorf("%d bytes: the %s digest is wrong", size, AlgorithmName(id))
			}
		}
	}
	broken := errors.New("broken")
	r := io.MultiReader(bytes.NewReader(make([]byte, 3*block)), iotest.ErrReader(broken))
	if _, err := Measure(nil, 4, TypeIPL, nil, r); !errors.Is(err, broken) {
		t.Errorf("a read error became %v", err)
	}
}

// A bank that nothing is measured in has a cap of its own, and no other bank can be asked for.
func TestBanks(t *testing.T) {
	if b, err := ParseBanks([]string(nil)); err != nil || !reflect.DeepEqual(b, []tpm2.TPMAlgID{tpm2.TPMAlgSHA256}) {
		t.Errorf("no banks named: %v, %v", b, err)
	}
	if b, err := ParseBanks([]string{"sha384", "sha1"}); err != nil || !reflect.DeepEqual(b, []tpm2.TPMAlgID{tpm2.TPMAlgSHA384, tpm2.TPMAlgSHA1}) {
		t.Errorf("two banks named: %v, %v", b, err)
	}
	if _, err := ParseBanks([]string{"sm3_256"}); err == nil {
		t.Error("a bank that libtpms does not have was taken")
	}
	if _, err := Measure([]tpm2.TPMAlgID{algSM3}, 4, TypeIPL, nil, nil); err == nil {
		t.Error("measured in a bank that cannot be computed")
	}
	separator := sha256.Sum256([]byte{1, 0, 0, 0})
	if !bytes.Equal(Cap(tpm2.TPMAlgSHA256), separator[:]) || Cap(algSM3) != nil {
		t.Error("wrong caps")
	}
}

func TestMeasureFileKeepsOffset(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("content"); err != nil { // the offset is now at the end
		t.Fatal(err)
	}
	e, err := Measure(nil, 4, TypeIPL, nil, f)
	if err != nil {
		t.Fatal(err)
	}
	if want := sha256.Sum256([]byte("content")); !bytes.Equal(e.Digest(tpm2.TPMAlgSHA256), want[:]) {
		t.Error("the file was not read from its start")
	}
	if off, err := f.Seek(0, io.SeekCurrent); err != nil || off != 7 {
		t.Errorf("the file's offset moved to %d, %v", off, err)
	}
}

func TestBoot(t *testing.T) {
	events := bootEvents(t)
	var got []string
	for _, e := range events {
		got = append(got, fmt.Sprintf("%d:%s:%s", e.PCR, TypeName(e.Type), e.Text()))
	}
	want := []string{
		"0:EV_S_CRTM_VERSION:redoubt 1.2.3", `1:EV_PLATFORM_CONFIG_FLAGS:{"cpus":2}`, "4:EV_IPL:kernel",
		"8:EV_IPL:kernel_cmdline: console=ttyS0 ro", "9:EV_IPL:initrd",
	}
	for i := range 8 {
		want = append(want, fmt.Sprintf("%d:EV_SEPARATOR:00000000", i))
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("events are\n%s", strings.Join(got, "\n"))
	}
	if sum := sha256.Sum256([]byte("console=ttyS0 ro")); !bytes.Equal(events[3].Digest(tpm2.TPMAlgSHA256), sum[:]) {
		t.Error("the command line's digest is not that of its text")
	}
	for i, measured := range []bool{true, true, false, true, false} {
		if _, ok := events[i].Measured(); ok != measured {
			t.Errorf("event %d: Measured says %v", i+1, ok)
		}
	}
	if again := encode(t, bootEvents(t)); !bytes.Equal(again, encode(t, events)) {
		t.Error("the same boot gave another log")
	}
	if _, err := Boot(BootConfig{Kernel: (*os.File)(nil)}); err == nil {
		t.Error("a boot without kernel was measured")
	}
	if e, err := Boot(BootConfig{Kernel: strings.NewReader("k"), Initrd: (*os.File)(nil)}); err != nil || len(e) != 12 {
		t.Errorf("without initrd: %d events, %v", len(e), err)
	}
	fw, err := BootFirmware(FirmwareConfig{MonitorVersion: "v", MachineConfig: []byte("m"), Firmware: strings.NewReader("fw")})
	if err != nil || len(fw) != 3 {
		t.Fatalf("firmware: %d events, %v", len(fw), err)
	}
	for _, e := range fw {
		if e.PCR != PCRFirmware {
			t.Errorf("firmware guest: PCR %d", e.PCR)
		}
	}
}

func TestEncodeThenParse(t *testing.T) {
	events := append([]Event{locality(0)}, bootEvents(t)...)
	for _, keep := range [][]tpm2.TPMAlgID{Banks[:], Banks[1:2], {tpm2.TPMAlgSHA1, tpm2.TPMAlgSHA384}} {
		var some []Event
		for _, e := range events {
			var d []Digest
			for _, id := range keep {
				d = append(d, Digest{id, e.Digest(id)})
			}
			some = append(some, Event{e.PCR, e.Type, d, e.Data})
		}
		b := encode(t, some)
		for _, padding := range []int{0, 1, 3, 8, 15, 16, 64 << 10} {
			l, err := ParseLog(append(bytes.Clone(b), make([]byte, padding)...))
			if err != nil {
				t.Fatal(err)
			}
			if l.Format != AgileFormat || l.Size != len(b) || len(l.Banks) != len(keep) || !reflect.DeepEqual(l.Events, some) {
				t.Errorf("%d of padding: read %s, %v, %d bytes of %d, %d events", padding, l.Format, l.Banks, l.Size, len(b), len(l.Events))
			}
		}
	}
	old := sha1Log(events)
	l, err := ParseLog(append(bytes.Clone(old), make([]byte, 4096)...))
	if err != nil || l.Format != SHA1Format || l.Size != len(old) || len(l.Events) != len(events) {
		t.Errorf("SHA-1 log: %s, %d bytes of %d, %d events, %v", l.Format, l.Size, len(old), len(l.Events), err)
	}
	for name, bad := range map[string][]Event{
		"wrong length": {{Digests: []Digest{{tpm2.TPMAlgSHA1, make([]byte, 19)}}}},
		"no length":    {{Digests: []Digest{{0x99, nil}}}},
		"twice":        {{Digests: []Digest{{0x99, []byte{1}}, {0x99, []byte{1}}}}},
		"two lengths":  {{Digests: []Digest{{0x99, []byte{1}}}}, {Digests: []Digest{{0x99, []byte{1, 2}}}}},
	} {
		if _, err := Encode(bad); err == nil {
			t.Errorf("%s: such an event was written", name)
		}
	}
}

func TestReplayStartupLocality(t *testing.T) {
	first := bootEvents(t)[0]
	got, err := Replay([]Event{locality(3), first})
	if err != nil {
		t.Fatal(err)
	}
	start := make([]byte, 32)
	start[31] = 3
	if want := sha256.Sum256(append(start, first.Digest(tpm2.TPMAlgSHA256)...)); !bytes.Equal(got.Value(tpm2.TPMAlgSHA256, 0), want[:]) {
		t.Error("PCR 0 does not start with the locality")
	}
	if v := got.Value(tpm2.TPMAlgSHA384, 5); !bytes.Equal(v, make([]byte, 48)) {
		t.Errorf("a register without events is %x", v)
	}
	for name, bad := range map[string][]Event{
		"late": {first, locality(3)}, "twice": {locality(0), locality(3)}, "of 1": {locality(1)},
		"long": {{Type: TypeNoAction, Data: append(bytes.Clone(startupLocality), 3, 3)}},
	} {
		if _, err := Replay(bad); err == nil || !strings.Contains(err.Error(), "StartupLocality") {
			t.Errorf("StartupLocality %s: %v", name, err)
		}
	}
}

// Every refusal names the offset of what it refuses, and keeps the events before it.
func TestDamage(t *testing.T) {
	good := encode(t, bootEvents(t))
	edit := func(off int, with ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[off:], with)
		return b
	}
	le32 := func(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
	const (
		count = 32 + 16 + 8         // number of algorithms
		first = count + 4 + 4*4 + 1 // first event
		sums  = first + 12          // its digests
		size  = sums + 22 + 34 + 50 + 66
	)
	second := size + 4 + 2*len("redoubt 1.2.3\x00")
	for name, c := range map[string]struct {
		log    []byte
		off    int
		events int
		text   string
	}{
		"empty":            {nil, 0, 0, "no log"},
		"zeros":            {make([]byte, 100), 0, 0, "no log"},
		"too long":         {make([]byte, MaxLog+1), 0, 0, "the most is"},
		"head cut":         {good[:20], 8, 0, "20 bytes, 12 are left"},
		"no algorithms":    {edit(count, le32(0)...), count, 0, "0 algorithms"},
		"many algorithms":  {edit(count, le32(1<<31)...), count, 0, "2147483648 algorithms"},
		"algorithm twice":  {edit(count+8, 4, 0, 20, 0), count + 8, 0, "0x0004 is declared twice"},
		"size of digests":  {edit(count+6, 21), count + 6, 0, "cannot have 21 bytes"},
		"vendor data":      {edit(first-1, 255), first, 0, "vendor data takes 255 bytes, 0 are left"},
		"PCR":              {edit(first, 24), first, 0, "PCR 24"},
		"count of digests": {edit(first+8, 5), first + 8, 0, "5 digests, the header declares 4"},
		"unknown digest":   {edit(sums, 0x99), sums, 0, "0x0099 is not in the header"},
		"digest twice":     {edit(sums+22, 4), sums + 22, 0, "two digests of algorithm 0x0004"},
		"data":             {edit(size, le32(1<<32-1)...), size + 4, 0, "4294967295 bytes"},
		"second":           {edit(second, 99), second, 1, "PCR 99"},
		"end cut":          {good[:len(good)-1], len(good) - 4, 12, "4 bytes, 3 are left"},
	} {
		events, err := Parse(c.log)
		var d *DamageError
		if !errors.As(err, &d) || d.Offset != c.off || !strings.Contains(err.Error(), c.text) || len(events) != c.events {
			t.Errorf("%s: %d events, error %v; want %d, offset %#x, %q", name, len(events), err, c.events, c.off, c.text)
		}
	}
}

func TestTextIsPrintable(t *testing.T) {
	for data, want := range map[string]string{
		"":                  "",
		"plain\x00":         "plain",
		"esc \x1b[2J":       "657363201b5b324a",
		"turn \u202earound": "7475726e20e280ae61726f756e64",
	} {
		if got := (Event{Type: TypeIPL, Data: []byte(data)}).Text(); got != want {
			t.Errorf("%q is shown as %q", data, got)
		}
	}
	if got := (Event{Type: TypeSCRTMVersion, Data: []byte{0x1b, 0, 'x', 0}}).Text(); got != "1b007800" {
		t.Errorf("UTF-16 controls are shown as %q", got)
	}
}

// Whatever the bytes: Parse returns, within bounds; what it accepts can be written, read again
// and replayed to the same registers.
func FuzzParse(f *testing.F) {
	agile := encode(f, append([]Event{locality(3)}, bootEvents(f)...))
	f.Add(agile)
	f.Add(append(sha1Log(bootEvents(f)), make([]byte, 40)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := ParseLog(b)
		if err != nil {
			if d := (*DamageError)(nil); !errors.As(err, &d) || d.Offset < 0 || d.Offset > len(b) {
				t.Fatalf("offset of the damage: %v", err)
			}
		}
		if len(l.Offsets) != len(l.Events) || l.Size > len(b) {
			t.Fatalf("%d events, %d offsets, %d bytes", len(l.Events), len(l.Offsets), l.Size)
		}
		for _, e := range l.Events {
			_ = e.Text()
			_, _ = e.Measured()
		}
		pcrs, err := Replay(l.Events)
		if err != nil {
			return
		}
		again, err := Encode(l.Events)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		events, err := Parse(again)
		if err != nil {
			t.Fatalf("own log is refused: %v", err)
		}
		if after, err := Replay(events); err != nil || !reflect.DeepEqual(pcrs, after) {
			t.Fatalf("registers differ after writing: %v, %v; %v", pcrs, after, err)
		}
	})
}

func BenchmarkMeasure(b *testing.B) {
	content := make([]byte, 32<<20)
	b.SetBytes(int64(len(content)))
	for b.Loop() {
		if _, err := Measure(nil, 4, TypeIPL, nil, bytes.NewReader(content)); err != nil {
			b.Fatal(err)
		}
	}
}
