package vhostuser

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// Door makes a listener and the only way to it: a descriptor, through whose name beneath
// /proc/self/fd a process that has it can connect. It is for QEMU, whose network devices take no
// connected socket (7.2: "does not support FD passing"). Dir is a directory that can be written
// to; when Door returns, there is nothing in it.
func Door(dir string) (l *net.UnixListener, door *os.File, err error) {
	d, err := os.MkdirTemp(dir, "door")
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d)) }()
	at, err := os.Open(d)
	if err != nil {
		return nil, nil, err
	}
	defer at.Close()
	// By way of the descriptor, because a socket's name is at most 107 bytes long.
	name := fmt.Sprintf("/proc/self/fd/%d/s", at.Fd())
	l, err = net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil, nil, err
	}
	l.SetUnlinkOnClose(false)
	// Who has the descriptor may use it, whatever user it runs as.
	if err := os.Chmod(name, 0o666); err != nil {
		return nil, nil, errors.Join(err, l.Close())
	}
	fd, err := eintr.Value(func() (int, error) { return unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, nil, errors.Join(&os.PathError{Op: "open", Path: name, Err: err}, l.Close())
	}
	return l, os.NewFile(uintptr(fd), "door"), nil
}
