package network

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// A Namespace is a network namespace that lives as long as a process is in it or holds it. It
// holds no interface but a loopback that is down.
type Namespace struct{ f *os.File }

const threadNamespace = "/proc/thread-self/ns/net"

// NewNamespace makes a namespace. It needs CAP_SYS_ADMIN.
func NewNamespace() (*Namespace, error) {
	type result struct {
		f   *os.File
		err error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			made <- result{nil, fmt.Errorf("network namespace: %w", err)}
			return
		}
		f, err := os.Open(threadNamespace)
		made <- result{f, err}
	}()
	r := <-made
	if r.err != nil {
		return nil, r.err
	}
	return &Namespace{r.f}, nil
}

// NamespaceOf is the namespace of a descriptor, which is the Namespace's then.
func NamespaceOf(f *os.File) *Namespace { return &Namespace{f} }

// File is the namespace's descriptor; it stays the Namespace's.
func (n *Namespace) File() *os.File { return n.f }

// Close gives the namespace up.
func (n *Namespace) Close() error { return n.f.Close() }

// Do runs f on a thread that is in the namespace. Sockets and processes that f makes, and
// /dev/net/tun if f opens it, belong to the namespace for good; goroutines that f starts do not.
func (n *Namespace) Do(f func() error) (err error) {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		own, err := os.Open(threadNamespace)
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer own.Close()
		if err := unix.Setns(int(n.f.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter the network namespace: %w", err)
			return
		}
		err = f()
		if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil {
			// The thread must not serve anything else: it ends with this goroutine.
			done <- errors.Join(err, fmt.Errorf("leave the network namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}
