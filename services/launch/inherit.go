package launch

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/fdstore"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/services"
)

// Each process is kept from before its program runs until it is gone, so that a Builder that follows
// one which died knows all that may still be there: it goes on with those that guests are made of and
// ends the others, which could otherwise still use what their successors are given.

// processes begins the names of what is kept of processes.
const processes = "process/"

func entry(pid int) string { return processes + strconv.Itoa(pid) }

// record is what is kept of a process beside its descriptors: its pidfd, and of those that outlive the
// Builder where the kernel tells of calls outside their list, and then our end of the control
// connection and of its output, or of a foreign one the lifeline.
type record struct {
	Service  string            `json:"service"`
	Instance services.Instance `json:"instance"`
	Guard    sandbox.Held      `json:"guard"`
}

// hold keeps a process whose program does not run yet, at first only to be ended.
func (p *Launcher) hold(of *instance, i services.Instance, h sandbox.Held, more ...*os.File) error {
	p.mu.Lock()
	of.pid = h.PID
	p.mu.Unlock()
	files := []*os.File{h.PIDFD}
	if of.service.Outlives() && h.Notes != nil {
		files = append(append(files, h.Notes), more...)
	}
	return p.kept.Put(entry(h.PID), record{of.service.Name, i, h}, files...)
}

// Inherit goes on with a process of ours that a Builder which died has left.
func (p *Launcher) Inherit(left *fdstore.Left, pid int) (*process.Process, error) {
	of, r, files, err := p.inherit(left, pid, 4)
	if err != nil {
		return nil, err
	}
	proc, err := process.Adopt(r.Guard.Name, p.logs, process.Held{Guard: r.Guard, Control: files[2], Output: files[3]})
	if err != nil {
		p.release(of)
		return nil, err
	}
	p.mu.Lock()
	of.done = proc.Done()
	p.mu.Unlock()
	p.follow(of, proc)
	return proc, nil
}

// InheritProgram goes on with a foreign one.
func (p *Launcher) InheritProgram(left *fdstore.Left, pid int) error {
	of, r, files, err := p.inherit(left, pid, 3)
	if err != nil {
		return err
	}
	p.see(of, sandbox.Adopt(r.Guard), func() *os.ProcessState { return nil }, files[2])
	return nil
}

func (p *Launcher) inherit(left *fdstore.Left, pid, files int) (of *instance, r record, f []*os.File, err error) {
	e, ok := left.Take(entry(pid))
	if !ok {
		return nil, r, nil, fmt.Errorf("process %d is not kept", pid)
	}
	err = e.Decode(&r, files)
	var s *services.Service
	if err == nil {
		s, err = services.Find(r.Service)
	}
	var spec *sandbox.Spec
	if err == nil && !s.Outlives() {
		err = fmt.Errorf("process %d is a %s", pid, s.Name)
	}
	if err == nil {
		spec, err = s.Sandbox(r.Instance)
	}
	if err != nil {
		defer p.kept.Drop(e.Name)
		return nil, r, nil, errors.Join(err, end(e))
	}
	r.Guard.PIDFD, r.Guard.Notes = e.Files[0], e.Files[1]
	p.mu.Lock()
	defer p.mu.Unlock()
	of = p.takes(r.Instance.UID, s)
	of.pid, of.label, of.declared = pid, spec.Name, spec.Declared()
	return of, r, e.Files, nil
}

// EndLeft ends all processes that a Builder which died has left and that nobody inherited, and returns when
// they are gone, and with them the cgroups of all that have ended.
func (p *Launcher) EndLeft(left *fdstore.Left) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var all []error
	for _, name := range left.Names(processes) {
		e, _ := left.Take(name)
		wg.Go(func() {
			err := end(e)
			p.kept.Drop(name)
			mu.Lock()
			defer mu.Unlock()
			all = append(all, err)
		})
	}
	wg.Wait()
	if p.host.Cgroup != nil {
		p.host.Cgroup.Sweep()
	}
	return errors.Join(all...)
}

func end(e fdstore.Entry) error {
	var r record
	if err := e.Decode(&r, len(e.Files)); err != nil || len(e.Files) == 0 {
		e.Close()
		return errors.Join(err, fmt.Errorf("kept %s: cannot be ended", e.Name))
	}
	r.Guard.PIDFD = e.Files[0]
	ipc.CloseAll(e.Files[1:])
	if err := sandbox.End(r.Guard); err != nil {
		return fmt.Errorf("end %s: %w", r.Guard.Name, err)
	}
	return nil
}
