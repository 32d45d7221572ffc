// Package toolstack is the service an operator talks to: the outer API over the guests of one
// tenant. It keeps their specs and identities on disk, their consoles and events in memory,
// opens the files a spec names, and asks the Builder for everything else.
package toolstack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/renameio/v2"
	"github.com/google/uuid"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

// State of a guest.
type State string

const (
	Starting State = "starting"
	Running  State = "running"
	Stopping State = "stopping"
	Stopped  State = "stopped"
	Failed   State = "failed"
)

// saved is what outlives the toolstack: one file a guest, NAME.json.
type saved struct {
	Version int        `json:"version"`
	UUID    string     `json:"uuid"`
	Spec    spec.Guest `json:"spec"`
	// EKSHA256 and Instance are what the vTPM manager last said of the guest's vTPM.
	EKSHA256 string `json:"ekSHA256,omitempty"`
	Instance int    `json:"instance,omitempty"`
}

const savedVersion = 1

// guest is one guest, running or not.
type guest struct {
	mu        sync.Mutex
	saved     saved
	state     State
	reason    string
	domain    uint32
	emulator  spec.Emulator
	launching bool  // this toolstack has it started
	stops     int   // how many calls of this toolstack's stop it
	before    State // while it is stopping: what it is if the Builder refuses; "" where an earlier toolstack was told that it does not
	removing  bool
	gone      bool // it was forgotten: there is no record that could be written
	timeline  []moment
	told      int // number of the last event of the Builder's
	starts    uint32
	console   *console
	channel   *console      // the byte channel, used as a console is
	changed   chan struct{} // closed and replaced at every change of state, and when a start is over
}

func (g *guest) up() bool { return g.state == Starting || g.state == Running || g.state == Stopping }

// Toolstack is the running service.
type Toolstack struct {
	log     *slog.Logger
	dir     string
	roles   *roles
	builder *rpc.Peer
	events  *broadcast[moment]
	seq     atomic.Uint64 // of the last moment

	mu     sync.Mutex
	guests map[string]*guest // by name
	byUUID map[string]*guest
}

// load reads the guests left by an earlier toolstack; all are down, for the Builder that ran
// them is gone too. A damaged file is refused, never replaced.
func (t *Toolstack) load() error {
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(t.dir, "*.json"))
	if err != nil {
		return err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		var s saved
		if err := json.Unmarshal(b, &s); err != nil {
			return fmt.Errorf("%s: damaged: %w: restore it from a backup or remove it", f, err)
		}
		if s.Version != savedVersion || s.Spec.Name+".json" != filepath.Base(f) || uuid.Validate(s.UUID) != nil {
			return fmt.Errorf("%s: not a guest of this version: restore it from a backup or remove it", f)
		}
		t.add(newGuest(s, "Redoubt was restarted"))
	}
	return nil
}

func (t *Toolstack) add(g *guest) {
	t.guests[g.saved.Spec.Name] = g
	t.byUUID[g.saved.UUID] = g
}

func (t *Toolstack) save(s saved) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(t.dir, s.Spec.Name+".json"), append(b, '\n'), 0o600)
}

func (t *Toolstack) find(name string) (*guest, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.guests[name]
	if g == nil {
		return nil, rpc.Errorf(rpc.NotFound, "guest %q: no such guest (see `redoubt ps --all`)", name)
	}
	return g, nil
}

func (t *Toolstack) list() []*guest {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]*guest, 0, len(t.guests))
	for _, g := range t.guests {
		all = append(all, g)
	}
	slices.SortFunc(all, func(a, b *guest) int { return strings.Compare(a.saved.Spec.Name, b.saved.Spec.Name) })
	return all
}

// set changes a guest's state and wakes whoever waits for that. mu is held.
func (g *guest) set(s State, reason string) {
	g.state, g.reason = s, reason
	g.wake()
}

// wake wakes whoever waits for a change. mu is held.
func (g *guest) wake() {
	close(g.changed)
	g.changed = make(chan struct{})
}

// await waits until cond, which may change what it finds, holds of the guest.
func (g *guest) await(ctx context.Context, cond func() bool) error {
	for {
		g.mu.Lock()
		ok, ch := cond(), g.changed
		g.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// run creates a guest from its spec, or takes the one of that name up again, and starts it.
// A guest that runs with the same spec already is left as it is.
func (t *Toolstack) run(ctx context.Context, s *spec.Guest, name string, opt protocol.Options) (*guest, error) {
	g, fresh, err := t.claim(s, name)
	if errors.Is(err, errSame) {
		return g, nil
	}
	if err != nil {
		return nil, err
	}
	// A caller that hangs up does not leave half a start behind: it is finished without them.
	err = t.launch(context.WithoutCancel(ctx), g, opt)
	t.mu.Lock()
	defer t.mu.Unlock() // nobody takes it up in between
	g.mu.Lock()
	defer g.mu.Unlock()
	g.launching = false
	if err == nil {
		g.wake()
		return g, nil
	}
	g.set(Failed, err.Error())
	if fresh {
		t.forget(g)
	}
	return nil, err
}

// errSame says that the guest runs already, as asked for.
var errSame = errors.New("runs already")

// claim finds or makes the guest and marks it as starting.
func (t *Toolstack) claim(s *spec.Guest, name string) (g *guest, fresh bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s != nil {
		name = s.Name
	}
	g = t.guests[name]
	if g == nil {
		if s == nil {
			return nil, false, rpc.Errorf(rpc.NotFound, "guest %q: no such guest: give its spec", name)
		}
		g = newGuest(saved{Version: savedVersion, UUID: uuid.NewString(), Spec: *s}, "")
		fresh = true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.removing:
		return nil, false, errRemoved(name)
	case g.up():
		if s == nil || reflect.DeepEqual(*s, g.saved.Spec) {
			return g, false, errSame
		}
		return nil, false, rpc.Errorf(rpc.Exists, "guest %q is %s with another spec: stop it first, or use another name", name, g.state)
	case g.launching: // it has ended already
		return nil, false, errLaunching(name)
	}
	next := g.saved
	if s != nil {
		next.Spec = *s
	}
	if err := t.save(next); err != nil {
		return nil, false, err
	}
	g.saved = next
	if fresh {
		t.add(g)
	}
	g.timeline, g.starts, g.told = nil, 0, 0
	g.launching = true
	g.set(Starting, "")
	return g, fresh, nil
}

func newGuest(s saved, reason string) *guest {
	return &guest{saved: s, state: Stopped, reason: reason, changed: make(chan struct{}), console: newConsole(), channel: newConsole()}
}

// errRemoved says what is done of a guest meanwhile.
func errRemoved(name string) error {
	return rpc.Errorf(rpc.Unavailable, "guest %q is being removed: try again", name)
}

func errLaunching(name string) error {
	return rpc.Errorf(rpc.Unavailable, "guest %q is being started: try again", name)
}

// forget removes a guest's record: it does not run, and nobody takes it up. t.mu and g.mu are held.
func (t *Toolstack) forget(g *guest) {
	g.gone = true
	delete(t.byUUID, g.saved.UUID)
	if t.guests[g.saved.Spec.Name] != g {
		return // the name is another one's by now
	}
	delete(t.guests, g.saved.Spec.Name)
	if err := os.Remove(filepath.Join(t.dir, g.saved.Spec.Name+".json")); err != nil {
		t.log.Warn("guest record", "err", err)
	}
	if err := os.Remove(t.varsPath(g.saved.Spec.Name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.log.Warn("variable store", "err", err)
	}
}

// launch opens what the spec names and has the Builder start the guest.
func (t *Toolstack) launch(ctx context.Context, g *guest, opt protocol.Options) error {
	s := g.saved.Spec
	msg := protocol.Build{UUID: g.saved.UUID, Spec: s, Options: opt, Caller: caller(ctx)}
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	add := func(name, field, path string, write bool) error {
		got, err := t.builder.Call(ctx, protocol.MethodOpen, protocol.Open{Field: field, Path: path, Write: write}, nil)
		files = append(files, got...)
		if err == nil && len(got) != 1 {
			err = fmt.Errorf("%s: %d descriptors", field, len(got))
		}
		msg.Files = append(msg.Files, name)
		return err
	}
	if s.Boot.Kernel != "" {
		if err := add(protocol.FileKernel, "boot.kernel", s.Boot.Kernel, false); err != nil {
			return err
		}
	}
	if s.Boot.Initrd != "" {
		if err := add(protocol.FileInitrd, "boot.initrd", s.Boot.Initrd, false); err != nil {
			return err
		}
	}
	if s.Modules != nil && s.Modules.Profile != "" {
		if err := add(protocol.FileProfile, "modules.profile", s.Modules.Profile, false); err != nil {
			return err
		}
	}
	if s.Boot.Firmware == spec.OVMF {
		path := t.varsPath(s.Name)
		if err := t.makeVars(ctx, path); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		files = append(files, f)
		msg.Files = append(msg.Files, protocol.FileVars)
	}
	for i, d := range s.Disks {
		if err := add(protocol.FileDisk, fmt.Sprintf("disks[%d].path", i), d.Path, !d.ReadOnly); err != nil {
			return err
		}
		if d.Base != "" {
			if err := add(protocol.FileBase, fmt.Sprintf("disks[%d].base", i), d.Base, false); err != nil {
				return err
			}
		}
	}
	t.event(protocol.Event{UUID: g.saved.UUID, Kind: protocol.EventRequested, Time: time.Now()})
	var built protocol.Built
	made, err := t.builder.Call(ctx, protocol.MethodBuild, msg, &built, files...)
	if err != nil {
		closeFiles(made)
		return err
	}
	e, err := takeEnds(made)
	if err != nil {
		return err
	}
	t.connect(g, e, false)
	g.mu.Lock()
	up := g.up()
	g.mu.Unlock()
	if !up { // it ended meanwhile; what it printed is there
		g.console.detach()
		g.channel.detach()
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.domain, g.emulator = uint32(built.Domain), built.Emulator
	if s.TPM.Disabled && g.state == Starting {
		g.set(Running, "")
	}
	return nil
}

func (t *Toolstack) varsPath(name string) string { return filepath.Join(t.dir, name+".vars") }

// maxVars bounds a variable store in bytes; OVMF's have 540,672.
const maxVars = 16 << 20

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// makeVars makes a guest's UEFI variable store, unless it has one.
func (t *Toolstack) makeVars(ctx context.Context, path string) error {
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	template, err := t.builder.Call(ctx, protocol.MethodVars, struct{}{}, nil)
	if err != nil {
		return err
	}
	defer closeFiles(template)
	if len(template) != 1 {
		return fmt.Errorf("boot.firmware: %d descriptors", len(template))
	}
	fresh, err := io.ReadAll(io.LimitReader(template[0], maxVars))
	if err != nil {
		return fmt.Errorf("boot.firmware: %w", err)
	}
	return renameio.WriteFile(path, fresh, 0o600)
}
