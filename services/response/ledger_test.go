package response

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"redoubt.dev/redoubt/ipc/rpc"
)

const (
	web = "6a5e5b6c-0000-4000-8000-000000000001"
	db  = "6a5e5b6c-0000-4000-8000-000000000002"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 500, time.FixedZone("CET", 3600))

func quarantined(name string) Record {
	return Record{Name: name, Tenant: "acme", Quarantined: true, Reason: `<setuid> & "more"`, Since: noon, By: "validation v3"}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, path string) *Ledger {
	t.Helper()
	l, err := Open(path)
	must(t, err)
	return l
}

func set(t *testing.T, l *Ledger, uuid string, r Record) {
	t.Helper()
	must(t, l.Change(uuid, func(now *Record) { *now = r }))
}

// What is in force is so after the next Open, until it is released or its guest is gone.
func TestLedger(t *testing.T) {
	path := filepath.Join(t.TempDir(), LedgerFile)
	l := open(t, path)
	if _, ok := l.Get(web); ok || len(l.All()) != 0 {
		t.Error("something is in force at the beginning")
	}
	set(t, l, web, quarantined("web"))
	set(t, l, db, quarantined("db"))
	must(t, l.Change(web, func(r *Record) {
		if !r.Quarantined {
			t.Error("Change was not given what is in force")
		}
		r.Revoked, r.By, r.Since = true, "operator 0", time.Now()
	}))
	for _, l := range []*Ledger{l, open(t, path)} {
		r, ok := l.Get(web)
		if !ok || !r.Revoked || !r.Quarantined || r.Paused || r.By != "operator 0" || r.Since.Location() != time.UTC {
			t.Errorf("%v, %+v", ok, r)
		}
		if r, _ := l.Get(db); !r.Since.Equal(noon) || r.Reason != quarantined("").Reason {
			t.Errorf("%+v", r)
		}
		if all := l.All(); len(all) != 2 || all[0].UUID != db || all[1].Name != "web" {
			t.Errorf("%+v", all)
		}
	}
	if now := open(t, path); !reflect.DeepEqual(l.guests, now.guests) {
		t.Errorf("%+v was read back as %+v", l.guests, now.guests)
	}
	must(t, l.Change(db, func(r *Record) { r.Quarantined = false }))
	must(t, l.Change(db, func(*Record) {})) // nothing is in force, nothing is written
	if _, ok := open(t, path).Get(db); ok {
		t.Error("one that was released is still there")
	}
	must(t, l.Remove(web))
	must(t, l.Remove(web))
	if all := open(t, path).All(); len(all) != 0 {
		t.Errorf("%+v", all)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

// What cannot be meant, or not be written, is not in force.
func TestRefused(t *testing.T) {
	dir := t.TempDir()
	l := open(t, filepath.Join(dir, LedgerFile))
	set(t, l, web, quarantined("web"))
	for name, change := range map[string]func(*Record){
		"no name":            func(r *Record) { r.Name = "" },
		"a path":             func(r *Record) { r.Tenant = "../x" },
		"two lines":          func(r *Record) { r.Reason = "a\nb" },
		"a terminal's codes": func(r *Record) { r.By = "\x1b[2J" },
		"no UTF-8":           func(r *Record) { r.Reason = "\xff" },
		"a long reason":      func(r *Record) { r.Reason = strings.Repeat("a", MaxReason+1) },
		"nobody":             func(r *Record) { r.By = "" },
		"no time":            func(r *Record) { r.Since = time.Time{} },
		"a far time":         func(r *Record) { r.Since = time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC) },
	} {
		err := l.Change(web, func(r *Record) { r.Paused = true; change(r) })
		if r, _ := l.Get(web); rpc.KindOf(err) != rpc.Invalid || r.Paused {
			t.Errorf("%s: %v, %+v", name, err, r)
		}
	}
	for _, id := range []string{"", "web", strings.ToUpper(web), "{" + web + "}", "urn:uuid:" + web, strings.ReplaceAll(web, "-", "")} {
		if err := l.Change(id, func(r *Record) { *r = quarantined("web") }); rpc.KindOf(err) != rpc.Invalid {
			t.Errorf("%q: %v", id, err)
		}
	}
	must(t, os.Rename(dir, dir+".away"))
	t.Cleanup(func() { must(t, os.RemoveAll(dir+".away")) })
	if l.Change(web, func(r *Record) { r.Quarantined = false }) == nil || l.Remove(web) == nil {
		t.Error("a change without a disk was taken")
	}
	if l.Change(db, func(r *Record) { *r = quarantined("db") }) == nil {
		t.Error("a record without a disk was taken")
	}
	if r, _ := l.Get(web); !r.Quarantined || len(l.All()) != 1 {
		t.Errorf("what could not be written is in force: %+v", l.All())
	}
}

// A damaged file is refused with its path, the place and what to do, and left as it is.
func TestDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), LedgerFile)
	l := open(t, path)
	set(t, l, web, quarantined("web"))
	good, err := os.ReadFile(path)
	must(t, err)
	swap := func(from, to string) []byte {
		if !bytes.Contains(good, []byte(from)) {
			t.Fatalf("%q is not in the file", from)
		}
		return bytes.Replace(good, []byte(from), []byte(to), 1)
	}
	for name, bad := range map[string][]byte{
		"empty":                 nil,
		"half":                  good[:len(good)/2],
		"nothing":               []byte("{}"),
		"null":                  []byte("null\n"),
		"no guests":             []byte("{\n  \"version\": 1,\n  \"guests\": null\n}\n"),
		"another version":       swap(`"version": 1`, `"version": 2`),
		"another name":          swap(`"quarantined"`, `"quarantimed"`),
		"another case":          swap(`"quarantined"`, `"Quarantined"`),
		"twice":                 swap(`"quarantined": true`, `"quarantined": false, "quarantined": true`),
		"nothing in force":      swap("      \"quarantined\": true,\n", ""),
		"something behind":      append(bytes.Clone(good), '{'),
		"a guest without UUID":  swap(web, "web"),
		"a guest without name":  swap(`"name": "web"`, `"name": "WEB"`),
		"another form of UUID":  swap(web, strings.ToUpper(web)),
		"another form of time":  swap("Z\"", "+00:00\""),
		"another form of text":  swap("<setuid>", `\u003csetuid>`),
		"more than it may hold": bytes.Repeat([]byte{' '}, maxFile+1),
	} {
		must(t, os.WriteFile(path, bad, 0o600))
		_, err := Open(path)
		if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "backup") {
			t.Errorf("%s: %v", name, err)
		}
		if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, bad) {
			t.Errorf("%s: the file was changed", name)
		}
	}
	must(t, os.Remove(path))
	must(t, os.Mkdir(path, 0o700))
	if _, err := Open(path); err == nil {
		t.Error("a directory was taken")
	}
}

// As many guests as may be, each with the longest record, are read back; one more is refused.
func TestMostGuests(t *testing.T) {
	path := filepath.Join(t.TempDir(), LedgerFile)
	l := open(t, path)
	longest := Record{
		Name: strings.Repeat("n", 63), Tenant: strings.Repeat("t", 63), Quarantined: true, Paused: true, Revoked: true, DevicesDropped: true,
		Reason: strings.Repeat(`"`, MaxReason), Since: noon, By: strings.Repeat(`\`, MaxBy),
	}
	id := func(i int) string { return fmt.Sprintf("6a5e5b6c-0000-4000-8000-%012x", i) }
	utc := longest
	utc.Since = noon.UTC()
	for i := range MaxGuests - 1 { // in memory: writing each would take minutes
		l.guests[id(i)] = utc
	}
	set(t, l, id(MaxGuests-1), longest)
	if err := l.Change(id(MaxGuests), func(r *Record) { *r = longest }); rpc.KindOf(err) != rpc.Unavailable {
		t.Errorf("one more: %v", err)
	}
	if n := len(open(t, path).All()); n != MaxGuests {
		t.Errorf("%d guests were read back", n)
	}
}

// Changes at the same time are all there.
func TestConcurrently(t *testing.T) {
	path := filepath.Join(t.TempDir(), LedgerFile)
	l := open(t, path)
	set(t, l, web, quarantined("web"))
	var all sync.WaitGroup
	for _, change := range []func(*Record){
		func(r *Record) { r.Paused = true }, func(r *Record) { r.Revoked = true }, func(r *Record) { r.DevicesDropped = true },
	} {
		all.Go(func() {
			if err := l.Change(web, change); err != nil {
				t.Error(err)
			}
			l.Get(web)
			l.All()
		})
	}
	all.Wait()
	if r, _ := open(t, path).Get(web); !r.Paused || !r.Revoked || !r.DevicesDropped {
		t.Errorf("%+v", r)
	}
}

// FuzzParse: what is taken is what was written, byte by byte, and can be written again.
func FuzzParse(f *testing.F) {
	r := quarantined("web")
	r.Since = r.Since.UTC()
	for _, guests := range []map[string]Record{{}, {web: r}, {web: r, db: {Name: "db", Tenant: "a", Revoked: true, Since: r.Since, By: "operator 0"}}} {
		b, err := encode(guests)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		guests, err := parse(b)
		if err != nil {
			return
		}
		for id, r := range guests {
			if checkUUID(id) != nil || r.check() != nil || !r.InForce() {
				t.Fatalf("%q, %+v was taken", id, r)
			}
		}
		if again, err := encode(guests); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%q was written as %q, %v", b, again, err)
		}
	})
}
