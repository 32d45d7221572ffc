package sandbox

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/pidfd"
)

// A Host is what the parent contributes to sandboxes. The zero Host uses the running program as
// the launcher (its main must call [LauncherMain]) and finds a cgroup itself.
type Host struct {
	Launcher string  // a program that calls LauncherMain; "": the running one
	Cgroup   *Cgroup // beneath which processes with a memory limit are put; nil: [FindCgroup]
}

// A Guard is one process and its sandbox, from Prepare to Wait. It owns a goroutine between Start
// and Wait.
type Guard struct {
	// Hold, which may be set before Start, is called twice: once the process is there, before it does
	// anything (h has no Notes then), and again once all of its sandbox is there but the program. That does
	// not run if Hold fails. It keeps copies of what [End], then [Adopt] needs. A process that is not held yet ends
	// with this one.
	Hold func(Held) error

	cmd   *exec.Cmd // nil for one that was adopted
	held  *Held     // of one that was adopted
	spec  *Spec
	learn bool
	sync  *os.File   // to the launcher
	files []*os.File // the child's; closed once it has them
	base  int        // the first of them in the child
	pidfd int
	group *group // nil without a memory limit by cgroup

	notes   *os.File // the listening descriptor
	watched chan struct{}

	mu        sync.Mutex // over group's end, too
	limit     uint64     // of memory
	violation *Violation
	learned   map[string]int
}

// startLimit bounds the launcher, which works for milliseconds.
const startLimit = 20 * time.Second

// Prepare turns cmd, which is not started, into the start of its program in the sandbox. cmd is
// given as for a start without one: Path on the host, Args, Env (nil means none), ExtraFiles,
// standard streams, SysProcAttr. It is then started and waited for by the Guard. A Guard that
// is not started must be given to Discard.
func (h *Host) Prepare(cmd *exec.Cmd, spec *Spec) (*Guard, error) {
	if err := spec.Check(); err != nil {
		return nil, err
	}
	g := &Guard{cmd: cmd, spec: spec, learn: spec.Learn, pidfd: -1, limit: spec.Memory, learned: map[string]int{}}
	if err := g.prepare(h); err != nil {
		g.Discard()
		return nil, fmt.Errorf("sandbox of %s: %w", spec.Name, err)
	}
	return g, nil
}

func (g *Guard) prepare(h *Host) error {
	cmd, spec := g.cmd, g.spec
	if cmd.Err != nil {
		return cmd.Err
	}
	if cmd.Dir != "" {
		return errors.New("a program in a sandbox starts in /")
	}
	s := &launchSpec{
		Root: spec.Root, Proc: spec.Proc, UID: spec.UID, GID: spec.GID, Groups: spec.Groups,
		Capabilities: spec.Capabilities,
		Files:        orDefault(spec.Files, DefaultFiles), Processes: orDefault(spec.Processes, DefaultProcesses),
		OwnUTS: !spec.shares(UTS), Umask: spec.umask(),
	}
	if _, err := landlockABI(); err != nil {
		if !spec.optional(Landlock) {
			return err
		}
		s.NoLandlock = true
	}
	if spec.Memory > 0 {
		if err := g.limitMemory(h, s); err != nil {
			return err
		}
	}
	filter, err := spec.Policy.told()
	if err != nil {
		return err
	}
	c := config{Spec: s, Filter: filter, Args: cmd.Args, Env: append([]string{}, cmd.Env...), OwnUser: !spec.shares(User)}
	if len(c.Args) == 0 {
		c.Args = []string{cmd.Path}
	}
	if err := g.childFiles(h, &c); err != nil {
		return err
	}
	g.base = 3 + len(cmd.ExtraFiles)
	launcher := g.base + len(g.files) - 1 // the last of childFiles
	cmd.ExtraFiles = append(slices.Clip(cmd.ExtraFiles), g.files...)
	cmd.Path = "/proc/self/fd/" + strconv.Itoa(launcher)
	cmd.Args = []string{launcherName, strconv.Itoa(g.base)}
	cmd.Env = launcherEnv
	g.attributes()
	return nil
}

// attributes adds namespaces, identity and a pidfd to the process's attributes.
func (g *Guard) attributes() {
	a := &syscall.SysProcAttr{}
	if g.cmd.SysProcAttr != nil {
		c := *g.cmd.SysProcAttr
		a = &c
	}
	a.Cloneflags |= g.spec.cloneFlags()
	a.PidFD = &g.pidfd
	if !g.spec.shares(User) {
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(g.spec.UID), Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(g.spec.GID), Size: 1}}
		a.GidMappingsEnableSetgroups = true
		// Without this the parent's supplementary groups would stay, unmapped but in force.
		a.Credential = &syscall.Credential{}
		for i, gid := range g.spec.Groups {
			a.GidMappings = append(a.GidMappings, syscall.SysProcIDMap{ContainerID: i + 1, HostID: int(gid), Size: 1})
			a.Credential.Groups = append(a.Credential.Groups, uint32(i+1))
		}
	}
	g.cmd.SysProcAttr = a
}

// childFiles makes the launcher's descriptors, in the order of fdSync …, the launcher's own
// program last.
func (g *Guard) childFiles(h *Host, c *config) error {
	own, theirs, err := syncPair()
	if err != nil {
		return err
	}
	g.sync = own
	g.files = append(g.files, theirs)
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("sandbox", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "configuration")
	g.files = append(g.files, f)
	if _, err := f.WriteAt(text, 0); err != nil { // leaves the offset at 0
		return err
	}
	if err := g.open(g.cmd.Path); err != nil {
		return err
	}
	for _, b := range c.Spec.Root {
		f, err := detached(b)
		if err != nil {
			return fmt.Errorf("root entry %s: %w", b.target(), err)
		}
		g.files = append(g.files, f)
	}
	launcher := h.Launcher
	if launcher == "" {
		launcher = "/proc/self/exe"
	}
	return g.open(launcher)
}

// open gives a program to the launcher.
func (g *Guard) open(program string) error {
	f, err := os.OpenFile(program, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err == nil {
		g.files = append(g.files, f)
	}
	return err
}

func syncPair() (own, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	if err := unix.SetNonblock(fds[0], true); err != nil { // for the time limit; the child's end blocks
		return nil, nil, errors.Join(err, unix.Close(fds[0]), unix.Close(fds[1]))
	}
	return os.NewFile(uintptr(fds[0]), "sandbox"), os.NewFile(uintptr(fds[1]), "sandbox"), nil
}

// detached is a mount of b's source that is attached nowhere: the child, whose user could often
// not reach the source by its path, puts it in place. A link has a descriptor that says nothing,
// so that numbers stay in step.
func detached(b Bind) (*os.File, error) {
	if b.Link != "" {
		return os.OpenFile(os.DevNull, unix.O_PATH|unix.O_CLOEXEC, 0)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, b.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, err
	}
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID, Propagation: unix.MS_PRIVATE}
	if !b.Device {
		attr.Attr_set |= unix.MOUNT_ATTR_NODEV
	}
	if !b.Writable {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if b.NoExec {
		attr.Attr_set |= unix.MOUNT_ATTR_NOEXEC
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, attr); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), b.Source), nil
}

// Discard frees what Prepare made; the process is not started.
func (g *Guard) Discard() {
	g.closeFiles()
	if g.sync != nil {
		g.sync.Close()
	}
	_ = g.dropGroup() // empty: nothing was started
}

func (g *Guard) closeFiles() {
	for _, f := range g.files {
		f.Close()
	}
	g.files = nil
}

// Start starts the process and returns once the program runs, all of its sandbox in force. After
// an error nothing is left running.
func (g *Guard) Start() error {
	err := g.cmd.Start()
	if err != nil {
		g.Discard()
		return fmt.Errorf("sandbox of %s: start: %w", g.spec.Name, err)
	}
	g.closeFiles()
	err = g.enter()
	g.sync.Close()
	if err != nil {
		_ = g.cmd.Process.Kill()
		_ = g.cmd.Wait()
		g.closeNotes()
		if v := g.Violation(); v != nil {
			err = v
		}
		err = errors.Join(err, g.dropGroup())
		return fmt.Errorf("sandbox of %s: %w", g.spec.Name, err)
	}
	g.watched = make(chan struct{})
	go g.watch()
	return nil
}

// enter sees the launcher through.
func (g *Guard) enter() error {
	defer func() {
		if g.pidfd >= 0 {
			unix.Close(g.pidfd)
			g.pidfd = -1
		}
	}()
	if g.pidfd < 0 {
		return errors.New("this kernel gives no pidfd (Linux 5.4)")
	}
	if err := g.joined(); err != nil {
		return err
	}
	if g.group != nil {
		if err := g.group.add(g.cmd.Process.Pid); err != nil {
			return err
		}
	}
	if err := g.hold(); err != nil {
		return err
	}
	if err := g.sync.SetDeadline(time.Now().Add(startLimit)); err != nil {
		return err
	}
	if _, err := g.sync.Write([]byte{msgGo}); err != nil {
		return err
	}
	kind, number, err := g.receive()
	if err != nil {
		return err
	}
	if kind != msgFilter {
		return fmt.Errorf("launcher: unexpected message %q", kind)
	}
	fd, err := unix.PidfdGetfd(g.pidfd, int(number), 0)
	if err != nil {
		return fmt.Errorf("seccomp notifications: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	g.notes = os.NewFile(uintptr(fd), "seccomp")
	if err := g.hold(); err != nil {
		return err
	}
	if err := g.letExec(); err != nil {
		return err
	}
	kind, number, err = g.receive()
	if errors.Is(err, io.EOF) {
		return nil // closed by execve
	}
	if err == nil && kind == msgExec {
		err = fmt.Errorf("execve: %w (is its loader in the root, and may its user execute it?)", unix.Errno(number))
	}
	if err == nil {
		err = fmt.Errorf("launcher: unexpected message %q", kind)
	}
	return err
}

// joined checks that the process was born in the network namespace that it is given.
func (g *Guard) joined() error {
	if g.spec.NetworkNamespace == nil {
		return nil
	}
	want, err := networkName(g.spec.NetworkNamespace)
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	is, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", g.cmd.Process.Pid))
	if err == nil && is != want {
		err = fmt.Errorf("was started in %s, not in %s", is, want)
	}
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	return nil
}

// receive takes one message of the launcher.
func (g *Guard) receive() (kind byte, number uint32, err error) {
	b := make([]byte, 1024)
	n, err := g.sync.Read(b)
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = errors.New("the launcher does not answer")
		}
		return 0, 0, err
	}
	if b[0] == msgFailed {
		return 0, 0, errors.New(string(b[1:n]))
	}
	if n != 5 {
		return 0, 0, fmt.Errorf("launcher: message of %d bytes", n)
	}
	return b[0], binary.LittleEndian.Uint32(b[1:]), nil
}

// letExec lets the launcher's execveat pass: the first call that is told, of that descriptor.
func (g *Guard) letExec() error {
	if err := g.notes.SetReadDeadline(time.Now().Add(startLimit)); err != nil {
		return fmt.Errorf("seccomp notifications: %w", err)
	}
	n, err := awaitNote(g.notes)
	if err != nil {
		return err
	}
	if err := g.notes.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	if n.data.arch != unix.AUDIT_ARCH_X86_64 || n.data.number != unix.SYS_EXECVEAT ||
		n.data.args[0] != uint64(g.base+fdProgram) || n.data.args[4] != unix.AT_EMPTY_PATH {
		return g.violate(n)
	}
	return letPass(g.notes, n.id)
}

// watch takes calls outside the list until the process is gone.
func (g *Guard) watch() {
	defer close(g.watched)
	for {
		n, err := awaitNote(g.notes)
		if err != nil {
			return // no more users of the filter, or closed by Wait
		}
		if g.learn {
			g.record(n)
			_ = letPass(g.notes, n.id) // fails only if the thread is gone
			continue
		}
		_ = g.violate(n)
		// The call stays held until the process is dead.
		_ = g.Signal(unix.SIGKILL)
	}
}

func (g *Guard) closeNotes() {
	if g.notes != nil {
		g.notes.Close()
	}
}

// Wait waits for the end of the process, as exec.Cmd's Wait does, and frees what belongs to the
// sandbox. Where the sandbox ended the process the error is a [*Violation]; where the memory
// limit did, [ErrMemory].
func (g *Guard) Wait() error {
	err := g.awaitEnd()
	// All notes that were sent are read: the last user of the filter is gone, which the kernel
	// says on the descriptor.
	if g.notes != nil {
		_ = g.notes.SetReadDeadline(time.Now().Add(startLimit))
	}
	<-g.watched
	g.closeNotes()
	if v := g.Violation(); v != nil {
		err = v
	} else if g.group != nil && g.group.oomKills() > 0 {
		err = fmt.Errorf("%s: %w of %d bytes", g.spec.Name, ErrMemory, g.limit)
	}
	if derr := g.dropGroup(); derr != nil && err == nil {
		err = derr
	}
	return err
}

// PID is the process's number in the parent's namespace.
func (g *Guard) PID() int {
	if g.held != nil {
		return g.held.PID
	}
	return g.cmd.Process.Pid
}

// Signal sends a signal; see the package's text on which ones process 1 obeys.
func (g *Guard) Signal(s syscall.Signal) error {
	if g.held != nil {
		return pidfd.Signal(g.held.PIDFD, s)
	}
	return g.cmd.Process.Signal(s)
}
