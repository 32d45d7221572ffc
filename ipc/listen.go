package ipc

import (
	"errors"
	"net"
	"os"
)

// Listen makes a listening SOCK_STREAM socket with a name, in place of one that is there. Whoever the mode
// lets may connect.
func Listen(path string, mode os.FileMode) (*os.File, error) { return listen("unix", path, mode) }

// ListenMessages is Listen for a SOCK_SEQPACKET socket.
func ListenMessages(path string, mode os.FileMode) (*os.File, error) {
	return listen("unixpacket", path, mode)
}

func listen(network, path string, mode os.FileMode) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
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
