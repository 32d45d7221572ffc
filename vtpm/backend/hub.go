// Package backend is the vTPM back end (system A): for each guest it runs the gate, fed by the
// store's watches and by the vTPM manager, and once the gate has opened it carries the guest's
// commands to its vTPM.
//
// Until then it reads nothing from the guest's channel: a command sent early stays in the
// socket and its sender sleeps. Nothing here polls; while a guest waits, every goroutine of
// this package is asleep.
//
// The emulator at the other end faces the guest and is not trusted. Beyond the channel's own
// checks the back end refuses locality 4 (it belongs to the platform's dynamic root of trust,
// PTP 1.05 §6.2) and there is no frame by which a guest could ask for INIT.
package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/vtpm/gate"
)

// Store is a connection with the vTPM service's identity; *client.Lasting is one. Where the
// store's death is outlived, its watches fire again.
type Store interface {
	Events() <-chan client.Event
	Watch(path, token string) error
	Unwatch(path, token string) error
	Read(path string) (string, error)
	Write(path, value string) error
}

// Hub shares the vTPM service's one store connection among the back ends of all guests, and one
// watch: each request costs the store a worker process.
type Hub struct {
	store Store
	log   *slog.Logger

	mu     sync.Mutex
	guests map[tree.Domain]*Backend
	ready  map[int]*Backend // by instance number, once a back end watches it
}

// NewHub makes a hub over a connection.
func NewHub(store Store, log *slog.Logger) *Hub {
	return &Hub{store: store, log: log, guests: map[tree.Domain]*Backend{}, ready: map[int]*Backend{}}
}

// domains is the directory beneath which everything is that the back ends watch, but the ready
// nodes.
const domains = "/local/domain"

// Run watches until ctx ends or the store is gone for good. A lost store fails every guest that
// still waits: a gate that cannot hear must not open.
func (h *Hub) Run(ctx context.Context) error {
	// Step 2: whatever the tool writes about a new guest appears beneath this directory.
	if err := h.store.Watch(domains, ""); err != nil {
		h.failAll("the store is gone")
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-h.store.Events():
			if !ok {
				h.failAll("the store is gone")
				return client.ErrClosed
			}
			h.dispatch(e)
		}
	}
}

func (h *Hub) failAll(reason string) {
	h.mu.Lock()
	guests := slices.Collect(maps.Values(h.guests))
	h.mu.Unlock()
	for _, b := range guests {
		b.post(gate.Event{Kind: gate.Failed, Reason: reason})
	}
}

// dispatch reads what an event points at and tells the guest's gate. A value is always read
// anew: an event says only that something changed.
func (h *Hub) dispatch(e client.Event) {
	if id, ok := strings.CutPrefix(e.Token, "ready/"); ok {
		n, _ := strconv.Atoi(id)
		h.mu.Lock()
		b := h.ready[n]
		h.mu.Unlock()
		if b.waits() {
			h.lookReady(b, n)
		}
		return
	}
	if e.Path == domains { // the watch was set, or set anew: anything may have changed before
		h.mu.Lock()
		all := slices.Collect(maps.Values(h.guests))
		h.mu.Unlock()
		for _, b := range all {
			h.look(b)
		}
		return
	}
	d, front, ok := concerns(e.Path)
	if !ok {
		return
	}
	h.mu.Lock()
	b := h.guests[d]
	h.mu.Unlock()
	switch {
	case !b.waits():
	case front:
		h.lookFront(b)
	default:
		h.lookInstance(b)
	}
}

// concerns says which guest's front end state or instance number is at path, if any.
func concerns(path string) (d tree.Domain, front, ok bool) {
	rest := strings.TrimPrefix(path, domains+"/")
	id, rest, _ := strings.Cut(rest, "/")
	if back, ok := strings.CutPrefix(rest, "backend/vtpm/"); ok {
		id, _, _ = strings.Cut(back, "/")
	}
	n, err := strconv.ParseUint(id, 10, 32)
	if err != nil {
		return 0, false, false
	}
	d = tree.Domain(n)
	switch path {
	case frontState(d):
		return d, true, true
	case instance(d):
		return d, false, true
	}
	return 0, false, false // among them what a guest calls a back end
}

func frontState(d tree.Domain) string { return server.FrontPath(d) + "/state" }

func instance(d tree.Domain) string { return server.BackPath(d) + "/instance" }

// waits reports whether the gate may still be told something; false for no back end.
func (b *Backend) waits() bool {
	if b == nil {
		return false
	}
	select {
	case <-b.decided:
		return false
	case <-b.done:
		return false
	default:
		return true
	}
}

func (h *Hub) look(b *Backend) {
	if b.waits() {
		h.lookFront(b)
		h.lookInstance(b)
	}
}

func (h *Hub) lookFront(b *Backend) {
	v, err := h.store.Read(frontState(b.opt.Domain))
	switch {
	case errors.Is(err, tree.ENOENT):
	case err != nil:
		b.post(gate.Event{Kind: gate.Failed, Reason: err.Error()})
	case v == strconv.Itoa(int(gate.Connected)):
		b.post(gate.Event{Kind: gate.FrontConnected})
	}
}

func (h *Hub) lookInstance(b *Backend) {
	v, err := h.store.Read(instance(b.opt.Domain))
	switch {
	case errors.Is(err, tree.ENOENT), err == nil && v == "": // not written yet
		return
	case err != nil:
		b.post(gate.Event{Kind: gate.Failed, Reason: err.Error()})
		return
	}
	number, err := strconv.Atoi(v)
	if err != nil {
		b.post(gate.Event{Kind: gate.Failed, Reason: fmt.Sprintf("instance number %q is none", v)})
		return
	}
	b.post(gate.Event{Kind: gate.Instance, Number: number})
}

func (h *Hub) lookReady(b *Backend, n int) {
	_, err := h.store.Read(server.ReadyNode(n))
	switch {
	case errors.Is(err, tree.ENOENT):
		b.post(gate.Event{Kind: gate.ReadyGone, Number: n})
	case err != nil:
		b.post(gate.Event{Kind: gate.Failed, Reason: err.Error()})
	default:
		b.post(gate.Event{Kind: gate.ReadyNode, Number: n})
	}
}

// attach registers a back end and looks at what may be there already, so that nothing that happened
// before is missed. What a fresh guest misses while there is no watch is looked at when it is set.
func (h *Hub) attach(b *Backend) error {
	d := b.opt.Domain
	h.mu.Lock()
	if h.guests[d] != nil {
		h.mu.Unlock()
		return fmt.Errorf("domain %d has a vTPM back end already", d)
	}
	h.guests[d] = b
	h.mu.Unlock()
	if !b.opt.Fresh {
		b.looks.Go(func() { h.look(b) })
	}
	return nil
}

func (h *Hub) watchReady(b *Backend, number int) error {
	h.mu.Lock()
	if h.ready[number] != nil {
		h.mu.Unlock()
		return fmt.Errorf("vTPM instance %d serves another guest", number)
	}
	h.ready[number] = b
	h.mu.Unlock()
	return h.store.Watch(server.ReadyNode(number), "ready/"+strconv.Itoa(number))
}

func (h *Hub) detach(b *Backend) {
	h.mu.Lock()
	delete(h.guests, b.opt.Domain)
	var ready []int
	for n, o := range h.ready {
		if o == b {
			delete(h.ready, n)
			ready = append(ready, n)
		}
	}
	h.mu.Unlock()
	for _, n := range ready {
		_ = h.store.Unwatch(server.ReadyNode(n), "ready/"+strconv.Itoa(n))
	}
}
