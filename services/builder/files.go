package builder

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// open opens a file that a guest's spec names, for the toolstack, which can open nothing itself.
// The file must lie beneath the pool; no link on the way is followed, so that what a tenant may
// write in its pool cannot lead out of it.
func (b *Builder) open(pool string, in protocol.Open) (*os.File, error) {
	refuse := func(why string) error {
		return rpc.Errorf(rpc.Invalid, "%s: %s: %s", in.Field, clip(in.Path, 4096), why)
	}
	rel, err := filepath.Rel(pool, in.Path)
	if !filepath.IsAbs(in.Path) || err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return nil, rpc.Errorf(rpc.Refused, "%s: %s lies outside the pool %s: move it there, or name another one (`redoubt tenant set`, `redoubt up --pool`)", in.Field, clip(in.Path, 4096), pool)
	}
	flags := unix.O_RDONLY
	if in.Write {
		flags = unix.O_RDWR
	}
	f, err := openBeneath(pool, rel, flags|unix.O_NONBLOCK|unix.O_NOCTTY)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, refuse("a symbolic link is on the way: name the file itself")
	case err != nil:
		return nil, refuse(err.Error())
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, refuse("not a regular file")
	}
	return f, nil
}

// openBeneath opens what lies beneath a directory and is reached without any link.
func openBeneath(dir, name string, flags int) (*os.File, error) {
	base, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(base)
	fd, err := unix.Openat2(base, name, &unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// consoleBuffer is the room of a console's socket in the kernel's own count of bytes.
const consoleBuffer = 16 << 20

// console makes what a guest's console needs: the guest's ends of the console and of the byte
// channel, and for the toolstack the other ends and the console's log.
func (b *Builder) console(name string) (guest, toolstack []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(append(guest, toolstack...))
		}
	}()
	for range 2 {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return guest, toolstack, fmt.Errorf("console: %w", err)
		}
		for _, fd := range fds {
			// QEMU writes a console byte by byte and drops what the socket does not take; each
			// such byte counts for the better part of a KiB.
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, consoleBuffer)
		}
		toolstack = append(toolstack, os.NewFile(uintptr(fds[0]), "console"))
		guest = append(guest, os.NewFile(uintptr(fds[1]), "console"))
	}
	log, err := os.OpenFile(filepath.Join(b.procs.logs, "console-"+name+".log"),
		os.O_CREATE|os.O_TRUNC|os.O_RDWR|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return guest, toolstack, err
	}
	return guest, append(toolstack, log), nil
}

// handFile answers protocol.MethodOpen.
func (b *Builder) handFile(tenant string, r *rpc.Request) (any, error) {
	var in protocol.Open
	if err := r.Decode(&in); err != nil {
		return nil, err
	}
	t, err := b.ledger.tenant(tenant)
	if err != nil {
		return nil, err
	}
	f, err := b.open(t.Pool, in)
	if err != nil {
		return nil, err
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
