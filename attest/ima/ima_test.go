package ima

import (
	"bytes"
	"crypto/sha1" //nolint:gosec // the format's
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// ng is an entry of template ima-ng.
func ng(path string, content string) Entry {
	sum := sha256.Sum256([]byte(content))
	return of("ima-ng", "sha256:\x00"+string(sum[:]), path+"\x00")
}

func of(template string, fields ...string) Entry {
	e := Entry{PCR: PCR, Template: template}
	for _, f := range fields {
		e.Data = binary.LittleEndian.AppendUint32(e.Data, uint32(len(f)))
		e.Data = append(e.Data, f...)
	}
	e.SHA1 = sha1.Sum(e.hashed()) //nolint:gosec // the format's
	return e
}

func violation(path string) Entry {
	e := of("ima-ng", "sha256:\x00"+strings.Repeat("\x00", 32), path+"\x00")
	e.SHA1 = [sha1.Size]byte{}
	return e
}

func some() []Entry {
	return []Entry{
		ng("boot_aggregate", "registers"), ng("/bin/sh", "shell"), of("ima-sig", "sha256:\x00"+strings.Repeat("b", 32), "/bin/cat\x00", "signature"),
		violation("/var/log/open"), of("ima", strings.Repeat("d", 20), "/sbin/init"), ng("/bin/true", "true"),
	}
}

func written(all []Entry) (b []byte) {
	for i := range all {
		b = all[i].Append(b)
	}
	return b
}

// TestParse: what is written is read, and is what it says.
func TestParse(t *testing.T) {
	b := written(some())
	all, err := Parse(b)
	if err != nil || !bytes.Equal(written(all), b) {
		t.Fatalf("%+v, %v", all, err)
	}
	for i, want := range []File{
		{"sha256", nil, "boot_aggregate"},
		{"sha256", nil, "/bin/sh"},
		{"sha256", nil, "/bin/cat"},
		{"sha256", nil, "/var/log/open"},
		{"sha1", nil, "/sbin/init"},
		{"sha256", nil, "/bin/true"},
	} {
		f, err := all[i].File()
		if err != nil || f.Algorithm != want.Algorithm || f.Path != want.Path || !all[i].Sound() || all[i].Violation() != (i == 3) {
			t.Errorf("entry %d: %+v, %v", i, f, err)
		}
	}
	for cut := 1; cut < len(b); cut++ {
		if all, err := Parse(b[:cut]); err != nil != (len(written(all)) != cut) || err != nil && !errors.Is(err, ErrDamaged) {
			t.Errorf("the first %d bytes: %d entries, %v", cut, len(all), err)
		}
	}
	// From 6.6 on a digest says of what it is, too.
	v2 := of("ima-ngv2", "verity:sha256:\x00"+strings.Repeat("v", 32), "/a\x00")
	if f, err := v2.File(); err != nil || f.Algorithm != "sha256" || len(f.Digest) != 32 {
		t.Errorf("%+v, %v", f, err)
	}
	for _, bad := range []Entry{of("ima-ng", "no algorithm", "/a\x00"), of("ima-ng", "one field"), {Template: "ima-ng", Data: []byte{9, 0, 0, 0, 1}}} {
		if f, err := bad.File(); !errors.Is(err, ErrDamaged) {
			t.Errorf("%+v, %v", f, err)
		}
	}
}

// TestLegacy: the digest of template "ima", by hand: the file's digest, then its name with zeros to 257 bytes.
func TestLegacy(t *testing.T) {
	e := of("ima", strings.Repeat("d", 20), "/sbin/init")
	want := sha1.Sum([]byte(strings.Repeat("d", 20) + "/sbin/init" + strings.Repeat("\x00", 257-len("/sbin/init")))) //nolint:gosec // the format's
	if e.SHA1 != want {
		t.Errorf("%x, not %x", e.SHA1, want)
	}
	b := e.Append(nil)
	if got := len(b); got != 4+20+4+3+20+4+10 {
		t.Errorf("%d bytes", got)
	}
}

// pcr is what a TPM's register is after the list, by the rules of each bank written out.
func pcr(all []Entry, bank Bank) []byte {
	long, short := make([]byte, 32), make([]byte, 20)
	for i := range all {
		e := &all[i]
		if e.PCR != PCR {
			continue
		}
		one, other := sha1.Sum(e.hashed()), sha256.Sum256(e.hashed()) //nolint:gosec // the format's
		d1, d2 := one[:], other[:]
		if bank == SHA256Padded {
			d2 = append(bytes.Clone(d1), make([]byte, 12)...)
		}
		if e.Violation() {
			d1, d2 = bytes.Repeat([]byte{255}, 20), bytes.Repeat([]byte{255}, 32)
		}
		s := sha1.Sum(append(short, d1...)) //nolint:gosec // the format's
		l := sha256.Sum256(append(long, d2...))
		short, long = s[:], l[:]
	}
	if bank == SHA1 {
		return short
	}
	return long
}

// TestMatch: for each bank, the prefix that the register vouches for is found, whatever was measured since; and a later
// quote needs only what is new.
func TestMatch(t *testing.T) {
	all := some()
	for _, bank := range []Bank{SHA1, SHA256, SHA256Padded} {
		for n := range len(all) + 1 {
			from := Prefix{}
			if bank == SHA1 {
				from.Bank = SHA1
			}
			at, err := Match(all, from, pcr(all[:n], bank))
			if err != nil || at.Count != n || n > 0 && at.Bank != bank {
				t.Fatalf("%s, %d entries: %+v, %v", bank, n, at, err)
			}
			if n == 0 {
				continue
			}
			next, err := Match(all[n:], at, pcr(all, bank))
			if err != nil || next.Count != len(all) {
				t.Errorf("%s, from %d on: %+v, %v", bank, n, next, err)
			}
		}
	}
	other := ng("/elsewhere", "x")
	other.PCR = 11
	with := append([]Entry{other}, all...)
	if at, err := Match(with, Prefix{}, pcr(all, SHA256)); err != nil || at.Count != len(all)+1 {
		t.Errorf("with an entry of PCR 11: %+v, %v", at, err)
	}
}

// TestMismatch: each change of a list is found, and where the list itself tells which entry it is, that is named.
func TestMismatch(t *testing.T) {
	quoted := pcr(some(), SHA256)
	for name, c := range map[string]struct {
		change func([]Entry) []Entry
		want   string
	}{
		"data":    {func(a []Entry) []Entry { a[1].Data[len(a[1].Data)-2] = 'X'; return a }, `entry 2 ("/bin/sX")`},
		"whole":   {func(a []Entry) []Entry { a[2] = ng("/bin/cat", "another"); return a }, "entries 1"},
		"missing": {func(a []Entry) []Entry { return append(a[:1], a[2:]...) }, "gives PCR 10"},
		"cut":     {func(a []Entry) []Entry { return a[:3] }, "gives PCR 10"},
		"swapped": {func(a []Entry) []Entry { a[1], a[2] = a[2], a[1]; return a }, "gives PCR 10"},
		"put in":  {func(a []Entry) []Entry { return append([]Entry{a[0], ng("/x", "x")}, a[1:]...) }, "gives PCR 10"},
		"a violation hidden": {func(a []Entry) []Entry {
			a[3].SHA1 = sha1.Sum(a[3].hashed()) //nolint:gosec // the format's
			return a
		}, "gives PCR 10"},
		"a violation made": {func(a []Entry) []Entry { a[1].SHA1 = [20]byte{}; return a }, "gives PCR 10"},
		"none":             {func([]Entry) []Entry { return nil }, "gives PCR 10"},
	} {
		if at, err := Match(c.change(some()), Prefix{}, quoted); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %+v, %v", name, at, err)
		}
	}
}

func TestAllow(t *testing.T) {
	all := some()
	list, err := ParseAllowlist(append([]byte("# what runs\n\n"), Allow(all)...))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		entries []Entry
		first   int
		want    string
	}{
		{"what there was", append(all[:3:3], all[4:]...), 1, ""},
		{"a violation", all, 1, `entry 4: "/var/log/open" was read while it was written`},
		{"another file", []Entry{all[1], ng("/bin/evil", "x")}, 8, `entry 9: "/bin/evil"`},
		{"another content", []Entry{ng("/bin/sh", "x")}, 2, `entry 2: "/bin/sh"`},
		{"another path", []Entry{ng("/tmp/sh", "shell")}, 2, `entry 2: "/tmp/sh"`},
		{"a file of the aggregate's name", []Entry{all[1], ng("boot_aggregate", "x")}, 2, `entry 3: "boot_aggregate"`},
		{"no digest", []Entry{of("ima-ng", "x", "/a\x00")}, 5, "entry 5"},
	} {
		err := list.Check(c.entries, c.first)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// A digest alone allows any path.
	sum := sha256.Sum256([]byte("shell"))
	for _, line := range []string{hex.EncodeToString(sum[:]), "sha256:" + strings.ToUpper(hex.EncodeToString(sum[:])), hex.EncodeToString(sum[:]) + " */tmp/sh"} {
		list, err := ParseAllowlist([]byte(line))
		if err != nil {
			t.Fatal(err)
		}
		if err := list.Check([]Entry{ng("/tmp/sh", "shell")}, 2); err != nil {
			t.Errorf("%q: %v", line, err)
		}
	}
	for _, bad := range []string{"", "# nothing\n", "xyz /bin/sh", "abcd", ":00 x", "sha256: x"} {
		if _, err := ParseAllowlist([]byte(bad)); err == nil {
			t.Errorf("%q is an allowlist", bad)
		}
	}
	var a, b Allowlist
	for i := range 3 {
		for l, n := range map[*Allowlist]int{&a: i, &b: 2 - i} {
			if err := l.Add(fmt.Sprintf("%040x /x", n)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !bytes.Equal(a.ID(), b.ID()) || bytes.Equal(a.ID(), list.ID()) || (*Allowlist)(nil).ID() != nil {
		t.Error("the identity of lists is not what they allow")
	}
}

// FuzzParse: whatever the list, what is read of it is what is written again, and everything can be asked of it.
func FuzzParse(f *testing.F) {
	f.Add(written(some()))
	f.Add(written(some()[:2])[3:])
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := Parse(b)
		if again := written(all); !bytes.HasPrefix(b, again) || err == nil && len(again) != len(b) {
			t.Fatalf("%d entries of %x are %x", len(all), b, again)
		}
		for i := range all {
			_, _ = all[i].File()
			_ = all[i].Sound()
		}
		if at, err := Match(all, Prefix{}, pcr(all, SHA256)); err != nil || at.Count > len(all) {
			t.Errorf("%+v, %v", at, err)
		}
		if list, err := ParseAllowlist(Allow(all)); err == nil {
			_ = list.Check(all, 1)
		}
	})
}

// FuzzParseAllowlist: whatever the file, it is refused or allows what it says, and nothing else.
func FuzzParseAllowlist(f *testing.F) {
	f.Add(Allow(some()))
	f.Add([]byte("# x\nsha1:00 /a b\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := ParseAllowlist(b)
		if err != nil {
			return
		}
		if list.Check([]Entry{ng("/no such file\xff", string(b))}, 2) == nil {
			t.Errorf("%q allows anything", b)
		}
	})
}
