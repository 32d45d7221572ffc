package block

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"redoubt.dev/redoubt/lab/debian"
)

const size = 8 << 20

func create(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := Create(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string, readOnly bool) *Raw {
	t.Helper()
	r, err := Open(path, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks
}

func TestReadWriteDiscard(t *testing.T) {
	path := create(t)
	if n := blocks(t, path); n != 0 {
		t.Errorf("a new image takes %d blocks", n)
	}
	r := open(t, path, false)
	if r.Size() != size || r.ReadOnly() {
		t.Fatalf("%d, %v", r.Size(), r.ReadOnly())
	}
	data := bytes.Repeat([]byte{0xa5}, 1<<20)
	for _, solid := range []bool{false, true} {
		r.solid = solid
		if _, err := r.WriteAt(data, 1<<20); err != nil {
			t.Fatal(err)
		}
		if err := r.Flush(); err != nil {
			t.Fatal(err)
		}
		full := blocks(t, path)
		if err := r.Discard(1<<20, 1<<20-512); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 1<<20)
		if _, err := r.ReadAt(got, 1<<20); err != nil {
			t.Fatal(err)
		}
		want := append(make([]byte, 1<<20-512), data[:512]...)
		if !bytes.Equal(got, want) {
			t.Errorf("solid %v: a discarded range does not read as zeros, or more was discarded", solid)
		}
		if after := blocks(t, path); !solid && after >= full {
			t.Errorf("discard freed nothing: %d blocks, then %d", full, after)
		}
	}
}

func TestRange(t *testing.T) {
	r := open(t, create(t), false)
	p := make([]byte, 1024)
	for _, off := range []int64{-1, size - 1023, size, 1 << 62} {
		if n, err := r.ReadAt(p, off); n != 0 || !errors.Is(err, ErrRange) {
			t.Errorf("read at %d: %d, %v", off, n, err)
		}
		if n, err := r.WriteAt(p, off); n != 0 || !errors.Is(err, ErrRange) {
			t.Errorf("write at %d: %d, %v", off, n, err)
		}
		if err := r.Discard(off, 1024); !errors.Is(err, ErrRange) {
			t.Errorf("discard at %d: %v", off, err)
		}
	}
	if err := r.Discard(0, -1); !errors.Is(err, ErrRange) {
		t.Errorf("discard of -1: %v", err)
	}
	if err := r.Discard(size, 0); err != nil {
		t.Errorf("discard of nothing at the end: %v", err)
	}
}

// A file that was cut behind our back gives an error, not half an answer.
func TestTruncated(t *testing.T) {
	path := create(t)
	r := open(t, path, false)
	if err := os.Truncate(path, size/2); err != nil {
		t.Fatal(err)
	}
	if n, err := r.ReadAt(make([]byte, 1024), size/2-512); n != 0 || err == nil {
		t.Errorf("%d, %v", n, err)
	}
}

func TestReadOnly(t *testing.T) {
	path := create(t)
	r := open(t, path, true)
	if _, err := r.WriteAt(make([]byte, 512), 0); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
	if err := r.Discard(0, 512); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
	open(t, path, true) // readers share
	if _, err := Open(path, false); !errors.Is(err, ErrInUse) {
		t.Errorf("writer beside readers: %v", err)
	}
}

func TestExclusive(t *testing.T) {
	path := create(t)
	r := open(t, path, false)
	for _, readOnly := range []bool{false, true} {
		if _, err := Open(path, readOnly); !errors.Is(err, ErrInUse) {
			t.Errorf("second open, read-only %v: %v", readOnly, err)
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, path, false)
}

// QEMU's programs and we refuse each other's images.
func TestQEMULocks(t *testing.T) {
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	path := create(t)
	run := func(args ...string) error {
		return root.Command(t.Context(), "qemu-io", append([]string{"-f", "raw"}, append(args, path)...)...).Run()
	}
	r := open(t, path, false)
	if run("-c", "write 0 512") == nil || run("-r", "-c", "read 0 512") == nil {
		t.Error("qemu-io opened an image with a writer")
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, path, true)
	if run("-c", "write 0 512") == nil {
		t.Error("qemu-io wrote to an image with a reader")
	}
	if err := run("-r", "-c", "read 0 512"); err != nil {
		t.Errorf("qemu-io could not share reading: %v", err)
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	odd := filepath.Join(dir, "odd")
	if err := os.WriteFile(odd, make([]byte, 513), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{odd, dir, "/dev/zero", filepath.Join(dir, "none")} {
		if _, err := Open(path, true); err == nil {
			t.Errorf("%s was opened", path)
		}
	}
	if err := Create(odd, size); !errors.Is(err, os.ErrExist) {
		t.Errorf("Create over a file: %v", err)
	}
	for _, n := range []int64{0, -512, 100} {
		if err := Create(filepath.Join(dir, "x"), n); err == nil {
			t.Errorf("size %d", n)
		}
	}
	path := create(t)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(f, false); err == nil {
		t.Error("a read-only descriptor was taken for a writer's")
	}
	if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a refused descriptor stays open: %v", err)
	}
}
