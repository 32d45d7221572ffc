package builder

import (
	"context"

	"redoubt.dev/redoubt/services/emulator/kept"
	"redoubt.dev/redoubt/store/tree"
)

// What the Supervisor keeps for the Builder that follows when this one dies: guests (package
// emulator/kept), processes (launch), vTPMs (vtpm/kept), the sockets of the store, of toolstacks' APIs and of
// this package, tenants' network namespaces, and which domains are in use.
const domainsEntry = "domains"

func networkEntry(tenant string) string { return "network/" + tenant }

// keepRun keeps a guest's emulator as it is now.
func (b *Builder) keepRun(g *guest) error {
	g.keeping.Lock()
	defer g.keeping.Unlock()
	g.mu.Lock()
	r, asked := g.run, g.asked
	g.mu.Unlock()
	if r == nil {
		return nil
	}
	bus, err := g.bus.Wait(context.Background()) // it was there before the emulator ran
	if err != nil {
		return err
	}
	if r.memory == nil && !r.again { // it is down, and about to be forgotten
		return nil
	}
	r.mu.Lock()
	s := kept.Run{Domain: r.domain, QEMU: r.pid, Instance: r.is, PCI: bus, Asked: asked, Failed: r.failed, Exit: r.exit, Over: r.again, Memory: r.memory}
	r.mu.Unlock()
	if r.proc != nil {
		s.PID = r.proc.PID()
	}
	return s.Keep(b.kept, g.Build.UUID)
}

// keepChange keeps a guest's emulator where it is too late to refuse.
func (b *Builder) keepChange(g *guest) {
	if err := b.keepRun(g); err != nil {
		b.log.Error("a guest's state is not kept", "guest", g.name(), "err", err)
	}
}

// over notes that the emulator has ended, and whether the guest is to have another one.
func (r *run) over(g *guest, again bool) {
	g.keeping.Lock()
	r.again = again
	if r.memory != nil {
		r.memory.Close()
		r.memory = nil
	}
	g.keeping.Unlock()
	if again {
		r.changed()
	}
}

// unkeep forgets a guest that is down for good. When it returns nobody has its disks any more: a lock on
// an image is let go with the last copy of its descriptor.
func (b *Builder) unkeep(g *guest) {
	defer b.kept.Sync()
	g.keeping.Lock()
	defer g.keeping.Unlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	kept.Drop(b.kept, g.Build.UUID, len(g.timeline))
	g.run, g.timeline = nil, nil
}

// domains are those in use, announced or about to be.
type domains struct {
	Next tree.Domain          `json:"next"`
	Open map[tree.Domain]bool `json:"open"`
}

// domain is the next one.
func (b *Builder) domain() (tree.Domain, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	d := b.domains.Next
	b.domains.Next++
	b.domains.Open[d] = true
	return d, b.kept.Put(domainsEntry, b.domains)
}

// forget removes a domain from the store.
func (b *Builder) forget(d tree.Domain) {
	b.store.Forget(d)
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.domains.Open, d)
	_ = b.kept.Put(domainsEntry, b.domains) // else it is forgotten twice
}
