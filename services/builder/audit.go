package builder

import (
	"context"
	"strconv"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/store/tree"
)

// ActHandOver gives a process what lets it touch a guest: detail to, memory in bytes, kvm.
const ActHandOver = "hand-over"

// names are the guests that are one of those.
func (b *Builder) names(those func(*guest) bool) (all []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, g := range b.guests {
		if those(g) {
			all = append(all, g.name())
		}
	}
	return all
}

// nameOf is what a guest is called in the log, if it runs.
func (b *Builder) nameOf(uuid string) string {
	if g := b.guest(uuid); g != nil {
		return g.name()
	}
	return ""
}

// depends records what a guest depends on from the moment it is announced.
func (b *Builder) depends(ctx context.Context, g *guest, d tree.Domain) error {
	store, err := b.store.Instance(ctx)
	if err != nil {
		return err
	}
	all := []audit.Instance{store}
	if !g.Build.Spec.TPM.Disabled {
		manager, err := b.vtpm.Instance(ctx)
		if err != nil {
			return err
		}
		all = append(all, manager)
	}
	var entries []audit.Entry
	for _, i := range all {
		e := b.journal.Linked(g.name(), i)
		entries = append(entries, e.With("uuid", g.Build.UUID).With("domain", strconv.Itoa(int(d))))
	}
	return b.journal.Record(entries...)
}

// handOver records that an emulator was started and what it is given.
func (b *Builder) handOver(g *guest, r *run, kvm bool) error {
	e := b.journal.Entry(ActHandOver, g.name(), audit.Done, "to", services.Emulator, audit.DetailInstance, r.is.ID,
		"memory", strconv.FormatUint(g.memory(), 10), "kvm", strconv.FormatBool(kvm))
	return b.journal.Record(b.journal.Started(r.is, "guest", g.name(), "emulator", string(g.Emulator)), b.journal.Linked(g.name(), r.is), e)
}

// handQEMU records what a QEMU is given by the emulator that keeps it.
func (b *Builder) handQEMU(g *guest, r *run, kvm bool) error {
	return b.journal.Record(b.journal.Entry(ActHandOver, g.name(), audit.Done, "to", services.QEMU,
		"emulator", r.is.ID, "memory", strconv.FormatUint(g.memory(), 10), "kvm", strconv.FormatBool(kvm)))
}
