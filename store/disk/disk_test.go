package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"

	"redoubt.dev/redoubt/store/tree"
)

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func open(tb testing.TB, dir string) (*DB, *tree.Tree, error) {
	tb.Helper()
	f, err := os.Open(dir)
	must(tb, err)
	defer f.Close()
	t := tree.New()
	d, err := Open(f, t)
	return d, t, err
}

func contents(t *tree.Tree) map[string]string {
	m := map[string]string{}
	t.All(func(c tree.Change) bool {
		m[c.Path] = fmt.Sprint(c.Perms, string(c.Value))
		return true
	})
	return m
}

func commit(tb testing.TB, d *DB, t *tree.Tree, f func(x *tree.Tx) error) {
	tb.Helper()
	x := t.Direct(tree.Privileged)
	must(tb, f(x))
	_, err := x.Commit(d.Keep)
	must(tb, err)
}

// TestKept: whatever was committed is there again: values, permissions, removals, attributes.
func TestKept(t *testing.T) {
	dir := t.TempDir()
	d, tr, err := open(t, dir)
	must(t, err)
	commit(t, d, tr, func(x *tree.Tx) error { return x.Write("/a/b-c", []byte("v")) })
	commit(t, d, tr, func(x *tree.Tx) error { return x.Write("/a/b/c", []byte{0, 255}) })
	commit(t, d, tr, func(x *tree.Tx) error { return x.Write("/a/b@/c", nil) })
	commit(t, d, tr, func(x *tree.Tx) error { return x.Write("/gone/x/y", nil) })
	commit(t, d, tr, func(x *tree.Tx) error { return x.Remove("/gone") })
	commit(t, d, tr, func(x *tree.Tx) error { return x.Write("/", []byte("root")) })
	commit(t, d, tr, func(x *tree.Tx) error {
		return x.SetPerms("/a/b", []tree.Perm{{Domain: 16, Access: tree.Both}, {Domain: 1 << 30, Access: tree.Write}})
	})
	must(t, tr.SetDomain(20, tree.Attributes{Introduced: true, Target: 21}, d.Keep))
	must(t, tr.SetDomain(22, tree.Attributes{Introduced: true}, d.Keep))
	must(t, tr.SetDomain(22, tree.Attributes{}, d.Keep))
	must(t, tr.SetSpecialPerms(tree.Privileged, tree.ReleaseDomain, []tree.Perm{{Domain: 0}, {Domain: 20, Access: tree.Read}}, d.Keep))
	want := contents(tr)
	if _, _, err := open(t, dir); !errors.Is(err, ErrInUse) {
		t.Fatalf("opened twice: %v", err)
	}
	must(t, d.Close())
	d, again, err := open(t, dir)
	must(t, err)
	defer func() { must(t, d.Close()) }()
	if got := contents(again); !maps.Equal(got, want) {
		t.Fatalf("contents\n%v\nwant\n%v", got, want)
	}
	must(t, again.Verify())
	if again.Domain(20) != (tree.Attributes{Introduced: true, Target: 21}) {
		t.Fatal(again.Domain(20))
	}
}

// TestDamaged: a file that does not check out is refused with the reason and stays as it is.
func TestDamaged(t *testing.T) {
	make := func(t *testing.T) (string, []byte) {
		dir := t.TempDir()
		d, tr, err := open(t, dir)
		must(t, err)
		for i := range 200 {
			commit(t, d, tr, func(x *tree.Tx) error { return x.Write(fmt.Sprintf("/a/%d", i), bytes.Repeat([]byte{'x'}, 100)) })
		}
		must(t, d.Close())
		b, err := os.ReadFile(filepath.Join(dir, File))
		must(t, err)
		return dir, b
	}
	edit := func(f func(tx *bolt.Tx) error) func(t *testing.T, path string, b []byte) {
		return func(t *testing.T, path string, _ []byte) {
			db, err := bolt.Open(path, 0o600, nil)
			must(t, err)
			must(t, db.Update(f))
			must(t, db.Close())
		}
	}
	put := func(k string, v []byte) func(t *testing.T, path string, b []byte) {
		return edit(func(tx *bolt.Tx) error { return tx.Bucket(nodesBucket).Put([]byte(k), v) })
	}
	overwrite := func(f func(b []byte) []byte) func(t *testing.T, path string, b []byte) {
		return func(t *testing.T, path string, b []byte) { must(t, os.WriteFile(path, f(b), 0o600)) }
	}
	sum := func(k string, b ...byte) func(t *testing.T, path string, b []byte) {
		return put(k, append(binary.LittleEndian.AppendUint32(nil, checksum(k, b)), b...))
	}
	perm := []byte{1, 0, 0, 0, 0, 0, 3}
	for name, damage := range map[string]func(t *testing.T, path string, b []byte){
		"text":            overwrite(func([]byte) []byte { return []byte("hello") }),
		"zeros":           overwrite(func(b []byte) []byte { return make2(len(b)) }),
		"one root":        overwrite(func(b []byte) []byte { b[4096+40] ^= 1; return b }),
		"both roots":      overwrite(func(b []byte) []byte { b[100] ^= 1; b[40] ^= 1; b[4096+40] ^= 1; return b }),
		"pages":           overwrite(func(b []byte) []byte { copy(b[8192:], make2(len(b)-8192)); return b }),
		"empty":           overwrite(func(b []byte) []byte { return nil }),
		"a flipped value": overwrite(func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("xxxxx"), []byte("xxxyx")) }),
		"a wild page": overwrite(func(b []byte) []byte { // a branch that leads out of the file
			for at := 8192; at < len(b); at += 4096 {
				if b[at+8] == 1 { // branch pages
					for i := at + 16; i < at+16+16*int(b[at+10]); i += 16 {
						b[i+8+3] = 0x7f
					}
				}
			}
			return b
		}),
		"no checksum":     put("/x", []byte{1, 2, 3, 4, 1, 0, 0, 0, 0, 0, 3}),
		"cut":             overwrite(func(b []byte) []byte { return b[:8192+4096] }),
		"another program": edit(func(tx *bolt.Tx) error { must(t, tx.DeleteBucket(formatBucket)); return nil }),
		"another format":  edit(func(tx *bolt.Tx) error { return tx.Bucket(formatBucket).Put(versionKey, []byte("2")) }),
		"no nodes":        edit(func(tx *bolt.Tx) error { return tx.DeleteBucket(nodesBucket) }),
		"a lost record":   edit(func(tx *bolt.Tx) error { return tx.Bucket(nodesBucket).Delete([]byte("/a/7")) }),
		"no parent":       sum("/x/y", perm...),
		"no path":         sum("/x//y", perm...),
		"no permissions":  sum("/x", 0, 0),
		"half a value":    sum("/x", 9, 0, 1),
		"bad access":      sum("/x", 1, 0, 0, 0, 0, 0, 7),
		"bad domain":      sum("@domain/x", perm...),
	} {
		t.Run(name, func(t *testing.T) {
			dir, b := make(t)
			path := filepath.Join(dir, File)
			damage(t, path, b)
			before, err := os.ReadFile(path)
			must(t, err)
			_, _, err = open(t, dir)
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("opened: %v", err)
			}
			t.Log(err)
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
				t.Fatalf("the file was changed (%v)", err)
			}
		})
	}
}

func make2(n int) []byte { return make([]byte, n) }

func FuzzDecode(f *testing.F) {
	f.Add(encode(tree.Change{Path: "/k", Value: []byte("v"), Perms: []tree.Perm{{Domain: 1, Access: tree.Both}}}))
	f.Add([]byte{255, 255, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := decode("/k", b); err == nil && !bytes.Equal(encode(c), b) {
			t.Fatalf("%x reads as %v", b, c)
		}
	})
}

// FuzzParse: whatever a file holds, it is refused or makes contents that hold together.
func FuzzParse(f *testing.F) {
	dir := f.TempDir()
	d, tr, err := open(f, dir)
	must(f, err)
	for i := range 60 {
		commit(f, d, tr, func(x *tree.Tx) error { return x.Write(fmt.Sprintf("/a/%d", i), bytes.Repeat([]byte{'x'}, 90)) })
	}
	must(f, d.Close())
	good, err := os.ReadFile(filepath.Join(dir, File))
	must(f, err)
	// Where to damage the good file, and with what.
	f.Add([]byte{0, 0, 0, 0})
	for page := range len(good) / 4096 {
		f.Add([]byte{byte(page), 0, 10, 0xff})
	}
	f.Fuzz(func(t *testing.T, edits []byte) {
		b := bytes.Clone(good)
		for ; len(edits) >= 4; edits = edits[4:] {
			b[(int(edits[0])*4096+int(edits[1])<<8+int(edits[2]))%len(b)] = edits[3]
		}
		tr := tree.New()
		if err := read(b, tr); err == nil {
			if err := tr.Verify(); err != nil {
				t.Fatal(err)
			}
		}
		_ = read(edits, tree.New())
	})
}

func BenchmarkKeep(b *testing.B) {
	d, tr, err := open(b, b.TempDir())
	must(b, err)
	defer func() { must(b, d.Close()) }()
	for i := range 1000 {
		commit(b, d, tr, func(x *tree.Tx) error { return x.Write(fmt.Sprintf("/local/domain/%d/state", i), []byte("1")) })
	}
	b.ResetTimer()
	for i := range b.N {
		commit(b, d, tr, func(x *tree.Tx) error {
			return x.Write(fmt.Sprintf("/local/domain/%d/state", i%1000), []byte("4"))
		})
	}
}

// TestRandomDamage: whatever is done to some bytes, the file is refused or means what it meant.
func TestRandomDamage(t *testing.T) {
	dir := t.TempDir()
	d, tr, err := open(t, dir)
	must(t, err)
	for i := range 120 {
		commit(t, d, tr, func(x *tree.Tx) error {
			return x.Write(fmt.Sprintf("/a/%d", i), bytes.Repeat([]byte{'x'}, 100))
		})
	}
	must(t, d.Close())
	path := filepath.Join(dir, File)
	good, err := os.ReadFile(path)
	must(t, err)
	want := contents(tr)
	rng := rand.New(rand.NewPCG(7, 7))
	refused := 0
	for range 400 {
		b := bytes.Clone(good)
		for range 1 + rng.IntN(8) {
			at := rng.IntN(len(b) - 8)
			if rng.IntN(2) == 0 { // where the structure is
				at = at/4096*4096 + rng.IntN(200)
			}
			b[at] = byte(rng.Uint32())
		}
		must(t, os.WriteFile(path, b, 0o600))
		d, got, err := open(t, dir)
		if err != nil {
			if refused++; !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			continue
		}
		must(t, d.Close())
		if !maps.Equal(contents(got), want) {
			t.Fatal("taken for good with other contents")
		}
	}
	if refused < 20 {
		t.Fatalf("%d refused", refused)
	}
}
