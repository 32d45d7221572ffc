// Package builder is the Builder: it starts every other process, makes guests, measures what
// it hands to them, and carries descriptors from one process to another. Nobody else opens
// /dev/kvm or makes guest memory.
//
// A guest's start: the emulator runs the kernel at once; beside it the store is told, the
// vTPM back end attached, the vTPM created and the measurements made. What joins the two
// sides again is the gate, in the vTPM back end.
//
// Failure: whatever goes wrong on the vTPM's side fails the guest closed. An emulator that
// ends, however it ends, yields one outcome. When the Builder ends, every child sees its
// control connection end and ends itself in an orderly way.
package builder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
	storesvc "redoubt.dev/redoubt/services/store"
	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
)

// Config of a Builder.
type Config struct {
	RunDir   string // sockets, logs and the lock; lost at a reboot
	StateDir string // what must outlive the host's reboot
	HostTPM  string // device or socket of the host's TPM; "" for none
	Pool     string // beneath which files that specs name must lie; "": /
	// Resets says how often a service is replaced that runs well; 0 or nothing: never. Only those in
	// Resettable may be named.
	Resets map[string]time.Duration
	Users  uint32 // the first of 65536 user ids for services; 0: DefaultUsers
	Log    *slog.Logger
	Ready  func() // called once the API is served
}

// Resettable are the services whose processes are replaced under running guests.
var Resettable = []string{services.BlkBack}

// Names in the run directory.
const (
	APISocket = "api.sock"
	LockFile  = "lock" // held while a Builder runs; holds its process id
	LogDir    = "log"
)

// Builder is the running service.
type Builder struct {
	cfg   Config
	log   *slog.Logger
	procs *processes

	store        *client.Client
	storeWorkers *storesvc.Spawner
	storePeer    *rpc.Peer
	vtpm         *rpc.Peer
	toolstack    *rpc.Peer

	mu      sync.Mutex
	guests  map[string]*guest
	next    tree.Domain
	closing bool // no new guests

	toolstackDone chan struct{}  // closed when no call of the toolstack is under way any more
	wg            sync.WaitGroup // everything Run must wait for
}

// stopGrace bounds how long children may take to end with their Builder.
const stopGrace = 10 * time.Second

// Run starts the services, serves until ctx ends or a service dies, and ends everything.
func Run(ctx context.Context, cfg Config) error {
	b := &Builder{cfg: cfg, log: cfg.Log, guests: map[string]*guest{}, next: server.FirstGuest, toolstackDone: make(chan struct{})}
	logs := filepath.Join(cfg.RunDir, LogDir)
	if b.cfg.Pool == "" {
		b.cfg.Pool = "/"
	}
	for _, d := range []string{cfg.RunDir, logs, cfg.StateDir} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return err
		}
	}
	unlock, err := lock(filepath.Join(cfg.RunDir, LockFile))
	if err != nil {
		return err
	}
	defer unlock()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	b.procs = newProcesses(logs, cfg.Users)
	b.storeWorkers = storesvc.NewSpawner(func() (*process.Process, error) {
		return b.procs.start(services.StoreLogic, "", "", 0)
	})
	var running []*process.Process
	defer func() {
		// The toolstack first, so that nothing new is asked for; then guests; then the rest.
		end := func(p *process.Process) {
			c, stop := context.WithTimeout(context.Background(), stopGrace)
			defer stop()
			if err := p.Stop(c); err != nil {
				b.log.Warn("service ended badly", "service", p.Name, "err", err)
			}
		}
		if b.toolstack != nil {
			end(running[len(running)-1])
			running = running[:len(running)-1]
			<-b.toolstackDone
		}
		b.endGuests()
		for i := len(running) - 1; i >= 0; i-- {
			end(running[i])
		}
		b.wg.Wait()
		b.storeWorkers.Close()
		b.procs.wg.Wait()
		if b.store != nil {
			b.store.Close()
		}
	}()
	spawn := func(name, dir string, h rpc.Handler) (*rpc.Peer, error) {
		p, err := b.procs.start(name, "", dir, 0)
		if err != nil {
			return nil, err
		}
		running = append(running, p)
		peer := rpc.New(p.Control, h)
		b.wg.Go(func() {
			if name == services.Toolstack {
				defer close(b.toolstackDone)
			}
			if err := peer.Run(context.Background()); err != nil {
				b.log.Error("service", "service", name, "err", err)
			}
		})
		b.wg.Go(func() {
			select {
			case <-p.Done():
				err := p.Err()
				if err == nil {
					err = fmt.Errorf("%s ended", name)
				}
				cancel(err)
			case <-ctx.Done():
			}
		})
		return peer, nil
	}
	if err := b.startServices(ctx, spawn); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return err
	}
	if err := b.serveAdmin(ctx); err != nil {
		return err
	}
	cfg.Ready()
	<-ctx.Done()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

func (b *Builder) startServices(ctx context.Context, spawn func(name, dir string, h rpc.Handler) (*rpc.Peer, error)) error {
	storeDir, err := b.emptyStore()
	if err != nil {
		return err
	}
	vtpmDir, guestsDir := b.vtpmDir(), filepath.Join(b.cfg.StateDir, "guests")
	for _, d := range []string{vtpmDir, guestsDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	if b.storePeer, err = spawn(services.StoreState, storeDir, b.storeWorkers.Handle); err != nil {
		return err
	}
	if err := b.configureStore(ctx, storeDir); err != nil {
		return err
	}
	own, err := b.connectStore(ctx, server.Builder)
	if err != nil {
		return err
	}
	c, err := net.FileConn(own)
	own.Close()
	if err != nil {
		return err
	}
	b.store = client.New(c)
	if err := b.layout(); err != nil {
		return err
	}
	if b.vtpm, err = spawn(services.VTPM, vtpmDir, b.fromVTPM); err != nil {
		return err
	}
	sock, err := b.connectStore(ctx, server.VTPM)
	if err != nil {
		return err
	}
	files := []*os.File{sock}
	msg := protocol.ConfigureVTPM{StateDir: services.StateDir, HostTPM: b.cfg.HostTPM, Files: protocol.Files{protocol.FileStore}}
	if b.cfg.HostTPM != "" {
		tpm, err := openHostTPM(b.cfg.HostTPM)
		if err != nil {
			sock.Close()
			return fmt.Errorf("vTPM manager: the host's TPM %s: %w", b.cfg.HostTPM, err)
		}
		files, msg.Files = append(files, tpm), append(msg.Files, protocol.FileHostTPM)
	}
	_, err = b.vtpm.Call(ctx, protocol.MethodConfigure, msg, nil, files...)
	closeAll(files)
	if err != nil {
		return fmt.Errorf("vTPM manager: %w", err)
	}
	// Root and the group redoubt's members may use the API.
	l, err := listen(filepath.Join(b.cfg.RunDir, APISocket), 0o660)
	if err != nil {
		return err
	}
	defer l.Close()
	if b.toolstack, err = spawn(services.Toolstack, guestsDir, b.fromToolstack); err != nil {
		return err
	}
	_, err = b.toolstack.Call(ctx, protocol.MethodConfigure, protocol.ConfigureToolstack{
		StateDir: services.StateDir, Files: protocol.Files{protocol.FileListener},
	}, nil, l)
	if err != nil {
		return fmt.Errorf("toolstack: %w", err)
	}
	return nil
}

// vtpmDir is the vTPM service's directory.
func (b *Builder) vtpmDir() string { return filepath.Join(b.cfg.StateDir, "vtpm") }

// Names in the run directory that are the store's.
const (
	StoreDir    = "store"     // its contents
	StoreSocket = "xenstored" // where XenStore's own clients, if root's, are served
)

// The store's worker is kept for good so far. Replacing it after each response, as the source of
// the partition does, adds a process's start to each of the some 30 requests of a guest's start:
// it comes once a start makes fewer requests.
const (
	storeReset   = -1
	storeWorkers = 2
)

// emptyStore makes the store's directory anew: what another Builder left there is of guests that
// ended with it.
func (b *Builder) emptyStore() (string, error) {
	path := filepath.Join(b.cfg.RunDir, StoreDir)
	if err := os.RemoveAll(path); err != nil {
		return "", err
	}
	return path, os.Mkdir(path, 0o700)
}

// configureStore gives the store its directory and its socket.
func (b *Builder) configureStore(ctx context.Context, path string) error {
	if _, err := b.storePeer.Call(ctx, storesvc.MethodConfigure, storesvc.Configure{Dir: services.StateDir, Name: path, Reset: storeReset, Workers: storeWorkers}, nil); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	l, err := listen(filepath.Join(b.cfg.RunDir, StoreSocket), 0o600)
	if err != nil {
		return err
	}
	defer l.Close()
	if _, err := b.storePeer.Call(ctx, storesvc.MethodListen, struct{}{}, nil, l); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

// layout makes the directories that others write beneath.
func (b *Builder) layout() error {
	dir := server.DomainPath(server.Builder) + "/backend/vtpm"
	if err := b.store.Mkdir(dir); err != nil {
		return err
	}
	return b.store.SetPerms(dir, tree.Perm{Domain: server.Builder}, tree.Perm{Domain: server.VTPM, Access: tree.Read})
}

// connectStore makes a connection with an identity; the file is the client's end.
func (b *Builder) connectStore(ctx context.Context, d tree.Domain) (*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("store: socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[0]), "store")
	defer theirs.Close()
	ours := os.NewFile(uintptr(fds[1]), "store")
	if _, err := b.storePeer.Call(ctx, storesvc.MethodConnect, storesvc.Connect{Domain: d}, nil, theirs); err != nil {
		ours.Close()
		return nil, err
	}
	return ours, nil
}

// listen makes a socket with a name.
func listen(path string, mode os.FileMode) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(path, mode); err != nil {
		return nil, err
	}
	return l.File()
}

// lock makes this the only Builder of a run directory. The lock goes with the process.
func lock(path string) (func(), error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: Redoubt runs already on this run directory", path)
	}
	if err := f.Truncate(0); err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(f, "%d\n", os.Getpid()); err != nil {
		return nil, err
	}
	return func() { _ = f.Truncate(0); f.Close() }, nil
}
