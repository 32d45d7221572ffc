package builder

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/foreign"
)

// processes starts every process in its sandbox and knows those that run.
type processes struct {
	logs string
	host sandbox.Host
	wg   sync.WaitGroup // foreign programs

	mu      sync.Mutex
	base    uint32 // first of the users that are Redoubt's
	next    uint32 // where the search for a free one goes on
	running map[uint32]*instance
}

// An instance is a process that runs.
type instance struct {
	service *services.Service
	spec    *sandbox.Spec
	pid     int
	gone    chan struct{} // closed when it is no more
}

// DefaultUsers is the first of the user ids of services where the operator names none. It is
// beyond those that distributions give to people, services and containers.
const DefaultUsers = 0x52440000

// Redoubt's users: those of services of which there is one, with a directory, come first, in the order
// of [services.Table], because directories are theirs for long; then those of all others.
const (
	firstFree = 64
	users     = 1 << 16
)

func newProcesses(logs string, base uint32) *processes {
	if base == 0 {
		base = DefaultUsers
	}
	return &processes{logs: logs, base: base, next: firstFree, running: map[uint32]*instance{}}
}

// user is the user of a service of which there is one.
func (p *processes) user(s *services.Service) uint32 {
	for i := range services.Table {
		if &services.Table[i] == s {
			return p.base + uint32(i)
		}
	}
	panic("builder: " + s.Name + " is not in the table")
}

// take finds a user for an instance, of nobody else.
func (p *processes) take(s *services.Service) (uint32, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.Count == services.One && s.State == services.ReadWrite {
		id := p.user(s)
		if p.running[id] != nil {
			return 0, fmt.Errorf("%s runs already", s.Name)
		}
		p.running[id] = &instance{service: s, gone: make(chan struct{})}
		return id, nil
	}
	for range users - firstFree {
		id := p.base + p.next
		if p.next++; p.next == users {
			p.next = firstFree
		}
		if p.running[id] == nil {
			p.running[id] = &instance{service: s, gone: make(chan struct{})}
			return id, nil
		}
	}
	return 0, errors.New("all users of services are taken")
}

func (p *processes) release(id uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := p.running[id]; i != nil {
		close(i.gone)
		delete(p.running, id)
	}
}

// awaitEnd waits until a service of which there is one has ended and its user is free again.
func (p *processes) awaitEnd(name string) {
	p.mu.Lock()
	var gone chan struct{}
	for _, i := range p.running {
		if i.service.Name == name {
			gone = i.gone
		}
	}
	p.mu.Unlock()
	if gone != nil {
		<-gone
	}
}

// note keeps what runs as a user.
func (p *processes) note(id uint32, spec *sandbox.Spec, pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running[id].spec, p.running[id].pid = spec, pid
}

// start starts one of our programs in its sandbox. whose names the guest of a service of which
// there are several; dir is the directory of one that has one.
func (p *processes) start(name, whose, dir string, memory uint64) (*process.Process, error) {
	s, err := services.Find(name)
	if err != nil {
		return nil, err
	}
	id, err := p.take(s)
	if err != nil {
		return nil, err
	}
	i := services.Instance{Label: s.Program, UID: id, StateDir: dir, Memory: memory}
	if whose != "" {
		i.Label = name + "-" + whose
	}
	proc, err := p.startInstance(s, i)
	if err != nil {
		p.release(id)
		return nil, err
	}
	return proc, nil
}

// startIn starts a service of which there is one in Redoubt's network namespace; memory is that of
// the guests it serves.
func (p *processes) startIn(ns *network.Namespace, name string, memory uint64) (*process.Process, error) {
	s, err := services.Find(name)
	if err != nil {
		return nil, err
	}
	id, err := p.take(s)
	if err != nil {
		return nil, err
	}
	i := services.Instance{Label: s.Program, UID: id, Memory: memory, Network: ns.File()}
	var proc *process.Process
	err = ns.Do(func() (err error) { proc, err = p.startInstance(s, i); return err })
	if err != nil {
		p.release(id)
		return nil, err
	}
	return proc, nil
}

// growMemory raises the limit of a service's running processes.
func (p *processes) growMemory(proc *process.Process, limit uint64) error {
	if err := proc.GrowMemory(limit); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, i := range p.running {
		if i.spec != nil && i.pid == proc.PID() && i.spec.Memory < limit {
			grown := *i.spec // the sandbox has the other one
			grown.Memory = limit
			i.spec = &grown
		}
	}
	return nil
}

func (p *processes) startInstance(s *services.Service, i services.Instance) (*process.Process, error) {
	if i.StateDir != "" {
		if err := give(i.StateDir, i.UID, i.UID); err != nil {
			return nil, err
		}
	}
	spec, err := s.Sandbox(i)
	if err != nil {
		return nil, err
	}
	proc, err := process.Start(process.Options{Program: s.Program, Label: i.Label, LogDir: p.logs, Sandbox: spec, Host: p.host})
	if err != nil {
		return nil, err
	}
	p.note(i.UID, spec, proc.PID())
	p.wg.Go(func() {
		<-proc.Done()
		p.release(i.UID)
	})
	return proc, nil
}

// program starts another's program for the service that asked for it by [foreign.Method]; i.StateDir
// is that service's own directory, beneath which the program's lies.
func (p *processes) program(r *rpc.Request, name string, i services.Instance) (foreign.Started, error) {
	defer closeAll(r.Files)
	s, err := services.Find(name)
	if err != nil {
		return foreign.Started{}, err
	}
	q, f, err := foreign.Take(r)
	if err != nil {
		return foreign.Started{}, err
	}
	if q.Name != s.Program {
		return foreign.Started{}, rpc.Errorf(rpc.Refused, "%s: it may ask for %s only", q.Name, s.Program)
	}
	if i.UID, err = p.take(s); err != nil {
		return foreign.Started{}, err
	}
	if i.GID == 0 {
		i.GID = i.UID
	}
	pid, err := p.startProgram(s, i, q, f)
	if err != nil {
		p.release(i.UID)
		return foreign.Started{}, err
	}
	return foreign.Started{PID: pid}, nil
}

func (p *processes) startProgram(s *services.Service, i services.Instance, q foreign.Request, f foreign.Files) (int, error) {
	if q.Dir == "" {
		i.StateDir = ""
	} else {
		dir, err := openBeneath(i.StateDir, q.Dir, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return 0, fmt.Errorf("its directory %s: %w", q.Dir, err)
		}
		defer dir.Close()
		// What was checked is what is used, whatever happens to names meanwhile.
		i.StateDir = fmt.Sprintf("/proc/self/fd/%d", dir.Fd())
		if err := give(i.StateDir, i.UID, i.GID); err != nil {
			return 0, err
		}
	}
	spec, err := s.Sandbox(i)
	if err != nil {
		return 0, err
	}
	path, err := programs.Find(s.Program)
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(path, q.Args...)
	cmd.Env, cmd.ExtraFiles = programs.Env(), f.Program
	cmd.Stdout, cmd.Stderr = f.Output, f.Output
	g, err := p.host.Prepare(cmd, spec)
	if err != nil {
		return 0, err
	}
	line, err := duplicate(f.Lifeline)
	if err != nil {
		g.Discard()
		return 0, err
	}
	if err := g.Start(); err != nil {
		line.Close()
		return 0, err
	}
	p.note(i.UID, spec, g.PID())
	pid := g.PID()
	p.wg.Go(func() {
		foreign.Keep(g, func() *os.ProcessState { return cmd.ProcessState }, line)
		p.release(i.UID)
	})
	return pid, nil
}

func duplicate(f *os.File) (*os.File, error) {
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		return nil, err
	}
	syscall.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// duplicates are copies of descriptors; none after an error.
func duplicates(files []*os.File) (out []*os.File, err error) {
	for _, f := range files {
		d, err := duplicate(f)
		if err != nil {
			closeAll(out)
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// give makes a directory and all in it a user's. Its group has the directory's rights too: that of
// a TPM's state is the manager's.
func give(dir string, uid, gid uint32) error {
	r, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	if st, err := r.Stat("."); err != nil || owner(st) == [2]uint32{uid, gid} {
		return err
	}
	err = fs.WalkDir(r.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		// A second name of a file could be one of somebody else's.
		if s, ok := st.Sys().(*syscall.Stat_t); !ok || !d.IsDir() && (s.Nlink != 1 || !d.Type().IsRegular()) {
			return fmt.Errorf("%s is not a file with one name", path)
		}
		return r.Lchown(path, int(uid), int(gid))
	})
	if err != nil {
		return fmt.Errorf("%s: make it user %d's: %w", filepath.Clean(dir), uid, err)
	}
	return nil
}

func owner(st fs.FileInfo) [2]uint32 {
	s, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return [2]uint32{}
	}
	return [2]uint32{s.Uid, s.Gid}
}
