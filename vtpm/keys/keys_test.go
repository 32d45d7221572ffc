package keys

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"
	"redoubt.dev/redoubt/lab/debian"
)

func TestWrapIsBound(t *testing.T) {
	r, err := Create(filepath.Join(t.TempDir(), "root.key"), nil)
	if err != nil {
		t.Fatal(err)
	}
	other, err := Create(filepath.Join(t.TempDir(), "root.key"), nil)
	if err != nil {
		t.Fatal(err)
	}
	k := New()
	w := r.Wrap(k[:], []byte("guest a"))
	if got, err := r.Unwrap(w, []byte("guest a")); err != nil || !bytes.Equal(got, k[:]) {
		t.Fatalf("unwrap: %v", err)
	}
	if bytes.Contains(w, k[:8]) {
		t.Error("the key shows")
	}
	if bytes.Equal(w, r.Wrap(k[:], []byte("guest a"))) {
		t.Error("two wrappings are equal: a nonce was used twice")
	}
	if _, err := r.Unwrap(w, []byte("guest b")); !errors.Is(err, ErrUnwrap) {
		t.Errorf("other context: %v", err)
	}
	if _, err := other.Unwrap(w, []byte("guest a")); !errors.Is(err, ErrUnwrap) {
		t.Errorf("other root: %v", err)
	}
	for i := range w {
		b := bytes.Clone(w)
		b[i] ^= 1
		if _, err := r.Unwrap(b, []byte("guest a")); err == nil {
			t.Errorf("a change at offset %d opens", i)
		}
	}
}

func TestFileRoot(t *testing.T) {
	file := filepath.Join(t.TempDir(), "root.key")
	r, err := Create(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", st.Mode(), err)
	}
	again, err := Open(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.Unwrap(r.Wrap([]byte("x"), nil), nil); err != nil || again.Sealed() {
		t.Errorf("reopened: %v, sealed %v", err, again.Sealed())
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Create(file, nil); err == nil || !strings.Contains(err.Error(), "never replaced") {
		t.Errorf("create over it: %v", err)
	}
	refused := func(name, want string) {
		t.Helper()
		if _, err := Open(file, nil); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v", name, err)
		}
	}
	chmod := func(m os.FileMode) {
		if err := os.Chmod(file, m); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range []os.FileMode{0o640, 0o604, 0o620, 0o666} {
		chmod(m)
		refused(m.String(), "mode is")
	}
	chmod(0o600)
	if os.Geteuid() == 0 {
		if err := os.Chown(file, 12345, -1); err != nil {
			t.Fatal(err)
		}
		refused("other owner", "user 12345")
		if err := os.Chown(file, 0, -1); err != nil {
			t.Fatal(err)
		}
	}
	for i := range before {
		b := bytes.Clone(before)
		b[i] ^= 0x40
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		refused("damage", "")
	}
	link := file + ".link"
	if err := os.Rename(file, link); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(link, file); err != nil {
		t.Fatal(err)
	}
	refused("symbolic link", "")
}

// hostTPM runs an swtpm on a socket, standing in for the host's TPM.
func hostTPM(t *testing.T) string {
	t.Helper()
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	// A socket's path has 108 bytes at most.
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	sock := filepath.Join(dir, "s")
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(l), "listener")
	defer f.Close()
	// Bound and listening before the program runs: connections wait in the queue, nothing polls.
	if err := unix.Bind(l, &unix.SockaddrUnix{Name: sock}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(l, 8); err != nil {
		t.Fatal(err)
	}
	cmd := root.Command(t.Context(), "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir,
		"--server", "type=unixio,fd=3", "--flags", "not-need-init,startup-clear")
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	run(t, cmd)
	return sock
}

func run(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	var out bytes.Buffer
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("swtpm: %s", out.String())
		}
	})
}

func TestSealedRoot(t *testing.T) {
	tpm := hostTPM(t)
	file := filepath.Join(t.TempDir(), "root.key")
	r, err := Create(file, HostAt(tpm))
	if err != nil {
		t.Fatal(err)
	}
	for range 4 { // more often than a TPM has room for objects that are not flushed
		again, err := Open(file, HostAt(tpm))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := again.Unwrap(r.Wrap([]byte("x"), nil), nil); err != nil || !again.Sealed() {
			t.Errorf("reopened: %v, sealed %v", err, again.Sealed())
		}
	}
	if _, err := Open(file, nil); err == nil || !strings.Contains(err.Error(), "sealed to a TPM") {
		t.Errorf("without a TPM: %v", err)
	}
	if _, err := Open(file, HostAt(hostTPM(t))); err == nil || !strings.Contains(err.Error(), "another TPM") {
		t.Errorf("another TPM: %v", err)
	}
	if _, err := Open(file, HostAt(file)); err == nil {
		t.Error("a file was taken for a TPM")
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	p, err := parseRoot(b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tpm2.Unmarshal[tpm2.TPMTPublic](p.public); err != nil {
		t.Errorf("public part: %v", err)
	}
}

func FuzzParseRoot(f *testing.F) {
	f.Add(rootFile{kind: kindPlain, key: make([]byte, Size)}.encode())
	f.Add(rootFile{kind: kindSealed, public: []byte("p"), private: []byte("q")}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parseRoot(b)
		if err == nil && !bytes.Equal(p.encode(), b) {
			t.Fatalf("%x was read as %+v", b, p)
		}
	})
}

func FuzzUnwrap(f *testing.F) {
	r, err := newRoot(make([]byte, Size), false)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(r.Wrap([]byte("secret"), []byte("c")), []byte("c"))
	f.Fuzz(func(t *testing.T, w, context []byte) {
		if s, err := r.Unwrap(w, context); err == nil && len(s)+wrapOverhead != len(w) {
			t.Fatalf("%x opened as %x", w, s)
		}
	})
}
