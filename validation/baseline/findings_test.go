package baseline

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func compared(t testing.TB, b *Baseline, is []Entry, problems ...Problem) []Finding {
	t.Helper()
	c, err := Compare(b, slices.Values(is), problems, 1000)
	if err != nil {
		t.Fatal(err)
	}
	return c.Findings
}

func kinds(all []Finding) string {
	var k []string
	for _, f := range all {
		k = append(k, string(f.Kind))
	}
	return strings.Join(k, " ")
}

// TestKinds: each way to change a file is found, as what it is.
func TestKinds(t *testing.T) {
	const path = "/all/file"
	base := entry(path, program)
	base.Xattrs = []Xattr{{"system.posix_acl_access", "a"}}
	change := func(f func(*Entry)) *Entry {
		e := base
		e.Xattrs = slices.Clone(e.Xattrs)
		f(&e)
		return &e
	}
	for _, c := range []struct {
		name  string
		was   *Entry
		is    *Entry
		kinds string
		text  string // of the first
	}{
		{"same", &base, &base, "", ""},
		{"removed", &base, nil, "removed", "critical removed disk0p1:/all/file: was file 0755 0:0 5 bytes sha256:0102030000000000… (all)"},
		{"added", nil, &base, "added", "critical added disk0p1:/all/file: file 0755 0:0 5 bytes sha256:0102030000000000… (all)"},
		{"content", &base, change(func(e *Entry) { e.Digest[0], e.Size = 9, 6 }), "content", "5 bytes sha256:0102030000000000… → 6 bytes sha256:0902030000000000…"},
		{"content lost", &base, change(func(e *Entry) { e.Digest = Digest{} }), "content", "→ not read"},
		{"size lies", &base, change(func(e *Entry) { e.Size = 7 }), "metadata", "5 bytes → 7 bytes"},
		{"mode", &base, change(func(e *Entry) { e.Mode |= 2 }), "metadata", "0755 0:0 → 0757 0:0"},
		{"sticky", &base, change(func(e *Entry) { e.Mode |= unix.S_ISVTX }), "metadata", "→ 1755 0:0"},
		{"owner", &base, change(func(e *Entry) { e.UID = 1000 }), "metadata", "→ 0755 1000:0"},
		{"group", &base, change(func(e *Entry) { e.GID = 1000 }), "metadata", "→ 0755 0:1000"},
		{"setuid", &base, change(func(e *Entry) { e.Mode |= unix.S_ISUID }), "setuid", "0755 0:0 → 4755 0:0"},
		{"setgid", &base, change(func(e *Entry) { e.Mode |= unix.S_ISGID }), "setuid", "→ 2755 0:0"},
		{"setuid lost", change(func(e *Entry) { e.Mode |= unix.S_ISUID }), &base, "setuid", "4755 0:0 → 0755 0:0"},
		{"setuid of another", change(func(e *Entry) { e.Mode |= unix.S_ISUID }), change(func(e *Entry) { e.Mode |= unix.S_ISUID; e.UID = 1 }), "metadata", "4755 0:0 → 4755 1:0"},
		{"added setuid", nil, change(func(e *Entry) { e.Mode |= unix.S_ISUID }), "added setuid", "file 4755"},
		{"names", &base, change(func(e *Entry) { e.Links = 2 }), "link", "1 names → 2 names"},
		{"capability", &base, change(func(e *Entry) { e.Xattrs = slices.Insert(e.Xattrs, 0, Xattr{capability, "\x01"}) }), "capability", `security.capability=\x01`},
		{"added capability", nil, change(func(e *Entry) { e.Xattrs = []Xattr{{capability, "\x01"}} }), "added capability", ""},
		{"attribute", &base, change(func(e *Entry) { e.Xattrs[0].Value = "b" }), "attribute", "access=a → system.posix_acl_access=b"},
		{"attribute lost", &base, change(func(e *Entry) { e.Xattrs = nil }), "attribute", "was system.posix_acl_access=a"},
		{"type", &base, func() *Entry { e := entry(path, directory); return &e }(), "type attribute", "file 0755 0:0 5 bytes sha256:0102030000000000… → directory 0755 0:0"},
		{"device instead", &base, func() *Entry { e := entry(path, block); e.Major = 8; return &e }(), "type device attribute", ""},
		{"added device", nil, func() *Entry { e := entry(path, block); e.Major, e.Minor = 8, 1; return &e }(), "added device", "device 0660 0:0 b 8:1"},
		{"all at once", &base, change(func(e *Entry) {
			e.Mode, e.Digest, e.Links, e.Xattrs = setuid|0o22, Digest{}, 3, []Xattr{{capability, "\x01"}}
		}), "attribute capability content link metadata setuid", ""},
	} {
		was, is := []Entry{}, []Entry{}
		if c.was != nil {
			was = append(was, *c.was)
		}
		if c.is != nil {
			is = append(is, *c.is)
		}
		b := opened(t, draft(t, testHeader(t), was))
		got := compared(t, b, is)
		if a, b := strings.Fields(kinds(got)), strings.Fields(c.kinds); !slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))) {
			t.Errorf("%s: %s, not %s", c.name, kinds(got), c.kinds)
			continue
		}
		if len(got) > 0 && !slices.ContainsFunc(got, func(f Finding) bool { return strings.Contains(f.String(), c.text) }) {
			t.Errorf("%s: %v; want %s", c.name, got, c.text)
		}
	}
	link, device := entry("/all/l", unix.S_IFLNK|0o777), entry("/all/n", block)
	link.Target, device.Major = "a b", 8
	b := opened(t, draft(t, testHeader(t), []Entry{link, device}))
	link.Target, device.Minor = "c", 1
	want := `[critical link disk0p1:/all/l: ->a\x20b → ->c (all) critical device disk0p1:/all/n: b 8:0 → b 8:1 (all)]`
	if got := fmt.Sprint(compared(t, b, []Entry{link, device})); got != want {
		t.Error(got)
	}
}

// TestChecks: what a rule does not check is no deviation; what gives rights is, whatever it checks.
func TestChecks(t *testing.T) {
	if w := testHeader(t).Rules.Want(Name{"disk0p1", "/bytes/a"}, regular); w != Metadata|Content {
		t.Errorf("wanted %04b: what a file is, is always wanted", w)
	}
	meta, content := entry("/meta/a", regular), entry("/bytes/a", regular)
	b := opened(t, draft(t, testHeader(t), slices.Collect(testHeader(t).Rules.Kept(slices.Values([]Entry{content, meta})))))
	meta.Digest, content.UID, content.Mode = Digest{9}, 5, program
	if got := compared(t, b, []Entry{content, meta}); len(got) != 0 {
		t.Errorf("%v", got)
	}
	meta.Size, content.Mode, content.Digest = 6, setuid, Digest{9}
	if got := compared(t, b, []Entry{content, meta}); kinds(got) != "content setuid metadata" || got[0].Severity != Info || got[1].Severity != Critical || got[2].Severity != Warning {
		t.Errorf("%v", got)
	}
}

// TestLostRights: a file that is in the baseline for its bits only, and has lost them, is not removed.
func TestLostRights(t *testing.T) {
	was := entry("/x/su", setuid)
	b := opened(t, draft(t, testHeader(t), []Entry{was}))
	is := was
	is.Mode = program
	if got := compared(t, b, []Entry{is}); kinds(got) != "setuid" || got[0].Rule != "rights" {
		t.Errorf("%v", got)
	}
	if got := compared(t, b, nil); kinds(got) != "removed" {
		t.Errorf("%v", got)
	}
	b = opened(t, draft(t, testHeader(t), nil))
	if got := compared(t, b, []Entry{is}); len(got) != 0 {
		t.Errorf("a file of no rule: %v", got)
	}
	if got := compared(t, b, []Entry{was}); kinds(got) != "added setuid" {
		t.Errorf("%v", got)
	}
}

// TestRuleOfTraits: a file that comes under another rule by what it gained is judged by both, and where an earlier rule asks
// for capabilities only, contents are checked if a later one does.
func TestRuleOfTraits(t *testing.T) {
	h := testHeader(t)
	h.Rules = mustRules(t, `
rules:
  - {name: rights, include: [/a, /b, /c], having: [setuid, capability], check: [content], severity: critical}
  - {name: all, include: [/a], severity: info}
  - {name: meta, include: [/b], check: [metadata], severity: info}
`)
	was := entry("/a/x", regular)
	b := opened(t, draft(t, h, []Entry{was}))
	is := was
	is.Mode, is.UID = setuid, 7
	for _, f := range compared(t, b, []Entry{is}) {
		if f.Severity != Critical || f.Rule != "all" {
			t.Errorf("%v", f)
		}
	}
	for path, content := range map[string]bool{"/a/x": true, "/b/x": false, "/c/x": false} {
		e := entry(path, regular)
		e.Xattrs = []Xattr{{capability, "\x01"}}
		kept, ok := h.Rules.Reduce(e)
		if !ok || h.Rules.RuleOf(e) != "rights" || (kept.Digest != Digest{}) != content || len(kept.Xattrs) != 1 {
			t.Errorf("%v: %+v", ok, kept)
		}
		if w := h.Rules.Want(e.Name, e.Mode); w&Xattrs == 0 || (w&Content != 0) != content {
			t.Errorf("%s: wanted %04b", path, w)
		}
		if w := h.Rules.Want(e.Name, setuid); w != checkAll {
			t.Errorf("%s: wanted %04b of a set-id file", path, w)
		}
	}
	// A rule that is gone: what it checked is compared all the same.
	less := h
	less.Rules = mustRules(t, "rules: [{name: rights, include: [/], having: [setuid], severity: info}]")
	is.Digest = Digest{9}
	c, err := Diff(b, opened(t, draft(t, less, []Entry{is})), 10)
	if err != nil || kinds(c.Findings) != "content metadata setuid" || c.Findings[0].Severity != Critical {
		t.Errorf("%v %v", c.Findings, err)
	}
}

// TestTouchedProblem: a name that has a problem is looked at though nothing touched it, and others keep their findings.
func TestTouchedProblem(t *testing.T) {
	a, c := entry("/all/a", regular), entry("/all/c", regular)
	b := opened(t, draft(t, testHeader(t), []Entry{a, c}))
	last, err := Compare(b, slices.Values([]Entry{a}), nil, 10)
	if err != nil {
		t.Fatal(err)
	}
	got, err := CompareTouched(b, nil, func(Name) (Entry, bool) { return a, true }, []Problem{{a.Name, "x"}}, last, 10)
	if err != nil || kinds(got.Findings) != "unreadable removed" {
		t.Errorf("%v %v", got.Findings, err)
	}
}

// TestUnreadable: what could not be read is one finding, not one of something else, and is as severe as what it may hide.
func TestUnreadable(t *testing.T) {
	a, c := entry("/all/a", regular), entry("/all/c", regular)
	b := opened(t, draft(t, testHeader(t), []Entry{a, c}))
	damaged := c
	damaged.Digest = Digest{}
	got := compared(t, b, []Entry{damaged}, Problem{c.Name, "byte 7:\ndamaged"}, Problem{c.Name, "z"}, Problem{a.Name, "gone"},
		Problem{Name{"disk0p1", "/all/new"}, "new"}, Problem{Name{"disk0p1", "/var/x"}, "x"}, Problem{Name{"disk1", "/"}, "no file system"})
	var lines []string
	for _, f := range got {
		lines = append(lines, f.String())
	}
	want := `critical unreadable disk0p1:/all/a: file 0644 0:0 5 bytes sha256:0102030000000000… → gone (all)
critical unreadable disk0p1:/all/c: file 0644 0:0 5 bytes sha256:0102030000000000… → byte\x207:\x0adamaged (all)
critical unreadable disk0p1:/all/new: new (all)
critical unreadable disk0p1:/var/x: x (rights)
critical unreadable disk1:/: no\x20file\x20system (rights)`
	if strings.Join(lines, "\n") != want {
		t.Error(strings.Join(lines, "\n"))
	}
	h := testHeader(t)
	h.Rules = mustRules(t, "rules: [{name: a, include: [/a/b], severity: info}]")
	b = opened(t, draft(t, h, nil))
	got = compared(t, b, nil, Problem{Name{"disk0", "/a"}, "x"}, Problem{Name{"disk0", "/a/b/c"}, "x"}, Problem{Name{"disk0", "/c"}, "x"})
	if len(got) != 2 || got[0].Severity != Critical || got[0].Rule != "" || got[1].Severity != Info {
		t.Errorf("%v", got)
	}
}

// TestBounded: where there are too many findings the worst are kept, and how many are left out is said.
func TestBounded(t *testing.T) {
	b := opened(t, draft(t, testHeader(t), nil))
	var is []Entry
	for i := range 50 {
		for _, dir := range []string{"all", "bytes", "meta"} {
			is = append(is, entry(fmt.Sprintf("/%s/%d", dir, i), regular))
		}
	}
	c, err := Compare(b, slices.Values(sorted(is)), nil, 60)
	if err != nil || len(c.Findings) != 60 || c.Omitted != 90 {
		t.Fatalf("%d, %d omitted, %v", len(c.Findings), c.Omitted, err)
	}
	count := map[Severity]int{}
	for _, f := range c.Findings {
		count[f.Severity]++
	}
	if count[Critical] != 50 || count[Warning] != 10 || !slices.IsSortedFunc(c.Findings, Finding.Compare) {
		t.Errorf("%v", count)
	}
	if w, ok := c.Worst(); !ok || w != Critical {
		t.Errorf("%v", w)
	}
	if _, err := CompareTouched(b, nil, nil, nil, c, 60); !errors.Is(err, ErrIncomplete) {
		t.Errorf("%v", err)
	}
	if _, err := Compare(b, slices.Values([]Entry{is[1], is[0]}), nil, 60); !errors.Is(err, ErrUnsorted) {
		t.Errorf("%v", err)
	}
}

// TestJSON: a finding comes back as it was, whatever bytes its name has.
func TestJSON(t *testing.T) {
	f := Finding{Changed, Name{"disk0p1", "/\xff\n\"é"}, "all", Warning, "a", "b → c"}
	text, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"kind":"content","rule":"all","severity":"warning","was":"a","is":"b → c","name":"disk0p1:/\\xff\\x0a\"\\xc3\\xa9"}`
	if string(text) != want {
		t.Errorf("%s", text)
	}
	var back Finding
	if err := json.Unmarshal(text, &back); err != nil || back != f {
		t.Errorf("%+v %v", back, err)
	}
	if err := json.Unmarshal([]byte(`{"name":"x"}`), &back); err == nil {
		t.Error("no name")
	}
}

// A history is a guest's files, changed at random.
type history struct {
	rnd      *rand.Rand
	files    map[Name]Entry
	problems map[Name]Problem
}

func (h *history) name() Name {
	dirs := []string{"all", "meta", "bytes", "x", "all/sub"}
	return Name{[]string{"disk0", "disk1"}[h.rnd.IntN(2)], fmt.Sprintf("/%s/%d", dirs[h.rnd.IntN(len(dirs))], h.rnd.IntN(6))}
}

func (h *history) file(n Name) Entry {
	e := entry(n.Path, []uint32{regular, program, setuid, directory, unix.S_IFLNK | 0o777, block}[h.rnd.IntN(6)])
	e.Volume, e.UID = n.Volume, uint32(h.rnd.IntN(2))
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Digest, e.Size = Digest{byte(1 + h.rnd.IntN(2))}, int64(h.rnd.IntN(2))
	case unix.S_IFLNK:
		e.Target = string(rune('a' + h.rnd.IntN(2)))
	case unix.S_IFBLK:
		e.Minor = uint32(h.rnd.IntN(2))
	}
	for _, x := range []string{capability, "security.ima"} {
		if h.rnd.IntN(4) == 0 {
			e.Xattrs = append(e.Xattrs, Xattr{x, string(rune('a' + h.rnd.IntN(2)))})
		}
	}
	return e
}

// step changes some files, and returns which.
func (h *history) step() (touched []Name) {
	for range h.rnd.IntN(5) {
		n := h.name()
		touched = append(touched, n)
		delete(h.problems, n)
		switch h.rnd.IntN(4) {
		case 0:
			delete(h.files, n)
		case 1:
			delete(h.files, n)
			h.problems[n] = Problem{n, "damaged"}
		default:
			h.files[n] = h.file(n)
		}
	}
	if h.rnd.IntN(3) == 0 {
		touched = append(touched, h.name()) // and nothing happened
	}
	return touched
}

func (h *history) lookup(n Name) (Entry, bool) {
	e, ok := h.files[n]
	return e, ok
}

func (h *history) entries() []Entry { return sorted(slices.Collect(maps.Values(h.files))) }

// TestIncremental: over random histories the comparison of what was touched is the full one.
func TestIncremental(t *testing.T) {
	found := 0
	for seed := range uint64(10) {
		h := &history{rand.New(rand.NewPCG(seed, 7)), map[Name]Entry{}, map[Name]Problem{}}
		for range 60 {
			n := h.name()
			h.files[n] = h.file(n)
		}
		header := testHeader(t)
		b := opened(t, draft(t, header, slices.Collect(header.Rules.Kept(slices.Values(h.entries())))))
		if err := b.Check(); err != nil {
			t.Fatal(err)
		}
		last, err := Compare(b, slices.Values(h.entries()), nil, 1000)
		if err != nil || len(last.Findings) != 0 {
			t.Fatalf("at first: %v %v", last.Findings, err)
		}
		for step := range 40 {
			touched := h.step()
			var problems []Problem
			for n, p := range h.problems {
				if slices.Contains(touched, n) {
					problems = append(problems, p)
				}
			}
			got, err := CompareTouched(b, touched, h.lookup, problems, last, 1000)
			if err != nil {
				t.Fatal(err)
			}
			want, err := Compare(b, slices.Values(h.entries()), slices.Collect(maps.Values(h.problems)), 1000)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got.Findings, want.Findings) {
				t.Fatalf("seed %d, step %d:\n%v\nnot\n%v", seed, step, got.Findings, want.Findings)
			}
			if again := slices.CompactFunc(slices.Clone(want.Findings), func(a, b Finding) bool { return a.Compare(b) == 0 }); len(again) != len(want.Findings) {
				t.Fatalf("one kind twice: %v", want.Findings)
			}
			last, found = got, found+len(got.Findings)
		}
	}
	if found < 1000 {
		t.Errorf("only %d findings", found)
	}
}

// TestConfirm: what both snapshots show is confirmed, also if it changed again; what the second alone shows is not.
func TestConfirm(t *testing.T) {
	f := func(k Kind, path, is string) Finding { return Finding{Kind: k, Name: Name{"disk0", path}, Is: is} }
	first := []Finding{f(Changed, "/c", "1"), f(Added, "/b", "1"), f(Attributes, "/c", "1"), f(Added, "/a", "1"), f(Added, "/a", "1")}
	second := []Finding{f(Changed, "/c", "2"), f(Removed, "/d", ""), f(Added, "/a", "1"), f(Changed, "/a", "1")}
	confirmed, withdrawn := Confirm(first, second)
	if want := []Finding{f(Added, "/a", "1"), f(Changed, "/c", "2")}; !slices.Equal(confirmed, want) {
		t.Errorf("confirmed: %v", confirmed)
	}
	if want := []Finding{f(Added, "/b", "1"), f(Attributes, "/c", "1")}; !slices.Equal(withdrawn, want) {
		t.Errorf("withdrawn: %v", withdrawn)
	}
	if want := []Finding{f(Changed, "/a", "1"), f(Removed, "/d", "")}; !slices.Equal(Unconfirmed(first, second), want) {
		t.Errorf("unconfirmed: %v", Unconfirmed(first, second))
	}
	if c, w := Confirm(nil, second); len(c)+len(w) != 0 {
		t.Errorf("%v %v", c, w)
	}
}

// TestAccept: over random histories, accepting all deviating names makes a baseline of which nothing deviates; accepting
// some leaves the others; and Diff finds what was accepted.
func TestAccept(t *testing.T) {
	then := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	for seed := range uint64(30) {
		h := &history{rand.New(rand.NewPCG(seed, 8)), map[Name]Entry{}, map[Name]Problem{}}
		header := testHeader(t)
		for range 40 {
			n := h.name()
			h.files[n] = h.file(n)
		}
		old := opened(t, draft(t, header, slices.Collect(header.Rules.Kept(slices.Values(h.entries())))))
		for range 10 {
			h.step()
		}
		before := compared(t, old, h.entries())
		var some, rest []Name
		for _, f := range before {
			if f.Name.Path[len(f.Name.Path)-1]%2 == 0 {
				some = append(some, f.Name)
			} else {
				rest = append(rest, f.Name)
			}
		}
		var text strings.Builder
		if err := Accept(&text, old, some, h.lookup, then); err != nil {
			t.Fatal(err)
		}
		next := opened(t, []byte(text.String()))
		if err := next.Check(); err != nil || next.Version != 4 || !next.Created.Equal(then) || next.Guest != testGuest {
			t.Fatalf("%v %+v", err, next.Header)
		}
		after := compared(t, next, h.entries())
		for _, f := range after {
			if !slices.Contains(rest, f.Name) {
				t.Fatalf("seed %d: %v was accepted", seed, f)
			}
		}
		diff, err := Diff(old, next, 1000)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range diff.Findings {
			if !slices.Contains(some, f.Name) {
				t.Fatalf("seed %d: %v was not accepted", seed, f)
			}
		}
		var whole strings.Builder
		if err := Accept(&whole, old, append(rest, some...), h.lookup, then); err != nil {
			t.Fatal(err)
		}
		if left := compared(t, opened(t, []byte(whole.String())), h.entries()); len(left) != 0 {
			t.Fatalf("seed %d: %v", seed, left)
		}
		if whole.String() != string(draft(t, old.Next(then), slices.Collect(header.Rules.Kept(slices.Values(h.entries()))))) {
			t.Fatalf("seed %d: not the baseline of a scan", seed)
		}
		if len(before) == 0 || len(some) > 0 && len(diff.Findings) == 0 {
			t.Fatalf("seed %d: %d deviations, %d accepted, %d of them in the diff", seed, len(before), len(some), len(diff.Findings))
		}
	}
}

// TestIgnoredVolume: a volume that cannot be read deviates, unless a rule leaves it out.
func TestIgnoredVolume(t *testing.T) {
	lvm := []Problem{{Name: Name{"disk0p2", "/"}, Text: "LVM is not read"}}
	for text, want := range map[string]int{
		"rules: [{name: programs, include: [/usr/bin], severity: critical}]":                                                                  1,
		"rules: [{name: lvm, include: [/], volumes: [disk0p2], ignore: true}, {name: programs, include: [/usr/bin], severity: critical}]":     0,
		"rules: [{name: another, include: [/], volumes: [disk0p3], ignore: true}, {name: programs, include: [/usr/bin], severity: critical}]": 1,
		"rules: [{name: programs, include: [/usr/bin], volumes: [disk0p1], severity: critical}]":                                              0,
		"rules: [{name: programs, include: [/usr/bin], severity: critical}, {name: lvm, include: [/], volumes: [disk0p2], ignore: true}]":     1,
	} {
		rules, err := ParseRules([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		var file strings.Builder
		h := Header{Guest: "0b5ff3a6-0d8e-4a1c-9c41-0d7b4c2f6a01", Version: 1, Created: time.Unix(1, 0).UTC(), Rules: rules}
		if err := Write(&file, h, slices.Values([]Entry(nil))); err != nil {
			t.Fatal(err)
		}
		b, err := Open([]byte(file.String()))
		if err != nil {
			t.Fatal(err)
		}
		c, err := Compare(b, slices.Values([]Entry(nil)), lvm, 10)
		if err != nil || len(c.Findings) != want {
			t.Errorf("%s: %v, %v", text, c.Findings, err)
		}
	}
}
