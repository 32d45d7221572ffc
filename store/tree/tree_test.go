package tree

import (
	"errors"
	"strings"
	"testing"
)

const (
	guest Domain = 16
	other Domain = 17
	owner Domain = 1
)

func newTree(t *testing.T) *Tree {
	t.Helper()
	tr := New(Reserved{Match: func(p string) bool { return strings.HasPrefix(p, "/vTPMready") }, Only: owner})
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(tr.Mkdir(Privileged, "/local/domain/16/device"))
	must(tr.SetPerms(Privileged, "/local/domain/16/device", []Perm{{guest, None}}))
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
		if got := tr.Write(c.d, c.path, []byte("v")); !errors.Is(got, c.want) {
			t.Errorf("domain %d writes %q: %v, want %v", c.d, c.path, got, c.want)
		}
	}
	if _, err := tr.Read(other, "/local/domain/16/device/vtpm/0/state"); !errors.Is(err, EACCES) {
		t.Errorf("other guest reads: %v", err)
	}
	if _, err := tr.Read(other, "/local/domain/16/device/vtpm/0/nothing"); !errors.Is(err, EACCES) {
		t.Errorf("other guest learns what is missing: %v", err)
	}
}

// TestReservedName: a ready node is the vTPM manager's alone; neither a guest nor the
// privileged domain can forge, change or remove one.
func TestReservedName(t *testing.T) {
	tr := newTree(t)
	for _, d := range []Domain{guest, other, Privileged} {
		if err := tr.Write(d, "/vTPMready7", nil); !errors.Is(err, EACCES) {
			t.Errorf("domain %d creates the ready node: %v", d, err)
		}
	}
	if err := tr.Write(owner, "/vTPMready7", []byte("1")); err != nil {
		t.Fatal(err)
	}
	for _, d := range []Domain{guest, Privileged} {
		if err := tr.Remove(d, "/vTPMready7"); !errors.Is(err, EACCES) {
			t.Errorf("domain %d removes the ready node: %v", d, err)
		}
		if err := tr.SetPerms(d, "/vTPMready7", []Perm{{d, Both}}); !errors.Is(err, EACCES) {
			t.Errorf("domain %d takes the ready node over: %v", d, err)
		}
	}
	if err := tr.Write(owner, "/other", nil); !errors.Is(err, EACCES) {
		t.Errorf("the manager writes elsewhere in the root: %v", err)
	}
	if err := tr.Remove(owner, "/vTPMready7"); err != nil {
		t.Fatal(err)
	}
}

func TestRemove(t *testing.T) {
	tr := newTree(t)
	if err := tr.Remove(Privileged, "/nothing"); err != nil {
		t.Errorf("missing node with parent: %v", err)
	}
	if err := tr.Remove(Privileged, "/nothing/x"); !errors.Is(err, ENOENT) {
		t.Errorf("missing node without parent: %v", err)
	}
	if err := tr.Remove(Privileged, "/local"); err != nil {
		t.Fatal(err)
	}
	if len(tr.owned) != 0 {
		t.Errorf("nodes are still counted after their removal: %v", tr.owned)
	}
}

func TestQuota(t *testing.T) {
	tr := newTree(t)
	var err error
	for i := 0; err == nil; i++ {
		if i > MaxNodes {
			t.Fatal("no quota")
		}
		err = tr.Mkdir(guest, "/local/domain/16/device/n"+Perm{Domain(i), None}.String()[1:])
	}
	if !errors.Is(err, ENOSPC) {
		t.Fatalf("over quota: %v", err)
	}
	if err := tr.Write(guest, "/local/domain/16/device/n0", make([]byte, MaxNodeSize+1)); !errors.Is(err, E2BIG) {
		t.Fatalf("big value: %v", err)
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
