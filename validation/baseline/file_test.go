package baseline

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const testGuest = "7b8e1c52-6f0c-4a52-9f5e-0d6c1f2b3a49"

// testRules look at all of what an entry may be.
const testRules = `
rules:
  - {name: all, include: [/all], severity: critical}
  - {name: meta, include: [/meta], check: [metadata], severity: warning}
  - {name: bytes, include: [/bytes], check: [content], severity: info}
  - {name: rights, include: [/], having: [setuid, setgid, capability, device], severity: critical}
`

func testHeader(t testing.TB) Header {
	return Header{Guest: testGuest, Version: 3, Created: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Rules: mustRules(t, testRules)}
}

func entry(path string, mode uint32) Entry {
	e := Entry{Name: Name{"disk0p1", path}, Mode: mode, Links: 1}
	if mode&unix.S_IFMT == unix.S_IFREG {
		e.Size, e.Digest = 5, Digest{1, 2, 3}
	}
	return e
}

// odd are entries of all kinds, and with names of all kinds.
func odd() []Entry {
	link := entry("/all/link", unix.S_IFLNK|0o777)
	link.Target = "../a b\\\n"
	empty := entry("/all/link-", unix.S_IFLNK|0o777)
	device := entry("/x/device", block)
	device.Major, device.Minor, device.GID = 8, 1<<20-1, 6
	capable := entry("/x/ping", program)
	capable.Xattrs = []Xattr{{capability, "\x01\x00 \xff"}, {"system.posix_acl_access", ""}}
	capable.Digest = Digest{}
	owned := entry("/all/owned", setuid)
	owned.UID, owned.GID, owned.Links, owned.Size = 1<<32-1, 7, 1<<32-1, 1<<63-1
	owned.Xattrs = []Xattr{{"security.selinux", "system_u:object_r:bin_t:s0\x00"}}
	meta := entry("/meta/file", regular)
	meta.Digest = Digest{}
	content := entry("/bytes/file", unix.S_IFREG|unix.S_ISUID)
	content.Links = 0
	all := []Entry{
		link, empty, device, capable, owned, meta, content,
		entry("/all", directory), entry("/all/pipe", unix.S_IFIFO|0o600), entry("/all/socket", unix.S_IFSOCK|0o600), entry("/all/tty", unix.S_IFCHR|0o600),
	}
	for _, name := range []string{"new\nline", "a b", `back\slash`, `\x41`, "é", "\xff\xfe", "a:b", "\"", "\x7f", "-", "~", "entries 1", strings.Repeat("x", 255)} {
		all = append(all, entry("/all/"+name, regular))
	}
	other := entry("/all", directory)
	other.Volume = "disk0"
	return sorted(append(all, other))
}

func sorted(all []Entry) []Entry {
	slices.SortFunc(all, func(a, b Entry) int { return a.Compare(b.Name) })
	return all
}

func draft(t testing.TB, h Header, all []Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, h, slices.Values(all)); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func opened(t testing.TB, file []byte) *Baseline {
	t.Helper()
	b, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func all(t testing.TB, b *Baseline) (list []Entry) {
	t.Helper()
	for e, err := range b.All() {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, e)
	}
	return list
}

// TestRoundTrip: what is written is read as the same, each entry is found by its name, and others are not.
func TestRoundTrip(t *testing.T) {
	want := odd()
	file := draft(t, testHeader(t), want)
	b := opened(t, file)
	if err := b.Check(); err != nil {
		t.Fatal(err)
	}
	if b.Guest != testGuest || b.Version != 3 || !b.Created.Equal(testHeader(t).Created) || b.Len() != len(want) || b.Signed() {
		t.Errorf("%+v", b.Header)
	}
	got := all(t, b)
	if !slices.EqualFunc(got, want, func(a, b Entry) bool { return same(&a, &b) }) {
		t.Errorf("%+v\nnot\n%+v", got, want)
	}
	for _, e := range want {
		found, ok, err := b.Lookup(e.Name)
		if err != nil || !ok || !same(&found, &e) {
			t.Errorf("%q: %v %v %+v", e.Path, ok, err, found)
		}
		for _, other := range []string{e.Path + "!", e.Path + "\x00", e.Path[:len(e.Path)-1]} {
			n := Name{e.Volume, other}
			known := slices.ContainsFunc(want, func(e Entry) bool { return e.Name == n })
			if _, ok, err := b.Lookup(n); err != nil || ok != known {
				t.Errorf("%q: %v %v", other, ok, err)
			}
		}
	}
	for _, n := range []Name{{}, {"a", "/"}, {"z", "/"}} {
		if _, ok, err := b.Lookup(n); ok || err != nil {
			t.Errorf("%v: %v %v", n, ok, err)
		}
	}
	for line := range bytes.Lines(file) {
		if bytes.IndexFunc(line[:len(line)-1], func(r rune) bool { return r < ' ' || r > '~' }) >= 0 {
			t.Errorf("not printable: %q", line)
		}
	}
	var nothing bytes.Buffer
	if err := Write(&nothing, testHeader(t), slices.Values([]Entry(nil))); err != nil {
		t.Fatal(err)
	}
	e := opened(t, nothing.Bytes())
	if _, ok, err := e.Lookup(want[0].Name); ok || err != nil || e.Check() != nil {
		t.Errorf("an empty one: %v %v", ok, err)
	}
}

// TestWriteRefuses: what Check would refuse is not written.
func TestWriteRefuses(t *testing.T) {
	with := func(change func(*Entry)) []Entry {
		e := entry("/all/a", regular)
		change(&e)
		return []Entry{e}
	}
	for name, entries := range map[string][]Entry{
		"unsorted":  {entry("/all/b", regular), entry("/all/a", regular)},
		"twice":     {entry("/all/b", regular), entry("/all/b", regular)},
		"no rule":   {entry("/none", regular)},
		"unclean":   {entry("/all/../etc", regular)},
		"slash":     {entry("/all/a/", regular)},
		"relative":  {entry("all", regular)},
		"zero byte": {entry("/all/\x00", regular)},
		"long":      {entry("/all/"+strings.Repeat("x", maxPath), regular)},
		"volume":    with(func(e *Entry) { e.Volume = "a:b" }),
		"type":      with(func(e *Entry) { e.Mode = 0o644 }),
		"bits":      with(func(e *Entry) { e.Mode |= 1 << 20 }),
		"size":      with(func(e *Entry) { e.Size = -1 }),
		"digest":    with(func(e *Entry) { e.Digest = Digest{} }),
		"target":    with(func(e *Entry) { e.Target = "x" }),
		"numbers":   with(func(e *Entry) { e.Major = 1 }),
		"attribute": with(func(e *Entry) { e.Xattrs = []Xattr{{"user.x", ""}} }),
		"order":     with(func(e *Entry) { e.Xattrs = []Xattr{{"security.ima", ""}, {"security.evm", ""}} }),
		"values":    with(func(e *Entry) { e.Xattrs = []Xattr{{"security.ima", strings.Repeat("x", maxXattr+1)}} }),
		"unchecked": {entry("/meta/a", regular)},
	} {
		if err := Write(io.Discard, testHeader(t), slices.Values(entries)); err == nil {
			t.Errorf("%s: written", name)
		}
	}
	if err := Write(io.Discard, testHeader(t), slices.Values([]Entry{entry("/all/b", regular), entry("/all/a", regular)})); !errors.Is(err, ErrUnsorted) {
		t.Errorf("unsorted: %v", err)
	}
	for name, h := range map[string]Header{
		"guest":   {Guest: strings.ToUpper(testGuest), Version: 1, Created: time.Unix(1, 0), Rules: DefaultRules()},
		"version": {Guest: testGuest, Created: time.Unix(1, 0), Rules: DefaultRules()},
		"created": {Guest: testGuest, Version: 1, Rules: DefaultRules()},
		"rules":   {Guest: testGuest, Version: 1, Created: time.Unix(1, 0)},
	} {
		if err := Write(io.Discard, h, slices.Values([]Entry(nil))); err == nil {
			t.Errorf("header without %s: written", name)
		}
	}
}

// TestDamagedFile: files that were changed are refused by Open or by Check, with the byte, and looking into them ends.
func TestDamagedFile(t *testing.T) {
	file := string(draft(t, testHeader(t), odd()))
	replace := func(old, by string) string {
		if !strings.Contains(file, old) {
			t.Fatalf("no %q in\n%s", old, file)
		}
		return strings.Replace(file, old, by, 1)
	}
	lines := strings.SplitAfter(file, "\n")
	first := slices.IndexFunc(lines, func(s string) bool { return strings.HasPrefix(s, "disk0") })
	swapped := slices.Clone(lines)
	swapped[first], swapped[first+1] = swapped[first+1], swapped[first]
	for name, text := range map[string]string{
		"empty":          "",
		"magic":          replace("redoubt-baseline 1", "redoubt-baseline 2"),
		"guest":          replace("guest 7b", "guest 7B"),
		"version":        replace("version 3", "version 03"),
		"version 0":      replace("version 3", "version 0"),
		"created":        replace("12:00:00Z", "13:00:00+01:00"),
		"rules count":    replace("rules 2", "rules 3"),
		"rules":          replace("'/all'", "/all"),
		"rules changed":  replace("      - '/all'", "      - '/xll'"),
		"long header":    replace("guest ", "guest "+strings.Repeat(" ", 1000)),
		"swapped":        strings.Join(swapped, ""),
		"twice":          replace(lines[first], lines[first]+lines[first]),
		"line left out":  replace(lines[first], ""),
		"count":          replace(fmt.Sprintf("entries %d\n", len(odd())), "entries 1\n"),
		"too many":       replace(fmt.Sprintf("entries %d\n", len(odd())), "entries 99999\n"),
		"cut off":        file[:len(file)-5],
		"no end":         strings.TrimSuffix(file, lines[len(lines)-2]),
		"behind the end": file + "x",
		"escape":         replace(`new\x0aline`, `new\x0Aline`),
		"escape plain":   replace(`new\x0aline`, `n\x65w\x0aline`),
		"zeros":          replace(" 0755 0:0 1", " 0755 00:0 1"),
		"type":           replace(" d 0755", " x 0755"),
		"mode":           replace(" d 0755", " d 0855"),
		"sign":           replace(" 5 0102", " +5 0102"),
		"upper case":     replace("0102030", "010203A"),
		"space":          replace(" d 0755", "  d 0755"),
		"attribute":      replace("security.selinux=", "security.selinuy="),
		"long line":      replace("entries ", "disk0p1:/zz/"+strings.Repeat("x", maxLine)+"\nentries "),
		"no line":        replace("entries ", strings.Repeat("x", 3*maxLine)+"\nentries "),
	} {
		b, err := Open([]byte(text))
		if err == nil {
			for _, e := range odd() {
				_, _, _ = b.Lookup(e.Name)
			}
			err = b.Check()
		}
		if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "byte ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAnyByte: a file with another byte somewhere is refused by Open or Check, or is a baseline that says something else.
func TestAnyByte(t *testing.T) {
	file := draft(t, testHeader(t), odd())
	rnd := rand.New(rand.NewPCG(3, 4))
	for i := 0; i < len(file); i += 1 + rnd.IntN(9) {
		changed := bytes.Clone(file)
		changed[i] ^= byte(1 + rnd.IntN(255))
		b, err := Open(changed)
		if err != nil || b.Check() != nil {
			continue
		}
		again := draft(t, b.Header, all(t, b))
		if !bytes.Equal(again, changed) {
			t.Fatalf("byte %d: another text of the same", i)
		}
	}
}

// FuzzOpen: what Check takes is the one text of what it says; Lookup finds all of it; and nothing crashes on the rest.
func FuzzOpen(f *testing.F) {
	file := draft(f, testHeader(f), odd()[:6]) // a small one: the fuzzer shortens each input that it finds
	f.Add(file)
	f.Add(draft(f, testHeader(f), nil))
	key := testKey(f)
	signed, err := Sign(file, key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(signed)
	f.Fuzz(func(t *testing.T, file []byte) {
		b, err := Open(file)
		if err != nil {
			return
		}
		names := []Name{{"disk0p1", "/all/a b"}, {"disk0", "/"}}
		if b.Check() == nil {
			entries := all(t, b)
			again := draft(t, b.Header, entries)
			if !bytes.Equal(again, file[:len(file)-len(b.signature)]) {
				t.Fatalf("%q\nis\n%q", file, again)
			}
			for _, e := range entries {
				if found, ok, err := b.Lookup(e.Name); !ok || err != nil || !same(&found, &e) {
					t.Fatalf("%v: %v %v", e.Name, ok, err)
				}
			}
		}
		for e, err := range b.All() {
			if err == nil {
				names = append(names, e.Name)
			}
		}
		for _, n := range names {
			_, _, _ = b.Lookup(n)
		}
	})
}

// TestEscape: every byte comes back, and has one form.
func TestEscape(t *testing.T) {
	seen := map[string]bool{}
	for c := range 256 {
		s := "a" + string([]byte{byte(c)}) + "b"
		word := Escape(s)
		back, err := Unescape(word)
		if err != nil || back != s || seen[word] {
			t.Errorf("%q: %q: %q, %v", s, word, back, err)
		}
		seen[word] = true
	}
	for _, bad := range []string{`\`, `\x`, `\x0`, `\x0G`, `\x61`, `\n`, " ", "é", `\X00`, `\x5c`} {
		if s, err := Unescape(bad); err == nil {
			t.Errorf("%q: %q", bad, s)
		}
	}
}

// benchEntries is a guest's: 60,000 files of /all.
func benchEntries() []Entry {
	var list []Entry
	for i := range 60_000 {
		e := entry(fmt.Sprintf("/all/lib%03d/package-%d/file-%d.so", i%300, i%1000, i), regular)
		e.Digest = Digest{byte(i), byte(i >> 8), 7}
		list = append(list, e)
	}
	return sorted(list)
}

// BenchmarkLookup finds a name in a file of 60,000 entries as it is; its peer is a binary search of entries in memory, for
// which all of the file was read first.
func BenchmarkLookup(b *testing.B) {
	entries := benchEntries()
	base := opened(b, draft(b, testHeader(b), entries))
	var ours float64 // seconds
	b.Run("file", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			if _, ok, _ := base.Lookup(entries[i*7919%len(entries)].Name); !ok {
				b.Fatal("not found")
			}
		}
		ours = b.Elapsed().Seconds() / float64(b.N)
	})
	b.Run("memory", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			n := entries[i*7919%len(entries)].Name
			at := sort.Search(len(entries), func(j int) bool { return entries[j].Compare(n) >= 0 })
			if entries[at].Name != n {
				b.Fatal("not found")
			}
		}
		b.ReportMetric(b.Elapsed().Seconds()/float64(b.N)/ours, "ratio")
	})
}

// BenchmarkOpen opens a file of 60,000 entries; its peer reads all of it.
func BenchmarkOpen(b *testing.B) {
	file := draft(b, testHeader(b), benchEntries())
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			if _, err := Open(file); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("check", func(b *testing.B) {
		b.SetBytes(int64(len(file)))
		for b.Loop() {
			if err := opened(b, file).Check(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("write", func(b *testing.B) {
		entries := benchEntries()
		for b.Loop() {
			if err := Write(io.Discard, testHeader(b), slices.Values(entries)); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkCompare compares 60,000 files, of which one differs, in full, and then only that one.
func BenchmarkCompare(b *testing.B) {
	entries := benchEntries()
	base := opened(b, draft(b, testHeader(b), entries))
	entries[100].Digest = Digest{9}
	var last Comparison
	b.Run("full", func(b *testing.B) {
		for b.Loop() {
			var err error
			if last, err = Compare(base, slices.Values(entries), nil, 10); err != nil || len(last.Findings) != 1 {
				b.Fatal(last, err)
			}
		}
		b.ReportMetric(float64(len(entries)*b.N)/b.Elapsed().Seconds(), "files/s")
	})
	b.Run("touched", func(b *testing.B) {
		for b.Loop() {
			c, err := CompareTouched(base, []Name{entries[100].Name}, func(Name) (Entry, bool) { return entries[100], true }, nil, last, 10)
			if err != nil || len(c.Findings) != 1 {
				b.Fatal(c, err)
			}
		}
	})
}
