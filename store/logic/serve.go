package logic

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// Serve is a worker: it answers requests from the SOCK_SEQPACKET socket fd until the other end
// is closed. It makes blocking system calls itself, without the poller of package net, because
// a worker's start and its one answer are what a client waits for.
func Serve(fd int) error {
	in, out := make([]byte, MaxMessage), make([]byte, 0, MaxMessage)
	for {
		n, err := eintr.Value(func() (int, error) { return unix.Read(fd, in) })
		switch {
		case err != nil:
			return fmt.Errorf("receive: %w", err)
		case n == 0:
			return nil
		}
		seq, r, err := ParseRequest(in[:n])
		if err != nil {
			return err
		}
		out = AppendAnswer(out[:0], seq, Decide(r))
		if _, err := eintr.Value(func() (int, error) { return unix.Write(fd, out) }); err != nil {
			if errors.Is(err, unix.EPIPE) {
				return nil
			}
			return fmt.Errorf("answer: %w", err)
		}
	}
}
