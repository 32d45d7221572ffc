package ipc

import (
	"errors"
	"net"
	"os"
)

// Listen makes a listening SOCK_STREAM socket with a name, in place of one that is there. Whoever the mode
// lets may connect.
func Listen(path string, mode os.FileMode) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(path, mode); err != nil {
		return nil, err
	}
	return l.File()
}
