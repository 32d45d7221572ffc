package isolate

import (
	"redoubt.dev/redoubt/isolate/locked"
	"redoubt.dev/redoubt/kvm"
)

// store makes an allowed write, to memory that other vCPUs read and write, too: what it tells them the address of may be on the
// module's stack. An atomic instruction whose memory another one has changed
// between its reading and its writing is to be tried again: with the registers that it returns.
func (i *Isolation) store(v *view, b []byte, at uint64, x kvm.MMIO) (before *kvm.Regs, err error) {
	if len(i.cpus) == 1 {
		copy(b, x.Data)
		return nil, nil
	}
	r, err := v.vcpu.Regs()
	if err != nil {
		return nil, err
	}
	i.publish(v, r.RSP)
	if i.cfg.Modules.Weakened.Atomic {
		copy(b, x.Data)
		return nil, nil
	}
	op, ok := locked.Find(i.write(r, at, x))
	if !ok {
		locked.Store(b, x.Data)
		return nil, nil
	}
	if locked.Swap(b, op.Apply) {
		return nil, nil
	}
	if at&7+uint64(len(b)) > 8 { // no processor would do that at once either
		copy(b, x.Data)
		return nil, nil
	}
	for n, p := range registers(&r) {
		*p = op.Registers[n]
	}
	r.RIP -= uint64(op.Length)
	return &r, nil
}

// write is what is known of a write that an exit tells of.
func (i *Isolation) write(r kvm.Regs, at uint64, x kvm.MMIO) locked.Write {
	w := locked.Write{RIP: r.RIP, Carry: r.RFLAGS&1 != 0, Address: at, Size: len(x.Data)}
	for n, p := range registers(&r) {
		w.Registers[n] = *p
	}
	for n, b := range x.Data {
		w.Value |= uint64(b) << (8 * n)
	}
	for n := r.RIP - locked.MaxLength; n < r.RIP; n++ {
		if b, err := i.bytes(n, 1); err == nil {
			w.Code = append(w.Code, b[0])
		} else {
			w.Code = w.Code[:0]
		}
	}
	return w
}

// registers are the general ones, as instructions number them.
func registers(r *kvm.Regs) [16]*uint64 {
	return [16]*uint64{
		&r.RAX, &r.RCX, &r.RDX, &r.RBX, &r.RSP, &r.RBP, &r.RSI, &r.RDI,
		&r.R8, &r.R9, &r.R10, &r.R11, &r.R12, &r.R13, &r.R14, &r.R15,
	}
}
