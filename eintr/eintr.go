// Package eintr makes system calls anew that a signal interrupted. The Go runtime signals its threads whenever it likes
// (SIGURG, in calls, too), and not all calls go on by themselves after a signal (signal(7)): poll(2) never does, what asks a
// file system in user space or over a network need not. Package os hides this, golang.org/x/sys/unix does not.
package eintr

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Call makes a call until no signal interrupts it, and returns its error.
func Call(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Value is [Call] for a call with a result.
func Value[T any](call func() (T, error)) (T, error) {
	for {
		if v, err := call(); !errors.Is(err, unix.EINTR) {
			return v, err
		}
	}
}
