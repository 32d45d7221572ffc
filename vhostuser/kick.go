package vhostuser

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// kicks waits for the kicks of a queue, in a thread of the queue's own. The runtime's poller is not asked: it watches for all that
// may happen to a descriptor, so that each kick, each reading of one and each interrupt would wake a thread in every process that
// has the descriptor there (eventFile keeps them out of it).
type kicks struct {
	kick  int      // the eventfd
	stop  *os.File // an eventfd of our own, which ends the wait
	count [8]byte
}

func newKicks(kick *os.File) (*kicks, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &kicks{kick: int(kick.Fd()), stop: os.NewFile(uintptr(fd), "stop")}, nil
}

// halt makes wait report false, now and from now on.
func (k *kicks) halt() error {
	_, err := k.stop.Write(one[:])
	return err
}

// close is for when nobody waits any more.
func (k *kicks) close() error { return k.stop.Close() }

// wait waits for a kick and takes it; false: the queue is to halt.
func (k *kicks) wait() (bool, error) {
	fds := []unix.PollFd{{Fd: int32(k.kick), Events: unix.POLLIN}, {Fd: int32(k.stop.Fd()), Events: unix.POLLIN}}
	if _, err := eintr.Value(func() (int, error) { return unix.Poll(fds, -1) }); err != nil {
		return false, fmt.Errorf("poll: %w", err)
	}
	if fds[1].Revents != 0 {
		return false, nil
	}
	if fds[0].Revents&unix.POLLIN == 0 { // what the front end gave is no eventfd after all
		return false, fmt.Errorf("%w: poll says %#x", ErrProtocol, fds[0].Revents)
	}
	if _, err := unix.Read(k.kick, k.count[:]); err != nil && !errors.Is(err, unix.EAGAIN) {
		return false, fmt.Errorf("read: %w", err)
	}
	return true, nil
}
