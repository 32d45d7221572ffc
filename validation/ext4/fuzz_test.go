package ext4

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "make testdata/images anew")

// fuzzImages are small images of all that there is to read; most have no checksums, which would hide what is behind them.
var fuzzImages = []string{"maps", "extents", "inline", "journal", "sums"}

// patches is an image with some bytes replaced: what a fuzzer's input says.
type patches struct {
	base  []byte
	list  []patched
	bytes int64 // read so far
}

type patched struct {
	off  int64
	data []byte
}

func (p *patches) ReadAt(b []byte, off int64) (int, error) {
	if off >= int64(len(p.base)) {
		return 0, io.EOF
	}
	n := copy(b, p.base[off:])
	p.bytes += int64(n)
	for _, c := range p.list {
		if c.off+int64(len(c.data)) > off && c.off < off+int64(n) {
			copy(b[max(0, c.off-off):n], c.data[max(0, off-c.off):])
		}
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// program makes patches of an input: which of the image's bytes that are not zero, how far behind it, and what is put there.
func (p *patches) program(input []byte, places []int64) {
	for ; len(input) >= 4 && len(p.list) < 64; input = input[4:] {
		n := int(binary.LittleEndian.Uint16(input)) * 7 % len(places)
		p.list = append(p.list, patched{places[n] + int64(input[2]%8), input[3:4]})
	}
}

// placesOf are the bytes of an image that are not zero: most of them are metadata.
func placesOf(image []byte) (all []int64) {
	for off, c := range image {
		if c != 0 {
			all = append(all, int64(off))
		}
	}
	return all
}

// mendSuper makes the superblock's checksum right: otherwise no change of it would be read any further.
func (p *patches) mendSuper() {
	b := make([]byte, superSize)
	if _, err := p.ReadAt(b, superOffset); err != nil {
		return
	}
	p.list = append(p.list, patched{superOffset + 0x3fc, binary.LittleEndian.AppendUint32(nil, crc32c(^uint32(0), b[:0x3fc]))})
}

func loadImage(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata/images", name+".gz"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// FuzzOpen reads all of images that were changed anyhow: nothing may crash, or read more than a bounded multiple of the
// image.
func FuzzOpen(f *testing.F) {
	var images [][]byte
	var places [][]int64
	for i, name := range fuzzImages {
		images = append(images, loadImage(f, name))
		places = append(places, placesOf(images[i]))
		f.Add(uint8(i), []byte{})
	}
	f.Fuzz(func(t *testing.T, image uint8, input []byte) {
		i := int(image) % len(images)
		p := &patches{base: images[i]}
		p.program(input, places[i])
		p.read(t)
	})
}

// read reads all of the image, at a bounded cost.
func (p *patches) read(t testing.TB) {
	t.Helper()
	p.mendSuper()
	fs, err := Open(p, int64(len(p.base)), Options{MaxMemory: 1 << 20, Cache: 64 << 10})
	if err == nil {
		readAll(t, fs)
	}
	if most := int64(len(p.base)) * 2000; p.bytes > most {
		t.Fatalf("%d bytes read of an image of %d: %v", p.bytes, len(p.base), p.list)
	}
}

// TestDamage reads images of which some bytes that are not zero, most of them metadata, were changed.
func TestDamage(t *testing.T) { damage(t, 100) }

// TestSoakDamage is TestDamage for longer.
func TestSoakDamage(t *testing.T) {
	if !soak() {
		t.Skip("tens of thousands of images: needs REDOUBT_SOAK=1, as `make soak` sets it; `make test` has TestDamage")
	}
	damage(t, 5_000)
}

func damage(t *testing.T, rounds int) {
	r := rand.New(rand.NewPCG(uint64(rounds), 4))
	for _, name := range fuzzImages {
		p := &patches{base: loadImage(t, name)}
		places := placesOf(p.base)
		for range rounds {
			p.list, p.bytes = nil, 0
			for range 1 + r.IntN(6) {
				off := places[r.IntN(len(places))]
				v := []byte{0, 0xff, 1, byte(r.Uint32()), p.base[off] + 1, p.base[off] ^ 1<<r.IntN(8)}[r.IntN(6)]
				p.list = append(p.list, patched{off + int64(r.IntN(3)), []byte{v}})
			}
			p.read(t)
		}
	}
}

// readAll reads everything that there is to read, as far as it goes.
func readAll(t testing.TB, f *FS) {
	t.Helper()
	count := 0
	for e, err := range f.Walk() {
		if count++; count > 20000 {
			t.Fatal("the walk does not end")
		}
		if err != nil {
			_ = err.Error()
			continue
		}
		readInode(e.Inode)
	}
	for in, err := range f.Inodes() {
		if err == nil {
			readInode(in)
		}
	}
	for err := range f.Check() {
		_ = err.Error()
	}
	_, _ = f.Follow("/dir/link/../file")
	for range f.Replayed() {
		break
	}
}

func readInode(in *Inode) {
	_, _ = in.Xattrs()
	_, _ = in.Readlink()
	_, _ = in.Device()
	_ = in.FileMode()
	for _, err := range in.Extents() {
		_ = err
	}
	for _, err := range in.ReadDir() {
		_ = err
	}
	r, err := in.Open()
	if err != nil {
		return
	}
	b := make([]byte, 8<<10)
	for _, off := range []int64{0, 3, in.Size / 2, in.Size - 100, 12 << 10, 300 << 10} {
		_, _ = r.ReadAt(b, off)
	}
}

// TestFuzzImages: the images that fuzzing begins with are whole. With -rewrite it makes them.
func TestFuzzImages(t *testing.T) {
	for _, name := range fuzzImages {
		if *rewrite {
			makeFuzzImage(t, name)
		}
		b := loadImage(t, name)
		f, err := Open(bytes.NewReader(b), int64(len(b)), Options{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		noProblems(t, f)
		names := 0
		for e, err := range f.Walk() {
			if err != nil {
				t.Errorf("%s: %v: %v", name, e, err)
			}
			names++
		}
		if names < 20 {
			t.Errorf("%s: %d names", name, names)
		}
		if e, err := f.Follow("/dir/link/../file"); err != nil || e.Inode.Size == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func makeFuzzImage(t *testing.T, name string) {
	tr := newTree(t)
	tr.file(t, "/dir/file", []byte("contents"))
	tr.symlink(t, "/dir/link", "/other")
	tr.symlink(t, "/dir/long", strings.Repeat("l", 100))
	for i := range 40 {
		tr.file(t, fmt.Sprintf("/other/%d-%s", i, strings.Repeat("n", 40)), []byte{byte(i)})
	}
	tr.file(t, "/file", bytes.Repeat([]byte("0123456789abcdef"), 60))
	tr.link(t, "/hard", "/file")
	at := map[int64][]byte{300 << 10: []byte("far")}
	for i := range int64(8) {
		at[i*2048] = []byte("x")
	}
	tr.sparse(t, "/sparse", 310<<10, at)
	tr.xattr(t, "/file", "user.a", []byte("b"))
	tr.xattr(t, "/dir/file", "security.capability", random(1, 20))
	tr.xattr(t, "/sparse", "user.block", random(2, 400))
	tr.device("/dir/null", "c", 1, 3)
	args := map[string][]string{
		"maps":    {"-t", "ext2", "-I", "128"},
		"extents": {"-t", "ext4", "-O", "^has_journal,^metadata_csum,ea_inode", "-I", "256"},
		"inline":  {"-t", "ext4", "-O", "^has_journal,^metadata_csum,^64bit,inline_data,uninit_bg", "-I", "256"},
		"journal": {"-t", "ext3", "-I", "256", "-J", "size=1"},
		"sums":    {"-t", "ext4", "-O", "^has_journal,inline_data", "-I", "256"},
	}[name]
	size := "256k"
	if name == "journal" {
		size = "2500k"
	}
	image := tr.image(t, size, append(args, "-b", "1024", "-N", "128")...)
	repair(t, image, "-D")
	if name == "journal" {
		next := copyFile(t, image)
		debugfs(t, next, "rm /other/3-"+strings.Repeat("n", 40), "mkdir /new", "sif /file mode 0100600")
		repair(t, next)
		writeJournal(t, image, journalShape{0, journalRevoke, 1010}, transaction{blocks: changes(t, image, next), revoked: []uint64{2400}})
	}
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	var z bytes.Buffer
	w, err := gzip.NewWriterLevel(&z, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join("testdata/images", name+".gz"), z.Bytes())
}
