package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/programs"
)

// A NIC is a vhost-user back end that is reached through a descriptor's name (see vhostuser.Door).
type NIC struct {
	Door *os.File
	MAC  [6]byte
}

// A Disk is one raw disk image, open read-write unless ReadOnly; or a connected stream socket to
// a vhost-user back end, which outlives QEMU.
type Disk struct {
	File     *os.File
	ReadOnly bool
	Socket   *os.File // in place of File
}

// Files are what a machine is made of. A machine takes them over: it hands them to QEMU and
// closes its own copies, whether Start succeeds or not. See [FDs] for which are required.
type Files struct {
	RAM     *os.File // nil: a memfd is made
	Kernel  *os.File
	Initrd  *os.File
	Code    *os.File // nil: the host's OVMF
	Vars    *os.File
	Console *os.File
	Channel *os.File
	Disks   []Disk
	NICs    []NIC
}

// Hooks are called from the machine's goroutines and must not block; nil hooks are skipped.
type Hooks struct {
	FirstTPM func()      // the guest's first TPM command has arrived
	Event    func(Event) // every QMP event
}

// Program is QEMU's name.
const Program = "qemu-system-x86_64"

// stopGrace is how long QEMU has to end after SIGTERM before it is killed.
const stopGrace = 5 * time.Second

// commandTime bounds each QMP command of a machine's own: QEMU answers from its main loop.
const commandTime = 10 * time.Second

// A Machine is one guest under one QEMU process. All methods may be called by any goroutine.
//
// Make it with New, give it as the Guest to the TPM's front end, then Start it with that front
// end as the Transport. It owns the process and six goroutines; all end with the process, and
// the process ends at the latest with Start's context.
type Machine struct {
	config Config
	hooks  Hooks

	cancel context.CancelCauseFunc // set by Start
	tpm    *TPM                    // set by Start; nil without a TPM

	ready chan struct{} // closed when QEMU obeys; qmp and rein are set before
	qmp   *Client
	rein  *rein

	done    chan struct{} // closed when all is over; outcome and err are set before
	outcome Outcome
	err     error

	stderr  tail
	onStart func(pid int) // of tests: the process

	mu       sync.Mutex
	reasons  []string // of SHUTDOWN events
	panicked bool
	killed   error    // why we killed QEMU
	ram      *os.File // guest memory, from Start to the end
	log      []byte   // to be put into the guest's log area
}

// New makes a machine that does not run yet.
func New(config Config, hooks Hooks) *Machine {
	return &Machine{config: config, hooks: hooks, ready: make(chan struct{}), done: make(chan struct{})}
}

// Start starts QEMU and returns once it obeys; the guest runs from then on, or shortly before.
// transport carries out the guest's TPM commands; nil only with NoTPM. When ctx ends, QEMU ends.
// Start is called once; after an error the machine is done.
func (m *Machine) Start(ctx context.Context, files Files, transport Transport) error {
	ctx, m.cancel = context.WithCancelCause(ctx)
	s, err := m.prepare(&files, transport)
	defer s.closeFiles()
	if err == nil {
		err = m.launch(ctx, s, transport)
	}
	if err != nil {
		m.cancel(err)
		m.outcome, m.err = Crash, fmt.Errorf("qemu %s: %w", m.config.Name, err)
		close(m.done)
		return m.err
	}
	return nil
}

// A start is what exists only during Start.
type start struct {
	args       []string
	children   []*os.File          // descriptors 3… of QEMU
	own        []*os.File          // our ends
	qmp, tpm   *os.File            // of own
	rein       [reinConns]*os.File // of own
	memoryFile *os.File            // of children
}

func (s *start) closeFiles() {
	for _, f := range append(s.children, s.own...) {
		_ = f.Close()
	}
}

// give hands f to QEMU and returns its number there; nil is 0.
func (s *start) give(f *os.File) int {
	if f == nil {
		return 0
	}
	s.children = append(s.children, f)
	return 2 + len(s.children)
}

// socket hands one end of a stream socketpair to QEMU.
func (s *start) socket(name string) (own *os.File, number int, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("socketpair for %s: %w", name, err)
	}
	own = os.NewFile(uintptr(fds[0]), name)
	s.own = append(s.own, own)
	return own, s.give(os.NewFile(uintptr(fds[1]), name)), nil
}

func (m *Machine) prepare(files *Files, transport Transport) (*start, error) {
	s := &start{}
	var fd FDs
	fd.Kernel, fd.Initrd = s.give(files.Kernel), s.give(files.Initrd)
	fd.Console, fd.Channel = s.give(files.Console), s.give(files.Channel)
	fd.Vars = s.give(files.Vars)
	for _, d := range files.Disks {
		fd.Disks = append(fd.Disks, DiskFD{FD: s.give(d.File), ReadOnly: d.ReadOnly, Socket: s.give(d.Socket)})
	}
	for _, n := range files.NICs {
		fd.NICs = append(fd.NICs, NICFD{Door: s.give(n.Door), MAC: n.MAC})
	}
	if files.Code == nil && m.config.Firmware == OVMF {
		f, err := os.Open(programs.Path(ovmfCode))
		if err != nil {
			return s, fmt.Errorf("OVMF (Debian package ovmf): %w", err)
		}
		files.Code = f
	}
	fd.Code = s.give(files.Code)
	if files.RAM == nil {
		f, err := newRAM(m.config)
		if err != nil {
			return s, err
		}
		files.RAM = f
	}
	fd.RAM, s.memoryFile = s.give(files.RAM), files.RAM
	if err := checkRAM(files.RAM, m.config.Memory); err != nil {
		return s, err
	}
	var err error
	for _, c := range []struct {
		name string
		own  **os.File
		fd   *int
	}{
		{"qmp", &s.qmp, &fd.QMP},
		{"qmp-stop", &s.rein[reinStop], &fd.Rein[reinStop]},
		{"qmp-cont", &s.rein[reinCont], &fd.Rein[reinCont]},
		{"qmp-look", &s.rein[reinLook], &fd.Rein[reinLook]},
	} {
		if *c.own, *c.fd, err = s.socket(c.name); err != nil {
			return s, err
		}
	}
	if m.config.tpm() != NoTPM {
		if transport == nil {
			return s, errors.New("a TPM device without a transport")
		}
		if s.tpm, fd.TPM, err = s.socket("tpm-control"); err != nil {
			return s, err
		}
	}
	s.args, err = Args(m.config, fd, DataDirs()...)
	return s, err
}

func newRAM(c Config) (*os.File, error) {
	fd, err := unix.MemfdCreate("guest-memory", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd of guest memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "guest-memory")
	if err := f.Truncate(int64(c.Memory)); err != nil {
		return nil, errors.Join(fmt.Errorf("memfd of %d bytes: %w", c.Memory, err), f.Close())
	}
	return f, nil
}

func checkRAM(f *os.File, want uint64) error {
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("guest memory: %w", err)
	}
	if uint64(st.Size()) != want {
		return fmt.Errorf("guest memory: descriptor has %d bytes, the machine %d", st.Size(), want)
	}
	return nil
}

// launch starts the process and connects to it.
func (m *Machine) launch(ctx context.Context, s *start, transport Transport) error {
	ram, err := unix.FcntlInt(s.memoryFile.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("guest memory: %w", err)
	}
	m.setRAM(os.NewFile(uintptr(ram), "guest-memory"))

	starter := m.config.Starter
	if starter == nil {
		starter = programs.Direct{}
	}
	proc, err := starter.Start(ctx, programs.Program{
		Name: Program, Files: s.children, Output: &m.stderr,
		Args: func(string) []string { return s.args },
	})
	if err != nil {
		m.setRAM(nil)
		return err
	}
	if m.onStart != nil {
		m.onStart(proc.PID())
	}
	exited := make(chan error, 1)
	go func() { exited <- m.end(ctx, proc) }() // ends with QEMU
	// Our copies of QEMU's descriptors must be gone, or the end of QEMU would not be seen.
	for _, f := range s.children {
		_ = f.Close()
	}
	if s.tpm != nil {
		m.tpm, err = newTPM(s.tpm, transport, m.beforeReply, m.hooks.FirstTPM)
	}
	if err == nil {
		err = m.connect(ctx, s)
	}
	if err != nil {
		m.cancel(err)
		exit := <-exited
		// Only now is all of stderr there. Where QEMU gave a reason, that is the reason; else
		// how it ended, else how the connection did.
		if said := m.stderr.err(); said != nil {
			err = said
		} else if errors.Is(err, ErrQMPClosed) && exit != nil {
			err = exit
		}
		if m.tpm != nil {
			_ = m.tpm.Close()
		}
		m.setRAM(nil)
		return err
	}
	go m.supervise(ctx, exited)
	return nil
}

func (m *Machine) connect(ctx context.Context, s *start) error {
	c, err := ipc.Socket(s.qmp)
	if err != nil {
		return err
	}
	if m.qmp, err = NewClient(ctx, c, m.event); err != nil {
		return err
	}
	if m.rein, err = newRein(ctx, s.rein); err != nil {
		return errors.Join(err, m.qmp.Close())
	}
	close(m.ready)
	return nil
}

// setRAM replaces the descriptor of guest memory and closes the one before.
func (m *Machine) setRAM(f *os.File) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ram != nil {
		_ = m.ram.Close()
	}
	m.ram = f
}

// end waits for the end of QEMU and sees to it once ctx has ended.
func (m *Machine) end(ctx context.Context, proc programs.Running) error {
	exited := make(chan error, 1)
	go func() { exited <- proc.Wait() }()
	select {
	case err := <-exited:
		return err
	case <-ctx.Done():
	}
	select {
	case <-m.ready:
		proc.Terminate()
	default:
		proc.Kill() // it may not take the signal yet
	}
	grace := time.NewTimer(stopGrace)
	defer grace.Stop()
	select {
	case err := <-exited:
		return err
	case <-grace.C:
	}
	proc.Kill()
	select {
	case <-m.ready:
		// Who started QEMU may be gone, and with it who could end it: it is told itself.
		_ = m.command("quit")
	default:
	}
	return <-exited
}

// supervise ends the machine: when the process ends, or when its TPM has failed.
func (m *Machine) supervise(ctx context.Context, exited <-chan error) {
	var exit error
	select {
	case exit = <-exited:
	case <-m.tpmFailed():
		err := m.tpm.Err()
		if err != nil {
			m.mu.Lock()
			m.killed = fmt.Errorf("the guest's TPM failed: %w", err)
			m.mu.Unlock()
			m.cancel(err)
		}
		exit = <-exited
	}
	asked := ctx.Err() != nil
	m.cancel(nil)
	<-m.qmp.Done() // its events come before its end
	_ = m.qmp.Close()
	_ = m.rein.close()
	if m.tpm != nil {
		_ = m.tpm.Close()
	}
	m.finish(asked, exit)
	m.setRAM(nil)
	close(m.done)
}

// tpmFailed is closed when the TPM serves no more; nil (never) without a TPM.
func (m *Machine) tpmFailed() <-chan struct{} {
	if m.tpm == nil {
		return nil
	}
	return m.tpm.Done()
}

// finish decides the outcome from what QEMU said last and how it ended.
func (m *Machine) finish(asked bool, exit error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	reason := ""
	if len(m.reasons) > 0 {
		reason = m.reasons[0] // the first cause; what follows are its effects
	}
	m.outcome = outcomeOf(reason)
	switch {
	case m.killed != nil:
		m.outcome, m.err = Crash, m.killed
	case m.panicked:
		m.outcome = Crash
	case reason == "" && asked:
		m.outcome = Stopped
	case reason == "":
		m.outcome = Crash
		m.err = fmt.Errorf("qemu %s ended: %w", m.config.Name, orNil(exit))
		if said := m.stderr.err(); said != nil {
			m.err = fmt.Errorf("%w: %w", m.err, said)
		}
	}
}

func orNil(err error) error {
	if err == nil {
		return errors.New("without a reason")
	}
	return err
}

// event runs on the QMP reader's goroutine.
func (m *Machine) event(e Event) {
	switch e.Name {
	case "SHUTDOWN":
		var d struct {
			Reason string `json:"reason"`
		}
		if json.Unmarshal(e.Data, &d) == nil {
			m.mu.Lock()
			if len(m.reasons) < 4 {
				m.reasons = append(m.reasons, d.Reason)
			}
			m.mu.Unlock()
		}
	case "GUEST_PANICKED":
		m.mu.Lock()
		m.panicked = true
		m.mu.Unlock()
	}
	if m.hooks.Event != nil {
		m.hooks.Event(e)
	}
}
