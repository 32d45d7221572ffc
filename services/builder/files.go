package builder

import (
	"errors"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/pool"
	"redoubt.dev/redoubt/services/protocol"
)

// consoleBuffer is the room of a console's socket in the kernel's own count of bytes.
const consoleBuffer = 16 << 20

// spoolSize is the room of a console's pipe in bytes, of which each byte that QEMU wrote alone takes a page.
const spoolSize = 1 << 20

// console makes what a guest's console needs: the guest's ends of the console and of the byte
// channel, and for the toolstack the other ends, the console's log and the pipe before it.
func (b *Builder) console(name string) (guest, toolstack []*os.File, err error) {
	defer func() {
		if err != nil {
			ipc.CloseAll(append(guest, toolstack...))
		}
	}()
	for range 2 {
		ours, theirs, err := ipc.Streams("console")
		if err != nil {
			return guest, toolstack, err
		}
		for _, f := range []*os.File{ours, theirs} {
			// QEMU writes a console byte by byte and drops what the socket does not take; each
			// such byte counts for the better part of a KiB.
			_ = unix.SetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, consoleBuffer)
		}
		toolstack, guest = append(toolstack, ours), append(guest, theirs)
	}
	log, err := os.OpenFile(filepath.Join(b.cfg.RunDir, services.LogDir, "console-"+name+".log"),
		os.O_CREATE|os.O_TRUNC|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return guest, toolstack, err
	}
	toolstack = append(toolstack, log)
	r, w, err := ipc.OneWay()
	if err != nil {
		return guest, toolstack, err
	}
	if c, err := w.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, spoolSize) }) // a smaller one does, more slowly
	}
	return guest, append(toolstack, r, w), nil
}

// handFile answers protocol.MethodOpen: it opens a file that a guest's spec names, for the toolstack,
// which can open nothing itself.
func (b *Builder) handFile(tenant string, r *rpc.Request) (any, error) {
	var in protocol.Open
	if err := r.Decode(&in); err != nil {
		return nil, err
	}
	t, err := b.ledger.Tenant(tenant)
	if err != nil {
		return nil, err
	}
	f, err := pool.OpenFile(t.Pool, in.Path, in.Write)
	if err != nil {
		return nil, rpc.Errorf(rpc.KindOf(err), "%s: %s: %v", in.Field, clip(in.Path, 4096), err)
	}
	return rpc.WithFiles{Value: struct{}{}, Files: []*os.File{f}}, nil
}

// openHostTPM reaches the host's TPM by the path of its device or of an emulator's socket.
func openHostTPM(path string) (*os.File, error) {
	st, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, errors.Unwrap(err)
	case st.Mode()&os.ModeCharDevice != 0:
		return os.OpenFile(path, os.O_RDWR, 0)
	case st.Mode()&os.ModeSocket == 0:
		return nil, errors.New("neither a device nor a socket")
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	return c.File()
}
