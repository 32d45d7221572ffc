package crossview

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/ext4"
)

// BenchmarkSeen is what it takes to hold a file system of 20,000 files to a listing, and beside it what it takes to go through its
// names and inodes.
func BenchmarkSeen(b *testing.B) {
	files := map[string]string{}
	for i := range 20_000 {
		files[fmt.Sprintf("usr/lib/d%d/f%d", i%500, i)] = "x"
	}
	r := newRoot(b, files, "128M")
	listing := []byte(strings.Join(r.listing, "\x00") + "\x00")
	image, err := os.Open(r.image)
	must(b, err)
	defer image.Close()
	st, err := image.Stat()
	must(b, err)
	open := func() *ext4.FS {
		fs, err := ext4.Open(image, st.Size(), ext4.Options{})
		must(b, err)
		return fs
	}
	b.Run("crossview", func(b *testing.B) {
		for b.Loop() {
			l, err := Parse(listing)
			must(b, err)
			got, err := Compare(b.Context(), open(), Options{Listing: l, Rules: baseline.DefaultRules(), Begun: time.Now(), Most: 10})
			if err != nil || got.Names < 20_000 || len(got.Findings) > 0 {
				b.Fatalf("%+v, %v", got, err)
			}
		}
	})
	b.Run("walk", func(b *testing.B) {
		for b.Loop() {
			n := 0
			for _, err := range open().Walk() {
				must(b, err)
				n++
			}
			if n < 20_000 {
				b.Fatal(n)
			}
		}
	})
}
