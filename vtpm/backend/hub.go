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

// Hub shares the vTPM service's one store connection among the back ends of all guests.
type Hub struct {
	store *client.Client
	log   *slog.Logger

	mu     sync.Mutex
	guests map[tree.Domain]*Backend
	ready  map[int]*Backend // by instance number, once a back end watches it
}

// NewHub makes a hub over a connection whose identity is the vTPM service's.
func NewHub(store *client.Client, log *slog.Logger) *Hub {
	return &Hub{store: store, log: log, guests: map[tree.Domain]*Backend{}, ready: map[int]*Backend{}}
}

// Run watches until ctx ends or the store is gone. A lost store fails every guest that still
// waits: a gate that cannot hear must not open.
func (h *Hub) Run(ctx context.Context) error {
	// Step 2: whatever the tool writes about a new guest appears beneath this directory.
	if err := h.store.Watch(strings.TrimSuffix(server.BackPath(0), "/0/0"), "guests"); err != nil {
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
	kind, id, _ := strings.Cut(e.Token, "/")
	n, _ := strconv.Atoi(id)
	h.mu.Lock()
	b := h.guests[tree.Domain(n)]
	if kind == "ready" {
		b = h.ready[n]
	}
	h.mu.Unlock()
	if b == nil {
		return
	}
	switch kind {
	case "front":
		v, err := h.store.Read(server.FrontPath(b.opt.Domain) + "/state")
		if err == nil && v == strconv.Itoa(int(gate.Connected)) {
			b.post(gate.Event{Kind: gate.FrontConnected})
		}
	case "instance":
		v, err := h.store.Read(server.BackPath(b.opt.Domain) + "/instance")
		if errors.Is(err, tree.ENOENT) || (err == nil && v == "") {
			return // not written yet
		}
		number, perr := strconv.Atoi(v)
		if err != nil || perr != nil {
			b.post(gate.Event{Kind: gate.Failed, Reason: fmt.Sprintf("instance number %q is none", v)})
			return
		}
		b.post(gate.Event{Kind: gate.Instance, Number: number})
	case "ready":
		if _, err := h.store.Read(server.ReadyNode(n)); err != nil {
			b.post(gate.Event{Kind: gate.ReadyGone, Number: n})
		} else {
			b.post(gate.Event{Kind: gate.ReadyNode, Number: n})
		}
	}
}

// attach registers a back end and sets its watches; each fires once at once, so nothing that
// happened before is missed.
func (h *Hub) attach(b *Backend) error {
	d := b.opt.Domain
	h.mu.Lock()
	if h.guests[d] != nil {
		h.mu.Unlock()
		return fmt.Errorf("domain %d has a vTPM back end already", d)
	}
	h.guests[d] = b
	h.mu.Unlock()
	id := strconv.Itoa(int(d))
	if err := h.store.Watch(server.FrontPath(d)+"/state", "front/"+id); err != nil {
		return err
	}
	return h.store.Watch(server.BackPath(d)+"/instance", "instance/"+id)
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
	id := strconv.Itoa(int(b.opt.Domain))
	_ = h.store.Unwatch(server.FrontPath(b.opt.Domain)+"/state", "front/"+id)
	_ = h.store.Unwatch(server.BackPath(b.opt.Domain)+"/instance", "instance/"+id)
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.guests, b.opt.Domain)
	for n, o := range h.ready {
		if o == b {
			delete(h.ready, n)
			_ = h.store.Unwatch(server.ReadyNode(n), "ready/"+strconv.Itoa(n))
		}
	}
}
