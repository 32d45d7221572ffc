package scan

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"redoubt.dev/redoubt/validation/baseline"
)

// FuzzOpenIndex opens indexes that anybody may have made, and uses those that open: nothing may crash or run for ever, and the entries
// are in their order and found.
func FuzzOpenIndex(f *testing.F) {
	tree := f.TempDir()
	for _, p := range []string{"a", "b/c", "b-d", "b/e/f"} {
		put(f, filepath.Join(tree, p), []byte(p))
	}
	if err := os.Symlink("b", filepath.Join(tree, "link")); err != nil {
		f.Fatal(err)
	}
	image := filepath.Join(f.TempDir(), "fs.img")
	must(f, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-O", "^has_journal", "-d", tree, image, "1M")
	debugfs(f, image, "ea_set /a security.ima abc")
	disk := load(f, image)
	encoded := scanImage(f, disk, nil, nil).Index.Bytes()
	f.Add(encoded, []byte{})
	f.Add(encoded[:headerSize], []byte{1, 2, 3, 4})
	f.Fuzz(func(t *testing.T, b, patches []byte) {
		b = bytes.Clone(b)
		for ; len(patches) >= 3 && len(b) > 0; patches = patches[3:] {
			b[int(binary.LittleEndian.Uint16(patches))%len(b)] = patches[2]
		}
		x, err := Open(b)
		if err != nil {
			if !errors.Is(err, ErrIndex) {
				t.Fatal(err)
			}
			return
		}
		var last baseline.Name
		count, names := 0, 0
		for _, v := range x.volumes {
			names += v.nameCount()
		}
		for e := range x.All() {
			if count++; count > 1 && last.Compare(e.Name) >= 0 || count > names {
				t.Fatalf("%v after %v", e.Name, last)
			}
			if l, ok := x.Lookup(e.Name); !ok || !sameEntry(&l, &e) {
				t.Fatalf("%v is not found", e.Name)
			}
			last = e.Name
		}
		c := changesOf(disk, disk, 4096, nil)
		c.Bits[0] = 0xffff
		s := []Source{{Reader: bytes.NewReader(disk), Size: int64(len(disk)), Changed: c}}
		r, err := Run(context.Background(), s, x.Rules(), rules{}, x, Options{MaxMemory: 16 << 20})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Open(r.Index.Bytes()); err != nil {
			t.Fatal(err)
		}
	})
}
