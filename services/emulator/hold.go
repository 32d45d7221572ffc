package emulator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/vtpm/frontend"
)

// A holder holds a guest still as long as anybody wants it held: several may, each for a reason of its own, and it goes on
// when the last one lets go.
type holder struct {
	guest frontend.Guest

	mu  sync.Mutex
	who map[protocol.Holder]time.Time // since when
}

// hold holds the guest for somebody; twice is once.
func (h *holder) hold(who protocol.Holder) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.who[who]; ok {
		return nil
	}
	begun := time.Now() // before the first processor stands still: no report says less than it was
	if len(h.who) == 0 {
		if err := h.guest.Pause(); err != nil {
			return err
		}
	}
	if h.who == nil {
		h.who = map[protocol.Holder]time.Time{}
	}
	h.who[who] = begun
	return nil
}

// letGo ends that, and says how long it was; the guest stays held while others want it to.
func (h *holder) letGo(who protocol.Holder) (time.Duration, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	since, ok := h.who[who]
	if !ok {
		return 0, nil
	}
	if len(h.who) == 1 {
		if err := h.guest.Resume(); err != nil {
			return 0, err
		}
	}
	delete(h.who, who)
	return time.Since(since), nil
}

// gateHolder holds the guest for the vTPM's gate.
type gateHolder struct {
	h *holder
	s *service
}

func (g gateHolder) Pause() error {
	if err := g.h.hold(protocol.HolderGate); err != nil {
		return err
	}
	g.s.event(protocol.EventPaused, "guest and its clock stopped")
	return nil
}

func (g gateHolder) Resume() error {
	_, err := g.h.letGo(protocol.HolderGate)
	return err
}

// holdFor holds the guest for somebody in this process.
func (s *service) holdFor(who protocol.Holder) error {
	s.mu.Lock()
	h := s.holder
	s.mu.Unlock()
	return h.hold(who)
}

// others reports who holds the guest beside somebody, whom it says whether it is held for.
func (h *holder) others(who protocol.Holder) (others, held bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, held = h.who[who]
	return len(h.who) > 1 || len(h.who) == 1 && !held, held
}

// The moments that the operator's pause looks at, and how long it waits for the next: no multiple of a clock's tick.
const (
	pauseTries = 50
	pauseEvery = 7300 * time.Microsecond
)

// pause holds the guest for the operator, where one of the next moments is one at which no processor has its interrupts off: at
// another a paused guest could not be validated, and no later moment comes. If there is none, it is held wherever it is.
func (s *service) pause(ctx context.Context, h *holder, m machine) error {
	if _, held := h.others(protocol.HolderOperator); held {
		return nil
	}
	next := time.NewTimer(0)
	defer next.Stop()
	for try := 1; ; try++ {
		select {
		case <-next.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := h.hold(protocol.HolderOperator); err != nil {
			return err
		}
		if others, _ := h.others(protocol.HolderOperator); others || try == pauseTries {
			return nil
		}
		if masked, err := m.Masked(); err != nil || len(masked) == 0 {
			return nil // it is held, whether it can say or not
		}
		if _, err := h.letGo(protocol.HolderOperator); err != nil {
			return err
		}
		next.Reset(pauseEvery)
	}
}

// hold answers protocol.MethodHold.
func (s *service) hold(ctx context.Context, in protocol.Hold, files map[string][]*os.File) (out protocol.Held, err error) {
	s.mu.Lock()
	h, m := s.holder, s.machine
	s.mu.Unlock()
	if h == nil {
		return out, rpc.Errorf(rpc.Unavailable, "the guest has not been started")
	}
	if in.Who != protocol.HolderOperator && in.Who != protocol.HolderValidation && in.Who != protocol.HolderVerdict {
		return out, rpc.Errorf(rpc.Invalid, "emulator: no holder %q", in.Who)
	}
	stopped, begun := files[protocol.FileStopped], files[protocol.FileBegun]
	if len(stopped) != len(begun) || len(stopped) > 1 {
		return out, rpc.Errorf(rpc.Invalid, "emulator: a hold with descriptors %v", in.Files)
	}
	if len(stopped) == 0 && in.Who == protocol.HolderOperator {
		err = s.pause(ctx, h, m)
	} else {
		err = h.hold(in.Who)
	}
	if err != nil {
		return out, fmt.Errorf("hold: %w", err)
	}
	if len(stopped) == 0 {
		return out, nil
	}
	out, err = s.look(stopped[0], begun[0])
	out.Paused, _ = h.others(in.Who)
	if !in.Keep {
		took, lerr := h.letGo(in.Who)
		out.Took, err = took, errors.Join(err, lerr)
	}
	return out, err
}

// look tells BlkBack that the guest stands still, and looks what it has in progress while BlkBack begins the snapshot.
func (s *service) look(stopped, begun *os.File) (out protocol.Held, err error) {
	s.mu.Lock()
	m, word := s.machine, s.status
	s.mu.Unlock()
	_, _ = stopped.Write([]byte{1}) // one that is gone will not answer
	if out.Masked, err = m.Masked(); err != nil {
		return out, err
	}
	if out.Status, err = word.read(); err != nil {
		return out, fmt.Errorf("the guest's status: %w", err)
	}
	if err = begun.SetReadDeadline(time.Now().Add(protocol.HoldLimit)); err != nil {
		return out, fmt.Errorf("begun: %w", err)
	}
	n, _ := begun.Read(make([]byte, 1)) // why not, BlkBack tells who asked it
	out.Begun = n == 1
	return out, nil
}

// letGo answers protocol.MethodLetGo.
func (s *service) letGo(in protocol.LetGo) (out protocol.WasHeld, err error) {
	s.mu.Lock()
	h := s.holder
	s.mu.Unlock()
	if h == nil {
		return out, rpc.Errorf(rpc.Unavailable, "the guest has not been started")
	}
	out.Took, err = h.letGo(in.Who)
	if in.Who == protocol.HolderOperator && err == nil { // who is asked to look at what a module did
		var took time.Duration
		took, err = h.letGo(protocol.HolderModules)
		out.Took = max(out.Took, took)
	}
	return out, err
}
