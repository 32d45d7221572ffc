// Package launch starts Redoubt's services, and the foreign programs that they ask for, each in the
// sandbox that [services.Table] says and as a user of nobody else, and knows which run.
package launch

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/fdstore"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/foreign"
	"redoubt.dev/redoubt/services/pool"
	"redoubt.dev/redoubt/services/protocol"
)

// A Launcher starts processes. Its methods may be called concurrently.
type Launcher struct {
	logs string
	kept *fdstore.Store
	host sandbox.Host
	wg   sync.WaitGroup // all that was started

	mu      sync.Mutex
	base    uint32 // first of the users that are Redoubt's
	next    uint32 // where the search for a free one goes on
	running map[uint32]*instance
}

// An instance is a process that runs.
type instance struct {
	service  *services.Service
	user     uint32
	label    string // "" while it is being started
	declared sandbox.State
	pid      int
	done     <-chan struct{} // closed when it has ended; nil while it is being started, and of a foreign one
	gone     chan struct{}   // closed when its user is free again
}

// ended says that its user is free again, though release may not have come yet.
func (i *instance) ended() bool {
	select {
	case <-i.done:
		return true
	default:
		return false
	}
}

// Redoubt's users: those of services of which there is one, with a directory, come first, in the order
// of [services.Table], because directories are theirs for long; then those of all others.
const (
	firstFree = 64
	users     = 1 << 16
)

// LauncherProgram is what the Builder's processes pass through; it lies beside the Builder's program.
const LauncherProgram = "redoubt-launcher"

// Open is New with the launcher beside the running program, and with this process's cgroup, looked for
// once. Where there is none, each start that needs one says so.
func Open(logs string, base uint32, kept *fdstore.Store) (*Launcher, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	h := sandbox.Host{Launcher: filepath.Join(filepath.Dir(self), LauncherProgram)}
	h.Cgroup, _ = sandbox.FindCgroup()
	return New(logs, base, kept, h), nil
}

// New makes a Launcher whose processes log into a directory; base is the first of 65536 user ids that
// are theirs, 0 for [services.DefaultUsers]. What the next Builder must know of each process is kept.
func New(logs string, base uint32, kept *fdstore.Store, host sandbox.Host) *Launcher {
	if base == 0 {
		base = services.DefaultUsers
	}
	return &Launcher{logs: logs, kept: kept, host: host, base: base, next: firstFree, running: map[uint32]*instance{}}
}

// User is the user of a service of which there is one.
func (p *Launcher) User(s *services.Service) uint32 {
	for i := range services.Table {
		if &services.Table[i] == s {
			return p.base + uint32(i)
		}
	}
	panic("launch: " + s.Name + " is not in the table")
}

// take finds a user for an instance, of nobody else.
func (p *Launcher) take(s *services.Service) (*instance, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.Count == services.One && s.State == services.ReadWrite {
		id := p.User(s)
		if i := p.running[id]; i != nil && !i.ended() {
			return nil, fmt.Errorf("%s runs already", s.Name)
		}
		return p.takes(id, s), nil
	}
	for range users - firstFree {
		id := p.base + p.next
		if p.next++; p.next == users {
			p.next = firstFree
		}
		if p.running[id] == nil {
			return p.takes(id, s), nil
		}
	}
	return nil, errors.New("all users of services are taken")
}

// takes gives a user to a service's process that is to be started; mu is held.
func (p *Launcher) takes(id uint32, s *services.Service) *instance {
	i := &instance{service: s, user: id, gone: make(chan struct{})}
	p.running[id] = i
	return i
}

// release ends what take began, once the process is gone or could not be started.
func (p *Launcher) release(i *instance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(i.gone)
	if p.running[i.user] == i {
		delete(p.running, i.user)
	}
	if i.pid != 0 {
		p.kept.Drop(entry(i.pid))
	}
}

// note keeps what runs.
func (p *Launcher) note(i *instance, spec *sandbox.Spec, done <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i.label, i.declared, i.done = spec.Name, spec.Declared(), done
}

// An Order says what is to be started of a service.
type Order struct {
	Whose    string // the guest or tenant, of a service of which there are several
	StateDir string // of one that has a directory
	Memory   uint64 // of the guests it serves, in bytes
	Network  *network.Namespace
}

// Start starts one of our programs in its sandbox.
func (p *Launcher) Start(name string, o Order) (proc *process.Process, err error) {
	s, err := services.Find(name)
	if err != nil {
		return nil, err
	}
	of, err := p.take(s)
	if err != nil {
		return nil, err
	}
	i := services.Instance{Label: s.Program, UID: of.user, StateDir: o.StateDir, Memory: o.Memory}
	if o.Whose != "" {
		i.Label = name + "-" + o.Whose
	}
	if o.Network == nil {
		proc, err = p.startInstance(of, i)
	} else {
		i.Network = o.Network.File()
		err = o.Network.Do(func() (err error) { proc, err = p.startInstance(of, i); return err })
	}
	if err != nil {
		p.release(of)
		return nil, err
	}
	return proc, nil
}

// GrowMemory raises the limit of a service's running processes.
func (p *Launcher) GrowMemory(proc *process.Process, limit uint64) error {
	if err := proc.GrowMemory(limit); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, i := range p.running {
		if i.label != "" && i.pid == proc.PID() {
			i.declared.Memory = max(i.declared.Memory, sandbox.WholePages(limit))
		}
	}
	return nil
}

// List is what runs, by label.
func (p *Launcher) List() []protocol.RunningService {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := []protocol.RunningService{}
	for _, i := range p.running {
		if i.label != "" { // else it is being started
			out = append(out, protocol.RunningService{Service: i.service.Name, Label: i.label, PID: i.pid, Declared: i.declared})
		}
	}
	slices.SortFunc(out, func(a, b protocol.RunningService) int { return strings.Compare(a.Label, b.Label) })
	return out
}

// AwaitOthers waits until every process of a service is gone but those with the numbers.
func (p *Launcher) AwaitOthers(ctx context.Context, name string, but []int) error {
	p.mu.Lock()
	var gone []chan struct{}
	for _, i := range p.running {
		if i.service.Name == name && !slices.Contains(but, i.pid) {
			gone = append(gone, i.gone)
		}
	}
	p.mu.Unlock()
	for _, c := range gone {
		select {
		case <-c:
		case <-ctx.Done():
			return fmt.Errorf("the last %s: %w", name, ctx.Err())
		}
	}
	return nil
}

// Wait waits until all that was started has ended.
func (p *Launcher) Wait() { p.wg.Wait() }

func (p *Launcher) startInstance(of *instance, i services.Instance) (*process.Process, error) {
	if i.StateDir != "" {
		if err := give(i.StateDir, i.UID, i.UID); err != nil {
			return nil, err
		}
	}
	spec, err := of.service.Sandbox(i)
	if err != nil {
		return nil, err
	}
	proc, err := process.Start(process.Options{
		Program: of.service.Program, Label: i.Label, LogDir: p.logs, Sandbox: spec, Host: p.host,
		Hold: func(h process.Held) error { return p.hold(of, i, h.Guard, h.Control, h.Output) },
	})
	if err != nil {
		return nil, err
	}
	p.note(of, spec, proc.Done())
	p.follow(of, proc)
	return proc, nil
}

// follow frees a process's user when it has ended.
func (p *Launcher) follow(of *instance, proc *process.Process) {
	p.wg.Go(func() {
		<-proc.Done()
		p.release(of)
	})
}

// Program starts another's program for the service that asked for it by [foreign.Method]; i.StateDir
// is that service's own directory, beneath which the program's lies.
func (p *Launcher) Program(r *rpc.Request, name string, i services.Instance) (foreign.Started, error) {
	defer ipc.CloseAll(r.Files)
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
	of, err := p.take(s)
	if err != nil {
		return foreign.Started{}, err
	}
	i.UID = of.user
	if i.GID == 0 {
		i.GID = i.UID
	}
	pid, err := p.startProgram(of, i, q, f)
	if err != nil {
		p.release(of)
		return foreign.Started{}, err
	}
	return foreign.Started{PID: pid}, nil
}

func (p *Launcher) startProgram(of *instance, i services.Instance, q foreign.Request, f foreign.Files) (int, error) {
	if q.Dir == "" {
		i.StateDir = ""
	} else {
		dir, err := pool.OpenBeneath(i.StateDir, q.Dir, unix.O_RDONLY|unix.O_DIRECTORY)
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
	spec, err := of.service.Sandbox(i)
	if err != nil {
		return 0, err
	}
	path, err := programs.Find(of.service.Program)
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
	line, err := ipc.Duplicate(f.Lifeline)
	if err != nil {
		g.Discard()
		return 0, err
	}
	g.Hold = func(h sandbox.Held) error { return p.hold(of, i, h, line[0]) }
	if err := g.Start(); err != nil {
		line[0].Close()
		return 0, err
	}
	p.note(of, spec, nil)
	p.see(of, g, func() *os.ProcessState { return cmd.ProcessState }, line[0])
	return g.PID(), nil
}

// see sees a foreign program through.
func (p *Launcher) see(of *instance, g *sandbox.Guard, state func() *os.ProcessState, line *os.File) {
	p.wg.Go(func() {
		foreign.Keep(g, state, line)
		p.release(of)
	})
}

// give makes a directory and all in it a user's. Its group has the directory's rights too: that of
// a TPM's state is the manager's.
func give(dir string, uid, gid uint32) error {
	r, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	if st, err := r.Stat("."); err != nil || Owner(st) == [2]uint32{uid, gid} {
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

// Owner is a file's user and group.
func Owner(st fs.FileInfo) [2]uint32 {
	s, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return [2]uint32{}
	}
	return [2]uint32{s.Uid, s.Gid}
}
