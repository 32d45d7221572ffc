package qemu

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
)

// root opens the cache of tools and points package programs at it.
func root(t testing.TB) *debian.Root {
	t.Helper()
	r, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("REDOUBT_TOOLS", r.Tools())
	return r
}

// A swtpm is a real TPM behind the Transport: no gate, no manager.
type swtpm struct {
	mu   sync.Mutex
	data *os.File
	n    int           // commands carried out
	gate chan struct{} // Execute waits for it
}

// newSwtpm starts the emulator on an empty state directory; it ends with the test.
func newSwtpm(t testing.TB, r *debian.Root) *swtpm {
	t.Helper()
	ctrl, theirs := socketpair(t)
	data, theirData := socketpair(t)
	cmd := r.Command(context.Background(), "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+t.TempDir(),
		"--ctrl", "type=unixio,clientfd=3", "--seccomp", "action=none")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(cmd) })
	theirs.Close()

	rights := unix.UnixRights(int(theirData.Fd()))
	if err := unix.Sendmsg(int(ctrl.Fd()), u32s(uint32(cmdSetDataFD)), rights, nil, 0); err != nil {
		t.Fatal(err)
	}
	theirData.Close()
	result(t, ctrl)
	if _, err := ctrl.Write(u32s(uint32(cmdInit), 0)); err != nil {
		t.Fatal(err)
	}
	result(t, ctrl)
	open := make(chan struct{})
	close(open)
	return &swtpm{data: data, gate: open}
}

func stop(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

func result(t testing.TB, ctrl *os.File) {
	t.Helper()
	var b [4]byte
	if _, err := io.ReadFull(ctrl, b[:]); err != nil {
		t.Fatal(err)
	}
	if r := binary.BigEndian.Uint32(b[:]); r != 0 {
		t.Fatalf("swtpm control result %#x", r)
	}
}

func socketpair(t testing.TB) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, b = os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func (s *swtpm) Execute(locality uint8, cmd []byte) ([]byte, error) {
	<-s.gate
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	if locality != 0 {
		return nil, fmt.Errorf("locality %d", locality)
	}
	if _, err := s.data.Write(cmd); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	if _, err := io.ReadFull(s.data, buf[:tpmHeader]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(buf[2:])
	if n < tpmHeader || int(n) > len(buf) {
		return nil, errors.New("swtpm: bad size")
	}
	_, err := io.ReadFull(s.data, buf[tpmHeader:n])
	return buf[:n], err
}
