package builder

import (
	"context"
	"errors"
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
func (b *Builder) open(in protocol.Open) (*os.File, error) {
	refuse := func(why string) error {
		return rpc.Errorf(rpc.Invalid, "%s: %s: %s", in.Field, clip(in.Path, 4096), why)
	}
	rel, err := filepath.Rel(b.cfg.Pool, in.Path)
	if !filepath.IsAbs(in.Path) || err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return nil, rpc.Errorf(rpc.Refused, "%s: %s lies outside the pool %s: move it there, or start Redoubt with another --pool", in.Field, clip(in.Path, 4096), b.cfg.Pool)
	}
	flags := unix.O_RDONLY
	if in.Write {
		flags = unix.O_RDWR
	}
	f, err := openBeneath(b.cfg.Pool, rel, flags|unix.O_NONBLOCK|unix.O_NOCTTY)
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

// console makes what a guest's console needs: a pair for the console, one for the byte channel, and
// the console's log. The toolstack's ends come first of each pair.
func (b *Builder) console(in protocol.MakeConsole) (rpc.WithFiles, error) {
	var files []*os.File
	fail := func(err error) (rpc.WithFiles, error) {
		closeAll(files)
		return rpc.WithFiles{}, err
	}
	if in.Name == "" || strings.ContainsAny(in.Name, "/\x00") || len(in.Name) > 128 {
		return fail(rpc.Errorf(rpc.Invalid, "console: not a guest's name"))
	}
	for range 2 {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fail(err)
		}
		for _, fd := range fds {
			// QEMU writes a console byte by byte and drops what the socket does not take; each
			// such byte counts for the better part of a KiB.
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, consoleBuffer)
			files = append(files, os.NewFile(uintptr(fd), "console"))
		}
	}
	log, err := os.OpenFile(filepath.Join(b.procs.logs, "console-"+in.Name+".log"),
		os.O_CREATE|os.O_TRUNC|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fail(err)
	}
	return rpc.WithFiles{Value: struct{}{}, Files: append(files, log)}, nil
}

// handFile answers protocol.MethodOpen.
func (b *Builder) handFile(_ context.Context, r *rpc.Request) (any, error) {
	var in protocol.Open
	if err := r.Decode(&in); err != nil {
		return nil, err
	}
	f, err := b.open(in)
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
