package memfd

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"redoubt.dev/redoubt/ipc/rpc"
)

// TestNew: whoever has it cannot change its size, nor seal it against others.
func TestNew(t *testing.T) {
	f, err := New("memory", 8192)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int64{0, 4096, 16384} {
		if f.Truncate(size) == nil {
			t.Errorf("changed to %d bytes", size)
		}
	}
	if _, err := f.WriteAt([]byte("x"), 8191); err != nil {
		t.Error(err)
	}
	if seal(f, 8) == nil { // F_SEAL_WRITE
		t.Error("sealed by another")
	}
}

// TestSealed: the copy stays what it was, whatever happens to the file, and whoever has it.
func TestSealed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(path, []byte("kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Seek(3, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	m, err := Sealed("boot.kernel", f)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := os.WriteFile(path, []byte("other!"), 0o600); err != nil {
		t.Fatal(err)
	}
	if w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", m.Fd()), os.O_RDWR, 0); err == nil {
		if _, err := w.WriteAt([]byte("x"), 0); err == nil {
			t.Error("written to")
		}
		if w.Truncate(0) == nil {
			t.Error("cut")
		}
		w.Close()
	}
	if _, err := m.WriteAt([]byte("x"), 0); err == nil {
		t.Error("written to")
	}
	if b, err := io.ReadAll(m); err != nil || !bytes.Equal(b, []byte("kernel")) {
		t.Errorf("%q, %v", b, err)
	}
}

// TestSealedRefused: an empty file, one that is none, one that is too large.
func TestSealedRefused(t *testing.T) {
	dir := t.TempDir()
	empty, large := filepath.Join(dir, "empty"), filepath.Join(dir, "large")
	for path, size := range map[string]int64{empty: 0, large: MaxSealed + 1} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{empty, large, dir, "/dev/zero"} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if m, err := Sealed("boot.kernel", f); rpc.KindOf(err) != rpc.Invalid {
			t.Errorf("%s: %v, %v", path, m, err)
		}
		f.Close()
	}
}
