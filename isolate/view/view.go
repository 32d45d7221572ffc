// Package view lays out what a view of one isolated module has of its own: page tables, descriptor tables, a stub for each
// exception, a stack for them, and copies of the kernel's thunks. All of it is the monitor's memory, none the guest's.
//
// The module's code runs at the kernel's privilege and may change what it can write, the tables that it runs on included: it
// can load CR3, the descriptor tables and the stack pointer as it likes, without an exit. So nothing here protects
// anything. What the module reaches is bounded by the machine's memory slots alone; the layout makes
// well-behaved modules work, and brings every exception to the monitor.
//
// Two parts, for two slots: RW, which processors and the module write (page tables, as both vendors' processors take a
// walk for a write; the stack of exceptions; the stacks that the module sees), and RO (the rest).
//
// Source: Intel SDM volume 3A, chapters 4 "Paging", 6 "Interrupt and Exception Handling"; Linux,
// Documentation/arch/x86/x86_64/mm.rst (unused hole at Virtual).
package view

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// PageSize is the only one that a view maps.
const PageSize = 4096

// Where a view's own memory lies: guest-physical, between the configuration space and the I/O APIC of the machine, which a
// view does not have; and virtual, where Linux maps nothing.
const (
	Physical = 0xf000_0000
	Virtual  = 0xffff_ff80_0000_0000
)

// Pages of the writable part.
const (
	pml4Page   = 0
	trapPage   = 1 // the stack of exceptions
	stackPage  = 2 // StackPages that the module sees in the place of the kernel's stack
	StackPages = 4
	tablePage  = stackPage + StackPages // page tables, to the end
	rwPages    = 512

	roBase    = rwPages
	idtPage   = 0
	stubPage  = 1 // 256 stubs of 16 bytes
	gdtPage   = 2 // GDT, then the TSS
	entryPage = 3 // the way in with an empty TLB
	thunkPage = 4 // copies of the kernel's pages of thunks
	MaxThunks = 4
	roPages   = thunkPage + MaxThunks

	// RWSize and ROSize are the bytes of the two parts; RO follows RW at Physical.
	RWSize = rwPages * PageSize
	ROSize = roPages * PageSize
)

// ROPhysical is where the part that only the monitor writes lies.
const ROPhysical = Physical + RWSize

// TrapPort is what the stub of an exception writes to.
const TrapPort = 0xf6

// Selectors and the places of what the machine's registers are to name.
const (
	CodeSelector = 0x10 // as Linux' __KERNEL_CS and __KERNEL_DS
	DataSelector = 0x18
	tssSelector  = 0x40

	GDTBase  = Virtual + RWSize + gdtPage*PageSize
	GDTLimit = 0x4f
	TSSBase  = GDTBase + 0x800
	TSSLimit = 0x67
	IDTBase  = Virtual + RWSize + idtPage*PageSize
	IDTLimit = 0xfff
	Entry    = Virtual + RWSize + entryPage*PageSize
	trapTop  = trapPage*PageSize + PageSize
)

// Rights of a mapping.
type Rights byte

// What a mapping allows beside reading.
const (
	Write Rights = 1 << iota
	Execute
	User // as the kernel's own mapping says: SMAP and SMEP stand as they do there
)

// ErrTables says that the view has no page for another table; Clear makes room.
var ErrTables = errors.New("the view's page tables are full")

// A View is the layout over two pieces of memory.
type View struct {
	rw, ro []byte
	next   int // the first free page of tables
}

// New lays out a view over memory of RWSize and ROSize bytes, which must be zero.
func New(rw, ro []byte) (*View, error) {
	if len(rw) != RWSize || len(ro) != ROSize {
		return nil, fmt.Errorf("a view over %d and %d bytes: it takes %d and %d", len(rw), len(ro), RWSize, ROSize)
	}
	v := &View{rw: rw, ro: ro, next: tablePage}
	v.descriptors()
	v.stubs()
	v.entry()
	return v, v.Clear()
}

// fixedPages are those that every view maps of itself.
var fixedPages = []struct {
	page   uint64
	rights Rights
}{
	{trapPage, Write}, {roBase + idtPage, 0}, {roBase + stubPage, Execute}, {roBase + gdtPage, 0}, {roBase + entryPage, Execute},
}

func (v *View) descriptors() {
	gdt := v.ro[gdtPage*PageSize:]
	le := binary.LittleEndian
	// Accessed already, so that no processor writes there.
	le.PutUint64(gdt[CodeSelector:], 0x00af9b000000ffff)
	le.PutUint64(gdt[DataSelector:], 0x00cf93000000ffff)
	const tss = uint64(TSSBase)
	le.PutUint64(gdt[tssSelector:], TSSLimit|(tss&0xffffff)<<16|0x8b<<40|(tss>>24&0xff)<<56)
	le.PutUint64(gdt[tssSelector+8:], tss>>32)
	le.PutUint64(gdt[0x800+0x24:], Virtual+trapTop) // IST1
}

// stubs: each pushes a zero where the processor pushes no error code, the vector, and tells the monitor. Where that goes on,
// the exception is mended and what raised it is tried again.
func (v *View) stubs() {
	le := binary.LittleEndian
	for i := range 256 {
		c := v.ro[stubPage*PageSize+i*16:][:16]
		n := 0
		if !HasErrorCode(byte(i)) {
			n += copy(c, []byte{0x6a, 0x00}) // push $0
		}
		n += copy(c[n:], []byte{0x6a, byte(i)})          // push $vector
		n += copy(c[n:], []byte{0xe6, TrapPort})         // out %al,$TrapPort
		n += copy(c[n:], []byte{0x48, 0x83, 0xc4, 0x10}) // add $16,%rsp
		copy(c[n:], []byte{0x48, 0xcf})                  // iretq
		h := uint64(Virtual+RWSize+stubPage*PageSize) + uint64(i)*16
		d := v.ro[idtPage*PageSize+i*16:][:16]
		le.PutUint16(d[0:], uint16(h))
		le.PutUint16(d[2:], CodeSelector)
		d[4], d[5] = 1, 0x8e // IST1; a present interrupt gate
		le.PutUint16(d[6:], uint16(h>>16))
		le.PutUint32(d[8:], uint32(h>>32))
	}
}

// entry is the code that drops the translations of addresses that the processor has kept and goes on at a place.
func (v *View) entry() {
	copy(v.ro[entryPage*PageSize:], []byte{
		0x0f, 0x20, 0xd8, // mov %cr3,%rax
		0x0f, 0x22, 0xd8, // mov %rax,%cr3
		0x48, 0x8b, 0x05, 0x33, 0, 0, 0, // mov 0x40(entry),%rax
		0xff, 0x25, 0x35, 0, 0, 0, // jmp *0x48(entry)
	})
}

// SetEntry says where Entry goes on, and with which RAX.
func (v *View) SetEntry(rip, rax uint64) {
	e := v.ro[entryPage*PageSize:]
	binary.LittleEndian.PutUint64(e[0x40:], rax)
	binary.LittleEndian.PutUint64(e[0x48:], rip)
}

// HasErrorCode says whether the processor pushes one for an exception.
func HasErrorCode(vector byte) bool {
	switch vector {
	case 8, 10, 11, 12, 13, 14, 17, 21, 29, 30:
		return true
	}
	return false
}

// A Trap is what an exception left on its stack. The module can write there: it is the module's word.
type Trap struct {
	Vector          byte
	Error, RIP, CS  uint64
	RFLAGS, RSP, SS uint64
}

// Trap reads the last exception.
func (v *View) Trap() Trap {
	f := v.rw[trapTop-7*8 : trapTop]
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(f[i*8:]) }
	return Trap{byte(word(0)), word(1), word(2), word(3), word(4), word(5), word(6)}
}

// Stack is page i of the StackPages that the module sees as the kernel's stack, and where it lies.
func (v *View) Stack(i int) (page []byte, gpa uint64) {
	at := (stackPage + i) * PageSize
	return v.rw[at : at+PageSize : at+PageSize], Physical + uint64(at)
}

// Thunk is page i of MaxThunks of copied thunks, and where it lies.
func (v *View) Thunk(i int) (page []byte, gpa uint64) {
	at := (thunkPage + i) * PageSize
	return v.ro[at : at+PageSize : at+PageSize], ROPhysical + uint64(at)
}

const (
	present   = 1 << 0
	writable  = 1 << 1
	user      = 1 << 2
	accessed  = 1 << 5
	dirty     = 1 << 6
	noExecute = 1 << 63
	address   = 0x000f_ffff_ffff_f000
)

// Root is where the tables begin: CR3.
func (v *View) Root() uint64 { return Physical + pml4Page*PageSize }

// Map maps a page, in the place of what was mapped there. Translations that the processor has kept stay until Entry.
func (v *View) Map(virtual, physical uint64, r Rights) error {
	e, err := v.entryOf(virtual, true)
	if err != nil {
		return err
	}
	p := physical&address | present | accessed | dirty | noExecute
	if r&Write != 0 {
		p |= writable
	}
	if r&User != 0 {
		p |= user
	}
	if r&Execute != 0 {
		p &^= noExecute
	}
	binary.LittleEndian.PutUint64(e, p)
	return nil
}

// Rights are those of a page that is mapped.
func (v *View) Rights(virtual uint64) (r Rights, ok bool) {
	e, err := v.entryOf(virtual, false)
	if err != nil || e == nil {
		return 0, false
	}
	p := binary.LittleEndian.Uint64(e)
	if p&writable != 0 {
		r |= Write
	}
	if p&user != 0 {
		r |= User
	}
	if p&noExecute == 0 {
		r |= Execute
	}
	return r, p&present != 0
}

// Unmap takes a page away, if it is there.
func (v *View) Unmap(virtual uint64) {
	if e, err := v.entryOf(virtual, false); err == nil && e != nil {
		clear(e)
	}
}

// entryOf is the entry of a page in the lowest table. The tables are read as the monitor wrote them or as the module did
// since: an address that leads out of them is refused.
func (v *View) entryOf(virtual uint64, create bool) ([]byte, error) {
	table := uint64(pml4Page)
	for shift := 39; shift > 12; shift -= 9 {
		e := v.rw[table*PageSize+virtual>>shift&511*8:][:8]
		p := binary.LittleEndian.Uint64(e)
		if p&present == 0 {
			if !create {
				return nil, nil
			}
			if v.next == rwPages {
				return nil, ErrTables
			}
			p = Physical + uint64(v.next)*PageSize | present | writable | user | accessed | dirty
			clear(v.rw[v.next*PageSize:][:PageSize])
			v.next++
			binary.LittleEndian.PutUint64(e, p)
		}
		next := (p&address - Physical) / PageSize
		if p&address < Physical || next < tablePage || next >= uint64(v.next) {
			return nil, fmt.Errorf("the view's own tables were changed: an entry is %#x", p)
		}
		table = next
	}
	return v.rw[table*PageSize+virtual>>12&511*8:][:8], nil
}

// Clear takes every page away but those of the view itself.
func (v *View) Clear() error {
	clear(v.rw[pml4Page*PageSize:][:PageSize])
	clear(v.rw[tablePage*PageSize : v.next*PageSize])
	v.next = tablePage
	for _, m := range fixedPages {
		if err := v.Map(Virtual+m.page*PageSize, Physical+m.page*PageSize, m.rights); err != nil {
			return err
		}
	}
	return nil
}
