package tree

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestConflicts: a transaction fails exactly when something it read or wrote has changed
// meanwhile.
func TestConflicts(t *testing.T) {
	read := func(p string) func(*Tx) error { return func(x *Tx) error { _, err := x.Read(p); return err } }
	miss := func(p string) func(*Tx) error {
		return func(x *Tx) error {
			if _, err := x.Read(p); !errors.Is(err, ENOENT) {
				return fmt.Errorf("read: %w", err)
			}
			return nil
		}
	}
	list := func(p string) func(*Tx) error { return func(x *Tx) error { _, _, err := x.List(p); return err } }
	perms := func(p string) func(*Tx) error { return func(x *Tx) error { _, err := x.Perms(p); return err } }
	set := func(p string) func(*Tx) error { return func(x *Tx) error { return x.Write(p, []byte("new")) } }
	mk := func(p string) func(*Tx) error { return func(x *Tx) error { return x.Mkdir(p) } }
	del := func(p string) func(*Tx) error { return func(x *Tx) error { return x.Remove(p) } }
	ch := func(p string) func(*Tx) error {
		return func(x *Tx) error { return x.SetPerms(p, []Perm{{Privileged, Both}}) }
	}
	for _, c := range []struct {
		name      string
		tx, other []func(*Tx) error
		conflict  bool
	}{
		{"nothing", nil, []func(*Tx) error{set("/a")}, false},
		{"read, written", []func(*Tx) error{read("/a")}, []func(*Tx) error{set("/a")}, true},
		{"read, written as before", []func(*Tx) error{read("/a")}, []func(*Tx) error{func(x *Tx) error { return x.Write("/a", []byte("a")) }}, true},
		{"read, another written", []func(*Tx) error{read("/a")}, []func(*Tx) error{set("/b"), set("/a/b"), set("/a/new")}, false},
		{"read, permissions changed", []func(*Tx) error{read("/a")}, []func(*Tx) error{ch("/a")}, true},
		{"permissions read, value written", []func(*Tx) error{perms("/a")}, []func(*Tx) error{set("/a")}, false},
		{"read, removed", []func(*Tx) error{read("/a/b")}, []func(*Tx) error{del("/a")}, true},
		{"read, removed and made again", []func(*Tx) error{read("/a/b")}, []func(*Tx) error{del("/a/b"), set("/a/b")}, true},
		{"missing, made", []func(*Tx) error{miss("/n/x")}, []func(*Tx) error{set("/n/x")}, true},
		{"missing, another made", []func(*Tx) error{miss("/n")}, []func(*Tx) error{set("/m")}, false},
		{"written, written", []func(*Tx) error{set("/a")}, []func(*Tx) error{set("/a")}, true},
		{"made, made", []func(*Tx) error{set("/n")}, []func(*Tx) error{set("/n")}, true},
		{"made, a sibling made", []func(*Tx) error{set("/a/x/1")}, []func(*Tx) error{set("/a/y/1")}, false},
		{"made, the parent's value written", []func(*Tx) error{set("/a/x")}, []func(*Tx) error{set("/a")}, false},
		{"made, the parent removed", []func(*Tx) error{set("/a/x")}, []func(*Tx) error{del("/a")}, true},
		{"directory there, its value written", []func(*Tx) error{mk("/a")}, []func(*Tx) error{set("/a")}, false},
		{"listed, a child written", []func(*Tx) error{list("/a")}, []func(*Tx) error{set("/a/b")}, false},
		{"listed, a child made", []func(*Tx) error{list("/a")}, []func(*Tx) error{set("/a/c")}, true},
		{"listed, a child removed", []func(*Tx) error{list("/a")}, []func(*Tx) error{del("/a/b")}, true},
		{"listed, a grandchild made", []func(*Tx) error{list("/a")}, []func(*Tx) error{set("/a/b/c")}, false},
		{"removed, changed beneath", []func(*Tx) error{del("/a")}, []func(*Tx) error{set("/a/b")}, true},
		{"removed, a sibling removed", []func(*Tx) error{del("/a/b")}, []func(*Tx) error{del("/b")}, false},
		{"written and listed what it made itself", []func(*Tx) error{set("/n/x"), list("/n"), read("/n/x"), del("/n/x")}, []func(*Tx) error{set("/b")}, false},
		{"permissions set, value written", []func(*Tx) error{ch("/a")}, []func(*Tx) error{set("/a")}, false},
		{"permissions set twice", []func(*Tx) error{ch("/a")}, []func(*Tx) error{ch("/a")}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			tr := New()
			must(t, put(t, tr, Privileged, "/a", "a"))
			must(t, put(t, tr, Privileged, "/a/b", "b"))
			must(t, put(t, tr, Privileged, "/b", "b"))
			x := tr.Begin(Privileged)
			for _, f := range c.tx {
				must(t, f(x))
			}
			for _, f := range c.other {
				must(t, one(t, tr, Privileged, f))
			}
			_, err := x.Commit(nil)
			if c.conflict != errors.Is(err, EAGAIN) || (!c.conflict && err != nil) {
				t.Fatalf("commit: %v", err)
			}
			must(t, tr.Verify())
		})
	}
}

// model is a store as simple as can be: what the tree must agree with.
type model map[string]string

func (m model) write(p, v string) {
	for q := parentOf(p); q != "/"; q = parentOf(q) {
		if _, ok := m[q]; !ok {
			m[q] = ""
		}
	}
	m[p] = v
}

func (m model) remove(p string) {
	maps.DeleteFunc(m, func(k, _ string) bool { return k == p || len(k) > len(p) && k[:len(p)+1] == p+"/" })
}

// TestSerializable: of many transactions that run at once, those that commit are worth their
// sequence: repeated one after another on a simple map, in commit order, every read gives what
// it gave and the end is the same. What was kept makes the same contents again.
func TestSerializable(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	paths := []string{"/a", "/a/b", "/a/b/c", "/a/d", "/e", "/e/f"}
	tr, m, kept := New(), model{}, map[string]Change{}
	persist := func(cs []Change) error {
		for _, c := range cs {
			if kept[c.Path] = c; c.Removed {
				delete(kept, c.Path)
			}
		}
		return nil
	}
	type step struct {
		write, remove bool
		path, value   string
		err           error
	}
	type running struct {
		x     *Tx
		steps []step
	}
	var open []*running
	committed, aborted := 0, 0
	for i := range 20000 {
		if len(open) < 4 {
			open = append(open, &running{x: tr.Begin(Privileged)})
		}
		k := rng.IntN(len(open))
		r := open[k]
		s := step{path: paths[rng.IntN(len(paths))]}
		switch rng.IntN(8) {
		case 0, 1:
			s.write, s.value = true, fmt.Sprint(i)
			s.err = r.x.Write(s.path, []byte(s.value))
		case 2:
			s.remove = true
			s.err = r.x.Remove(s.path)
		case 3:
			open = slices.Delete(open, k, k+1)
			if rng.IntN(20) == 0 {
				r.x.Renew()
			}
			if _, err := r.x.Commit(persist); errors.Is(err, EAGAIN) {
				aborted++
				continue
			} else if err != nil {
				t.Fatal(err)
			}
			committed++
			for _, s := range r.steps {
				switch {
				case s.write:
					m.write(s.path, s.value)
				case s.remove:
					m.remove(s.path)
				default:
					if v, ok := m[s.path]; ok != (s.err == nil) || v != s.value {
						t.Fatalf("step %d: %s read %q (%v), in sequence it is %q", i, s.path, s.value, s.err, v)
					}
				}
			}
			must(t, tr.Verify())
			continue
		default:
			v, err := r.x.Read(s.path)
			s.value, s.err = string(v), err
		}
		r.steps = append(r.steps, s)
	}
	if committed < 100 || aborted < 100 {
		t.Fatalf("%d committed, %d aborted: nothing was tried", committed, aborted)
	}
	again := New()
	for _, p := range slices.Sorted(maps.Keys(kept)) {
		must(t, again.Load(kept[p]))
	}
	for _, x := range []*Tree{tr, again} {
		have := model{}
		x.All(func(c Change) bool {
			if c.Path != "/" {
				have[c.Path] = string(c.Value)
			}
			return true
		})
		if !maps.Equal(have, m) {
			t.Fatalf("contents %v, want %v", have, m)
		}
		must(t, x.Verify())
	}
}

// TestVisible: who is told of a change, and that a removal is told to who could read the node.
func TestVisible(t *testing.T) {
	tr := New()
	must(t, chmod(t, tr, Privileged, "/", Perm{Privileged, None}))
	must(t, put(t, tr, Privileged, "/secret/open", ""))
	must(t, chmod(t, tr, Privileged, "/secret/open", Perm{Privileged, None}, Perm{guest, Read}))
	x := tr.Direct(Privileged)
	must(t, x.Remove("/secret"))
	e, err := x.Commit(nil)
	must(t, err)
	for _, c := range []struct {
		d    Domain
		path string
		want bool
	}{
		{guest, "/secret/open", true},
		{guest, "/secret", false},
		{other, "/secret/open", false},
		{Privileged, "/secret", true},
		{guest, "/secret/never", false},
	} {
		if got := e.Visible(c.d, c.path); got != c.want {
			t.Errorf("domain %d hears of %s: %t", c.d, c.path, got)
		}
	}
}
