package image

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"

	"redoubt.dev/redoubt/lab/debian"
)

const text = 0xffffffff81000000

// vmlinux is a kernel of one segment, its relocations behind it; three lists, or two as from 6.15 on.
func vmlinux(three bool) []byte {
	le := binary.LittleEndian
	content := append(make([]byte, 256), "Linux version\x00"...)
	le.PutUint32(content[16:], 0x81000040)
	le.PutUint32(content[24:], 0x1000)
	le.PutUint64(content[32:], text)
	b := []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	b = le.AppendUint16(b, 2)
	b = le.AppendUint16(b, 62)
	b = le.AppendUint32(b, 1)
	for _, v := range []uint64{text, 64, 0} {
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, 1, 64, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(b, 1)
	b = le.AppendUint32(b, 5)
	for _, v := range []uint64{64 + 56, text, 0x1000000, uint64(len(content)), 4096, 4096} {
		b = le.AppendUint64(b, v)
	}
	b = append(b, content...)
	words := []uint32{0, 0x81000020, 0, 0x81000018, 0, 0x81000010}
	if !three {
		words = []uint32{0, 0x81000020, 0, 0x81000010}
	}
	for _, w := range words {
		b = le.AppendUint32(b, w)
	}
	return b
}

// bzImage wraps a payload as a kernel's build does, with the unpacked size behind it.
func bzImage(payload []byte, unpacked int) []byte {
	le := binary.LittleEndian
	payload = le.AppendUint32(bytes.Clone(payload), uint32(unpacked))
	b := make([]byte, 2*sector)
	b[setupSectors] = 1
	copy(b[headerMagic:], "HdrS")
	le.PutUint16(b[headerVersion:], 0x20f)
	le.PutUint32(b[payloadOffset:], 64)
	le.PutUint32(b[payloadLength:], uint32(len(payload)))
	return append(append(append(b, make([]byte, 64)...), payload...), "behind it"...)
}

type writer interface {
	Write(p []byte) (int, error)
	Close() error
}

// packed are bzImages of a kernel in all that is read.
func packed(t testing.TB, kernel []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for name, open := range map[string]func(*bytes.Buffer) (writer, error){
		"gzip": func(b *bytes.Buffer) (writer, error) { return gzip.NewWriter(b), nil },
		"xz":   func(b *bytes.Buffer) (writer, error) { return xz.NewWriter(b) },
		"zstd": func(b *bytes.Buffer) (writer, error) { return zstd.NewWriter(b) },
		"lz4": func(b *bytes.Buffer) (writer, error) {
			w := lz4.NewWriter(b)
			return w, w.Apply(lz4.LegacyOption(true))
		},
	} {
		var b bytes.Buffer
		w, err := open(&b)
		if err == nil {
			_, err = w.Write(kernel)
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Fatal(name, err)
		}
		out[name] = bzImage(b.Bytes(), len(kernel))
	}
	return out
}

func TestUnpack(t *testing.T) {
	kernel := vmlinux(true)
	all := packed(t, kernel)
	all["not packed"] = kernel
	for name, b := range all {
		i, err := Unpack(b)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !bytes.Equal(i.ELF, kernel) {
			t.Errorf("%s: %d bytes, not %d", name, len(i.ELF), len(kernel))
		}
		if v, err := i.Text(text + 256); err != nil || string(v) != "Linux version\x00" {
			t.Errorf("%s: %q, %v", name, v, err)
		}
		if _, err := i.Bytes(text, 4096); err == nil {
			t.Errorf("%s: bytes that are not there", name)
		}
	}
	for name, b := range all {
		if name == "not packed" {
			continue
		}
		for _, cut := range []int{20, len(b) / 2, 0} {
			if _, err := Unpack(b[:len(b)-cut-20]); err == nil {
				t.Errorf("%s without its last %d bytes", name, cut+20)
			}
		}
		old := slices.Clone(b)
		old[headerVersion] = 7
		if _, err := Unpack(old); err == nil || !strings.Contains(err.Error(), "2.08") {
			t.Errorf("%s of an old protocol: %v", name, err)
		}
	}
	if _, err := Unpack([]byte("no kernel")); !errors.Is(err, ErrNone) {
		t.Error(err)
	}
}

// TestBomb: what unpacks to more than a kernel may have is given up.
func TestBomb(t *testing.T) {
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 1<<20)
	for range MaxSize>>20 + 1 {
		if _, err := w.Write(zeros); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Unpack(bzImage(b.Bytes(), 100)); err == nil {
		t.Error("unpacked")
	}
}

func TestRelocations(t *testing.T) {
	for _, three := range []bool{true, false} {
		i, err := Unpack(vmlinux(three))
		if err != nil {
			t.Fatal(err)
		}
		r, err := i.Relocations()
		if err != nil || len(r.Add32) != 1 || len(r.Add64) != 1 || (len(r.Sub32) == 1) != three {
			t.Fatalf("%+v, %v", r, err)
		}
		const by = 0x200000
		b, err := i.Moved(text, text+64, by, r)
		if err != nil {
			t.Fatal(err)
		}
		le := binary.LittleEndian
		sub := uint32(0x1000)
		if three {
			sub -= by
		}
		if le.Uint32(b[16:]) != 0x81200040 || le.Uint32(b[24:]) != sub || le.Uint64(b[32:]) != text+by {
			t.Errorf("%x", b)
		}
	}
	whole := vmlinux(true)
	i, err := Unpack(whole[:len(whole)-4*6])
	if err != nil {
		t.Fatal(err)
	}
	if r, err := i.Relocations(); !errors.Is(err, ErrRelocations) {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestDebian: the generic kernel of 6.1, which is packed by xz with its filter for code; those by lz4 and zstd are read in
// other packages' tests.
func TestDebian(t *testing.T) {
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	path, err := root.Vmlinuz("6.1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	i, err := Unpack(b)
	if err != nil {
		t.Fatal(err)
	}
	at, s := i.Section(".text")
	if r, err := i.Relocations(); at != text || len(s) < 8<<20 || err != nil || len(r.Add64) < 100_000 {
		t.Errorf(".text has %d bytes at %#x; %v", len(s), at, err)
	}
}

// FuzzUnpack: whatever the image, it is refused or read within bounds.
func FuzzUnpack(f *testing.F) {
	for _, b := range packed(f, vmlinux(true)) {
		f.Add(b)
	}
	f.Add(vmlinux(false))
	f.Fuzz(func(t *testing.T, b []byte) {
		i, err := Unpack(b)
		if err != nil {
			return
		}
		for _, name := range append(i.Sections(), ".BTF") {
			_, _ = i.Section(name)
		}
		_, _ = i.Text(text + 256)
		r, err := i.Relocations()
		if err != nil {
			return
		}
		for _, by := range []uint64{0, 1 << 21} {
			if b, err := i.Moved(text, text+64, by, r); err == nil && len(b) != 64 {
				t.Errorf("%d bytes", len(b))
			}
		}
	})
}
