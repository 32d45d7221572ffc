package integrity

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
)

// Places in the kernel's text that the kernel itself changes while it boots, or later: by the lists that its image carries
// for that purpose. Of some kinds all that may stand there is known, and that is checked; the bytes of the others are not
// compared at all.

// A Kind of place.
type Kind string

// The kinds. Those of the first group are checked.
const (
	Jumps   Kind = "jump labels" // a jump to its target, or a no-op
	Tracing Kind = "ftrace"      // the call that was compiled, or a no-op: a call elsewhere is a difference
	Returns Kind = "returns"     // a return, or a jump to one of the kernel's thunks
	Thunks  Kind = "call thunks" // the call that was compiled, or one of the padding before its target

	Alternatives Kind = "alternatives"
	Paravirt     Kind = "paravirt"
	Retpolines   Kind = "retpolines"
	StaticCalls  Kind = "static calls"
	Locks        Kind = "lock prefixes"
	Endbr        Kind = "endbr"
	Constants    Kind = "run-time constants"
)

// A site is one place: length bytes at an address the kernel was linked for.
type site struct {
	at     uint64
	length uint64
	kind   Kind
	target uint64 // of a jump label
}

// Lengths of instructions, in bytes.
const (
	longJump  = 5
	shortJump = 2
	maxSites  = 1 << 20
)

// collector gathers sites within the text.
type collector struct {
	r        *Reader
	from, to uint64
	sites    []site
}

func (c *collector) add(kind Kind, at, length, target uint64) {
	if at >= c.from && at < c.to && length > 0 && length <= c.to-at && len(c.sites) < maxSites {
		c.sites = append(c.sites, site{at, length, kind, target})
	}
}

// relative are the addresses of a list of 4-byte offsets, each from its own place, in records of size bytes.
func (c *collector) relative(section string, size int, each func(at uint64, record []byte)) {
	base, data := c.r.Image.Section(section)
	for i := 0; i+size <= len(data); i += size {
		place := base + uint64(i)
		each(place+uint64(int64(int32(binary.LittleEndian.Uint32(data[i:])))), data[i:i+size])
	}
}

// code is the image's byte at an address, and those behind it.
func (c *collector) code(at, n uint64) []byte {
	b, err := c.r.Image.Bytes(at, n)
	if err != nil {
		return make([]byte, n)
	}
	return b
}

// branch is how long the call or jump at a place is, which may have a prefix or a condition.
func (c *collector) branch(at uint64) uint64 {
	b := c.code(at, 2)
	if b[0] == 0x2e || b[0] == 0x0f {
		return longJump + 1
	}
	return longJump
}

// collect finds all sites between two addresses.
func (r *Reader) collect(from, to uint64) []site {
	c := &collector{r: r, from: from, to: to}
	c.alternatives()
	if _, data := r.Image.Section(".parainstructions"); data != nil {
		const record = 16 // struct paravirt_patch_site: the place's address, a type, a length
		for i := 0; i+record <= len(data); i += record {
			c.add(Paravirt, binary.LittleEndian.Uint64(data[i:]), uint64(data[i+9]), 0)
		}
	}
	for _, l := range []struct {
		section string
		kind    Kind
		length  func(at uint64) uint64
	}{
		{".retpoline_sites", Retpolines, c.branch},
		{".return_sites", Returns, func(uint64) uint64 { return longJump }},
		{".call_sites", Thunks, c.branch},
		{".ibt_endbr_seal", Endbr, func(uint64) uint64 { return 4 }},
		{".smp_locks", Locks, func(uint64) uint64 { return 1 }},
	} {
		c.relative(l.section, 4, func(at uint64, _ []byte) { c.add(l.kind, at, l.length(at), 0) })
	}
	c.constants()
	c.between("__start_static_call_sites", "__stop_static_call_sites", 8, func(place uint64, b []byte) {
		at := place + offset(b)
		c.add(StaticCalls, at, c.branch(at), 0)
	})
	for s := range r.Symbols.All() {
		if strings.HasPrefix(s.Name, "__SCT__") { // a trampoline: a jump, or a return, and what marks it
			c.add(StaticCalls, s.Address, 8, 0)
		}
	}
	c.between("__start___jump_table", "__stop___jump_table", 16, func(place uint64, b []byte) {
		at, target := place+offset(b), place+4+offset(b[4:])
		length := uint64(longJump)
		if first := c.code(at, 1)[0]; first == 0xeb || first == 0x66 {
			length = shortJump
		}
		c.add(Jumps, at, length, target)
	})
	c.between("__start_mcount_loc", "__stop_mcount_loc", 8, func(_ uint64, b []byte) {
		c.add(Tracing, binary.LittleEndian.Uint64(b), longJump, 0)
	})
	slices.SortStableFunc(c.sites, func(a, b site) int {
		if a.at < b.at {
			return -1
		} else if a.at > b.at {
			return 1
		}
		return 0
	})
	return c.sites
}

func offset(b []byte) uint64 { return uint64(int64(int32(binary.LittleEndian.Uint32(b)))) }

// between reads the records between two symbols.
func (c *collector) between(first, end string, size int, each func(place uint64, record []byte)) {
	a, ok := c.r.Symbols.Lookup(first)
	z, there := c.r.Symbols.Lookup(end)
	if !ok || !there || z.Address < a.Address {
		return
	}
	data, err := c.r.Image.Bytes(a.Address, z.Address-a.Address)
	if err != nil {
		return
	}
	for i := 0; i+size <= len(data); i += size {
		each(a.Address+uint64(i), data[i:i+size])
	}
}

// alternatives are struct alt_instr's: until 6.2 with a feature in 2 bytes, then in 4. Both end with the lengths of the
// place and of what may replace it.
func (c *collector) alternatives() {
	_, data := c.r.Image.Section(".altinstructions")
	size := 14
	if !c.packed(data, size) {
		size = 12
	}
	c.relative(".altinstructions", size, func(at uint64, b []byte) {
		c.add(Alternatives, at, uint64(b[size-2]), 0)
	})
}

// packed reports whether records of a size make sense: what replaces is not longer than the place.
func (c *collector) packed(data []byte, size int) bool {
	if len(data)%size != 0 {
		return false
	}
	for i := 0; i+size <= len(data); i += size {
		if data[i+size-1] > data[i+size-2] {
			return false
		}
	}
	return true
}

// constants are immediate operands that are known once the kernel runs, from 6.11 on.
func (c *collector) constants() {
	for _, name := range c.r.Image.Sections() {
		length := uint64(0)
		switch {
		case strings.HasPrefix(name, "runtime_ptr_"):
			length = 8
		case strings.HasPrefix(name, "runtime_shift_"):
			length = 1
		default:
			continue
		}
		c.relative(name, 4, func(at uint64, _ []byte) { c.add(Constants, at, length, 0) })
	}
}

// padding is before each function, for code that counts calls (CONFIG_FUNCTION_PADDING_BYTES).
const padding = 16

// no-ops as the kernel writes them (arch/x86/include/asm/nops.h).
var (
	nop5     = []byte{0x0f, 0x1f, 0x44, 0x00, 0x00}
	nop2     = []byte{0x66, 0x90}
	returned = []byte{0xc3, 0xcc, 0xcc, 0xcc, 0xcc}
)

// checked reports whether all that may stand at a place of the kind is known.
func (k Kind) checked() bool { return k == Jumps || k == Tracing || k == Returns || k == Thunks }

// allowed reports whether what stands at a site of a checked kind may stand there. thunks are where the kernel's return
// thunks are.
func (s *site) allowed(want, got []byte, thunks map[uint64]bool) bool {
	jump := func(op byte) (uint64, bool) { // where a jump leads, of addresses that it was linked for
		if got[0] != op {
			return 0, false
		}
		if len(got) == shortJump {
			return s.at + shortJump + uint64(int64(int8(got[1]))), true
		}
		return s.at + longJump + offset(got[1:]), true
	}
	switch s.kind {
	case Jumps:
		op, nop := byte(0xe9), nop5
		if s.length == shortJump {
			op, nop = 0xeb, nop2
		}
		to, is := jump(op)
		return bytes.Equal(got, nop) || is && to == s.target
	case Tracing:
		return bytes.Equal(got, want) || bytes.Equal(got, nop5)
	case Returns:
		to, is := jump(0xe9)
		return bytes.Equal(got, want) || bytes.Equal(got, returned) || is && thunks[to]
	case Thunks:
		before := offset(want[len(want)-4:]) - offset(got[len(got)-4:])
		return bytes.Equal(got, want) || bytes.Equal(got[:len(got)-4], want[:len(want)-4]) && before <= padding
	}
	return false
}
