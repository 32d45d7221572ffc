package sandbox

// Guards outlive the process that made them: what a guard is made of can be held elsewhere and be
// given to another process, which then guards.

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/pidfd"
)

// Held is what it takes to guard a process that another one started. The files are not part of its
// JSON.
type Held struct {
	PID    int    `json:"pid"` // on the host
	Name   string `json:"name"`
	Memory uint64 `json:"memory,omitempty"` // the limit, in bytes
	Group  string `json:"group,omitempty"`  // its cgroup's directory
	Cgroup int    `json:"cgroup,omitempty"` // that one's version, 1 or 2

	PIDFD *os.File `json:"-"`
	Notes *os.File `json:"-"` // where the kernel tells of calls outside the list
}

// ErrNotParent is the end of a process that was adopted.
var ErrNotParent = errors.New("ended, and nobody was told how")

// hold has the process held elsewhere, too.
func (g *Guard) hold() error {
	if g.Hold == nil {
		return nil
	}
	// One of its own: who has this one does not block, and package os must.
	f, err := pidfd.Open(g.PID())
	if err != nil {
		return err
	}
	h := Held{PID: g.PID(), Name: g.spec.Name, Memory: g.limit, PIDFD: f, Notes: g.notes}
	defer h.PIDFD.Close()
	if g.group != nil {
		h.Group, h.Cgroup = g.group.dir, 1
		if g.group.v2 {
			h.Cgroup = 2
		}
	}
	return g.Hold(h)
}

// Adopt guards a process in place of who started it, who is gone: one that makes a call outside its
// list is ended from here on, and Wait waits for it. Its files are the Guard's then. A call that the
// last guard was told of, and did not live to end the process for, stays held.
func Adopt(h Held) *Guard {
	g := &Guard{held: &h, spec: &Spec{Name: h.Name}, pidfd: -1, limit: h.Memory, learned: map[string]int{}, notes: h.Notes, watched: make(chan struct{})}
	if h.Group != "" {
		g.group = &group{h.Group, h.Cgroup == 2}
	}
	if h.Notes == nil {
		close(g.watched)
		return g
	}
	go g.watch()
	return g
}

// End ends a process in place of who started it and returns when it is gone. It needs no Notes.
func End(h Held) error {
	defer h.PIDFD.Close()
	if err := pidfd.Signal(h.PIDFD, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	if err := pidfd.Await(context.Background(), h.PIDFD); err != nil {
		return err
	}
	if h.Group != "" {
		_ = (&group{h.Group, h.Cgroup == 2}).remove() // an empty one harms nobody
	}
	return nil
}

// awaitEnd waits until the process is gone.
func (g *Guard) awaitEnd() error {
	if g.held == nil {
		return g.cmd.Wait()
	}
	err := pidfd.Await(context.Background(), g.held.PIDFD)
	g.held.PIDFD.Close()
	if err == nil {
		err = ErrNotParent
	}
	return err
}
