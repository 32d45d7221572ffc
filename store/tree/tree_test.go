package tree

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

const (
	guest Domain = 16
	other Domain = 17
	owner Domain = 1
)

// one commits a single request outside any transaction.
func one(t *testing.T, tr *Tree, d Domain, f func(x *Tx) error) error {
	t.Helper()
	x := tr.Direct(d)
	if err := f(x); err != nil {
		return err
	}
	_, err := x.Commit(nil)
	if verr := tr.Verify(); verr != nil {
		t.Fatal(verr)
	}
	return err
}

func put(t *testing.T, tr *Tree, d Domain, path, value string) error {
	t.Helper()
	return one(t, tr, d, func(x *Tx) error { return x.Write(path, []byte(value)) })
}

func rm(t *testing.T, tr *Tree, d Domain, path string) error {
	t.Helper()
	return one(t, tr, d, func(x *Tx) error { return x.Remove(path) })
}

func chmod(t *testing.T, tr *Tree, d Domain, path string, perms ...Perm) error {
	t.Helper()
	return one(t, tr, d, func(x *Tx) error { return x.SetPerms(path, perms) })
}

func get(tr *Tree, d Domain, path string) (string, error) {
	b, err := tr.Direct(d).Read(path)
	return string(b), err
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newTree(t *testing.T) *Tree {
	t.Helper()
	tr := New(Reserved{Match: func(p string) bool { return strings.HasPrefix(p, "/vTPMready") }, Only: owner})
	must(t, put(t, tr, Privileged, "/local/domain/16/device", ""))
	must(t, chmod(t, tr, Privileged, "/local/domain/16/device", Perm{guest, None}))
	return tr
}

func TestOnlyOwnersWrite(t *testing.T) {
	tr := newTree(t)
	for _, c := range []struct {
		d    Domain
		path string
		want error
	}{
		{guest, "/local/domain/16/device/vtpm/0/state", nil},
		{other, "/local/domain/16/device/vtpm/0/state", EACCES},
		{guest, "/local/domain/17/x", EACCES},
		{guest, "/x", EACCES},
		{guest, "/local/domain/16/device/a//b", EINVAL},
		{guest, "/local/domain/16/device/a/", EINVAL},
		{guest, "relative", EINVAL},
		{guest, "/local/domain/16/device/a\x01", EINVAL},
		{Privileged, "/x", nil},
	} {
		if got := put(t, tr, c.d, c.path, "v"); !errors.Is(got, c.want) {
			t.Errorf("domain %d writes %q: %v, want %v", c.d, c.path, got, c.want)
		}
	}
	if _, err := get(tr, other, "/local/domain/16/device/vtpm/0/state"); !errors.Is(err, EACCES) {
		t.Errorf("other guest reads: %v", err)
	}
	if _, err := get(tr, other, "/local/domain/16/device/vtpm/0/nothing"); !errors.Is(err, EACCES) {
		t.Errorf("other guest learns what is missing: %v", err)
	}
}

// TestReservedName: a ready node is the vTPM manager's alone; neither a guest nor the
// privileged domain can forge, change or remove one, in a transaction or outside.
func TestReservedName(t *testing.T) {
	tr := newTree(t)
	for _, d := range []Domain{guest, other, Privileged} {
		if err := put(t, tr, d, "/vTPMready7", ""); !errors.Is(err, EACCES) {
			t.Errorf("domain %d creates the ready node: %v", d, err)
		}
		if err := tr.Begin(d).Write("/vTPMready7/x", nil); !errors.Is(err, EACCES) {
			t.Errorf("domain %d creates the ready node in a transaction: %v", d, err)
		}
	}
	must(t, put(t, tr, owner, "/vTPMready7", "1"))
	for _, d := range []Domain{guest, Privileged} {
		if err := rm(t, tr, d, "/vTPMready7"); !errors.Is(err, EACCES) {
			t.Errorf("domain %d removes the ready node: %v", d, err)
		}
		if err := chmod(t, tr, d, "/vTPMready7", Perm{d, Both}); !errors.Is(err, EACCES) {
			t.Errorf("domain %d takes the ready node over: %v", d, err)
		}
	}
	if err := put(t, tr, owner, "/other", ""); !errors.Is(err, EACCES) {
		t.Errorf("the manager writes elsewhere in the root: %v", err)
	}
	must(t, rm(t, tr, owner, "/vTPMready7"))
}

func TestRemove(t *testing.T) {
	tr := newTree(t)
	if err := rm(t, tr, Privileged, "/nothing"); err != nil {
		t.Errorf("missing node with parent: %v", err)
	}
	if err := rm(t, tr, Privileged, "/nothing/x"); !errors.Is(err, ENOENT) {
		t.Errorf("missing node without parent: %v", err)
	}
	if err := rm(t, tr, Privileged, "/"); !errors.Is(err, EINVAL) {
		t.Errorf("the root: %v", err)
	}
	must(t, rm(t, tr, Privileged, "/local"))
	if len(tr.owned) != 0 {
		t.Errorf("nodes are still counted after their removal: %v", tr.owned)
	}
}

func TestQuota(t *testing.T) {
	const dir = "/local/domain/16/device"
	tr := newTree(t)
	for i := 1; i < MaxNodes; i++ { // the directory itself is the guest's
		must(t, put(t, tr, guest, fmt.Sprintf("%s/n%d", dir, i), ""))
	}
	if err := put(t, tr, guest, dir+"/more", ""); !errors.Is(err, ENOSPC) {
		t.Fatalf("one node too many: %v", err)
	}
	must(t, put(t, tr, guest, dir+"/n1", "still writable"))
	must(t, rm(t, tr, guest, dir+"/n2"))
	if err := put(t, tr, guest, dir+"/a/b", ""); !errors.Is(err, ENOSPC) {
		t.Fatalf("two nodes where one fits: %v", err)
	}
	// Room that a transaction found can be gone at its end.
	x := tr.Begin(guest)
	must(t, x.Write(dir+"/first", nil))
	if err := x.Write(dir+"/second", nil); !errors.Is(err, ENOSPC) {
		t.Fatalf("in a transaction: %v", err)
	}
	must(t, put(t, tr, guest, dir+"/faster", ""))
	if _, err := x.Commit(nil); !errors.Is(err, ENOSPC) {
		t.Fatalf("commit beyond the quota: %v", err)
	}
	if err := put(t, tr, guest, dir+"/n1", string(make([]byte, MaxNodeSize+1))); !errors.Is(err, E2BIG) {
		t.Fatalf("big value: %v", err)
	}
	perms := make([]Perm, MaxPerms+1)
	perms[0].Domain = guest
	if err := chmod(t, tr, guest, dir, perms...); !errors.Is(err, ENOSPC) {
		t.Fatalf("too many permissions: %v", err)
	}
	if err := chmod(t, tr, guest, dir); !errors.Is(err, EINVAL) {
		t.Fatalf("no permissions: %v", err)
	}
	x = tr.Begin(guest)
	var err error
	for i := 0; err == nil; i++ {
		if i > MaxTouched {
			t.Fatal("a guest's transaction grows without bound")
		}
		err = x.Write(dir+"/n1", make([]byte, MaxNodeSize))
	}
	if !errors.Is(err, ENOSPC) {
		t.Fatalf("long transaction: %v", err)
	}
}

// TestPermissions: rights of those named, of those not named, of a target, and who may give
// a node away.
func TestPermissions(t *testing.T) {
	tr := New()
	must(t, put(t, tr, Privileged, "/foo", "v"))
	must(t, chmod(t, tr, Privileged, "/foo", Perm{20, Read}, Perm{21, Write}, Perm{22, Both}, Perm{23, None}))
	for d, want := range map[Domain]Access{Privileged: Both, 20: Both, 21: Write, 22: Both, 23: None, 24: Read} {
		_, rerr := get(tr, d, "/foo")
		werr := put(t, tr, d, "/foo", "v")
		if (rerr == nil) != (want&Read != 0) || (werr == nil) != (want&Write != 0) {
			t.Errorf("domain %d: read %v, write %v", d, rerr, werr)
		}
		if err := chmod(t, tr, d, "/foo", Perm{20, Read}, Perm{21, Write}, Perm{22, Both}, Perm{23, None}); (err == nil) != (d == 20 || d == Privileged) {
			t.Errorf("domain %d sets permissions: %v", d, err)
		}
	}
	if err := chmod(t, tr, 20, "/foo", Perm{21, None}); !errors.Is(err, EACCES) {
		t.Errorf("the owner gives its node away: %v", err)
	}
	must(t, tr.SetDomain(23, Attributes{Target: 20}, nil))
	must(t, put(t, tr, 23, "/foo", "as the target"))
	must(t, put(t, tr, 23, "/foo/child", ""))
	if p, err := tr.Direct(Privileged).Perms("/foo/child"); err != nil || p[0].Domain != 23 {
		t.Errorf("the child's owner: %v %v", p, err)
	}
	must(t, tr.SetDomain(23, Attributes{}, nil))
	if err := put(t, tr, 23, "/foo", ""); !errors.Is(err, EACCES) {
		t.Errorf("after the target was taken: %v", err)
	}
}

// TestFailedPersist: contents that could not be kept never were.
func TestFailedPersist(t *testing.T) {
	tr := newTree(t)
	before := tr.root
	fail := errors.New("disk")
	x := tr.Direct(Privileged)
	must(t, x.Write("/a/b", []byte("v")))
	if _, err := x.Commit(func([]Change) error { return fail }); !errors.Is(err, fail) {
		t.Fatal(err)
	}
	if tr.root != before || tr.Verify() != nil {
		t.Fatal("contents changed")
	}
	if err := tr.SetDomain(20, Attributes{Introduced: true}, func([]Change) error { return fail }); !errors.Is(err, fail) || tr.Domain(20).Introduced {
		t.Fatal("attribute changed")
	}
}

// TestSnapshotSurvivesChanges: what a transaction sees does not move under it, and the
// committed contents do not move with it.
func TestSnapshotSurvivesChanges(t *testing.T) {
	tr := newTree(t)
	must(t, put(t, tr, Privileged, "/a/b", "old"))
	x := tr.Begin(Privileged)
	must(t, x.Write("/a/mine", []byte("m")))
	must(t, put(t, tr, Privileged, "/a/b", "new"))
	must(t, rm(t, tr, Privileged, "/local"))
	if v, err := x.Read("/a/b"); string(v) != "old" || err != nil {
		t.Fatalf("%q %v", v, err)
	}
	if _, err := x.Read("/local/domain"); err != nil {
		t.Fatal(err)
	}
	if _, err := get(tr, Privileged, "/a/mine"); !errors.Is(err, ENOENT) {
		t.Fatalf("an open transaction shows: %v", err)
	}
	if _, err := x.Commit(nil); !errors.Is(err, EAGAIN) {
		t.Fatal(err)
	}
}

func FuzzParsePerm(f *testing.F) {
	f.Add("r0")
	f.Add("b4294967295")
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := ParsePerm(s); err == nil && p.String() != s {
			t.Fatalf("%q reads as %v", s, p)
		}
	})
}
