package locked

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

const (
	rax, rcx, rsi, rdi, r15 = 0, 1, 6, 7, 15
	cell                    = 0xffff_8880_0012_3458 // where the operand lies
)

// An instruction, and what it does to what it finds: the new value, and to registers and the carry.
type instruction struct {
	name string
	code []byte
	size int
	does func(r *[16]uint64, carry *bool, was uint64) uint64
}

func (i instruction) mask() uint64 { return ^uint64(0) >> (64 - 8*i.size) }

var instructions = []instruction{
	{"incq (%rdi)", []byte{0xf0, 0x48, 0xff, 0x07}, 8, func(_ *[16]uint64, _ *bool, was uint64) uint64 { return was + 1 }},
	{"decq (%rdi)", []byte{0xf0, 0x48, 0xff, 0x0f}, 8, func(_ *[16]uint64, _ *bool, was uint64) uint64 { return was - 1 }},
	{"incl (%rdi)", []byte{0xf0, 0xff, 0x07}, 4, func(_ *[16]uint64, _ *bool, was uint64) uint64 { return was + 1 }},
	{"incl (%r15)", []byte{0xf0, 0x41, 0xff, 0x07}, 4, func(_ *[16]uint64, _ *bool, was uint64) uint64 { return was + 1 }},
	{"incb (%rdi)", []byte{0xf0, 0xfe, 0x07}, 1, func(_ *[16]uint64, _ *bool, was uint64) uint64 { return was + 1 }},
	{"addq %rsi,(%rdi)", []byte{0xf0, 0x48, 0x01, 0x37}, 8, func(r *[16]uint64, _ *bool, was uint64) uint64 { return was + r[rsi] }},
	{"addw %si,(%rdi)", []byte{0x66, 0xf0, 0x01, 0x37}, 2, func(r *[16]uint64, _ *bool, was uint64) uint64 { return was + r[rsi] }},
	{"subq $5,(%rdi)", []byte{0xf0, 0x48, 0x83, 0x2f, 0x05}, 8, func(_ *[16]uint64, _ *bool, was uint64) uint64 { return was - 5 }},
	{"andl $0xff00,(%rdi)", []byte{0xf0, 0x81, 0x27, 0x00, 0xff, 0, 0}, 4, func(_ *[16]uint64, _ *bool, was uint64) uint64 { return was & 0xff00 }},
	{"andq $-2,(%rdi)", []byte{0xf0, 0x48, 0x83, 0x27, 0xfe}, 8, func(_ *[16]uint64, _ *bool, was uint64) uint64 { return was &^ 1 }},
	{"orq %rsi,(%rdi)", []byte{0xf0, 0x48, 0x09, 0x37}, 8, func(r *[16]uint64, _ *bool, was uint64) uint64 { return was | r[rsi] }},
	{"orb $2,(%rdi)", []byte{0xf0, 0x80, 0x0f, 0x02}, 1, func(_ *[16]uint64, _ *bool, was uint64) uint64 { return was | 2 }},
	{"xorq %rsi,(%rdi)", []byte{0xf0, 0x48, 0x31, 0x37}, 8, func(r *[16]uint64, _ *bool, was uint64) uint64 { return was ^ r[rsi] }},
	{"notq (%rdi)", []byte{0xf0, 0x48, 0xf7, 0x17}, 8, func(_ *[16]uint64, _ *bool, was uint64) uint64 { return ^was }},
	{"negq (%rdi)", []byte{0xf0, 0x48, 0xf7, 0x1f}, 8, func(_ *[16]uint64, _ *bool, was uint64) uint64 { return -was }},
	{"xaddq %rsi,(%rdi)", []byte{0xf0, 0x48, 0x0f, 0xc1, 0x37}, 8, exchangeAdd(rsi, 8)},
	{"xaddl %eax,(%rdi)", []byte{0xf0, 0x0f, 0xc1, 0x07}, 4, exchangeAdd(rax, 4)},
	{"xchgq %rsi,(%rdi)", []byte{0x48, 0x87, 0x37}, 8, exchange(rsi, 8)},
	{"xchgl %eax,(%rdi)", []byte{0x87, 0x07}, 4, exchange(rax, 4)},
	{"xchgw %ax,(%rdi)", []byte{0x66, 0x87, 0x07}, 2, exchange(rax, 2)},
	{"xchgb %al,(%rdi)", []byte{0x86, 0x07}, 1, exchange(rax, 1)},
	{"cmpxchgq %rsi,(%rdi)", []byte{0xf0, 0x48, 0x0f, 0xb1, 0x37}, 8, compareExchange(8)},
	{"cmpxchgl %esi,(%rdi)", []byte{0xf0, 0x0f, 0xb1, 0x37}, 4, compareExchange(4)},
	{"btsl $3,(%rdi)", []byte{0xf0, 0x0f, 0xba, 0x2f, 0x03}, 4, func(_ *[16]uint64, c *bool, was uint64) uint64 { *c = was&8 != 0; return was | 8 }},
	{"btrq $3,(%rdi)", []byte{0xf0, 0x48, 0x0f, 0xba, 0x37, 0x03}, 8, func(_ *[16]uint64, c *bool, was uint64) uint64 { *c = was&8 != 0; return was &^ 8 }},
	{"btcq $3,(%rdi)", []byte{0xf0, 0x48, 0x0f, 0xba, 0x3f, 0x03}, 8, func(_ *[16]uint64, c *bool, was uint64) uint64 { *c = was&8 != 0; return was ^ 8 }},
}

func low(r, mask uint64, size int, v uint64) uint64 {
	if size == 4 { // writing 32 bits clears the others
		return v & mask
	}
	return r&^mask | v&mask
}

func exchangeAdd(n, size int) func(*[16]uint64, *bool, uint64) uint64 {
	mask := ^uint64(0) >> (64 - 8*size)
	return func(r *[16]uint64, _ *bool, was uint64) uint64 {
		now := was + r[n]
		r[n] = low(r[n], mask, size, was)
		return now
	}
}

func exchange(n, size int) func(*[16]uint64, *bool, uint64) uint64 {
	mask := ^uint64(0) >> (64 - 8*size)
	return func(r *[16]uint64, _ *bool, was uint64) uint64 {
		now := r[n]
		r[n] = low(r[n], mask, size, was)
		return now
	}
}

func compareExchange(size int) func(*[16]uint64, *bool, uint64) uint64 {
	mask := ^uint64(0) >> (64 - 8*size)
	return func(r *[16]uint64, _ *bool, was uint64) uint64 {
		if r[rax]&mask == was&mask {
			return r[rsi]
		}
		r[rax] = low(r[rax], mask, size, was)
		return was // it is written all the same
	}
}

// For every instruction: it is found behind any code, memory that is as it was is swapped, memory that is not is swapped only where
// the registers would be the same, and the registers with which it is tried again are those that it had.
func TestFind(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	value := func() uint64 { return []uint64{random.Uint64(), random.Uint64N(16), 0, ^uint64(0)}[random.IntN(4)] }
	for _, i := range instructions {
		for range 2000 {
			var before [16]uint64
			for n := range before {
				before[n] = value()
			}
			before[rdi], before[r15] = cell, cell
			was := value() & i.mask()
			if random.IntN(2) == 0 && i.name[0] == 'c' { // so that it is equal at times
				before[rax] = before[rax]&^i.mask() | was
			}
			after, carry := before, false
			now := i.does(&after, &carry, was) & i.mask()

			lead := make([]byte, random.IntN(MaxLength-len(i.code)+1))
			for n := range lead {
				lead[n] = 0x90
			}
			op, ok := Find(Write{Code: append(lead, i.code...), RIP: 0xffffffffc0001000, Registers: after, Carry: carry, Address: cell, Size: i.size, Value: now})
			if !ok || op.Length != len(i.code) {
				t.Fatalf("%s: found %v, of %d bytes", i.name, ok, op.Length)
			}
			if got, same := op.Apply(was); !same || got&i.mask() != now {
				t.Fatalf("%s of %#x: %#x, %v, and it was %#x (%x)", i.name, was, got, same, now, before)
			}
			if same(op.Registers, before, i.size) != "" && (op.Registers[rax] != after[rax] || i.name[0] != 'c') {
				t.Fatalf("%s of %#x: tried again with %x, was %x", i.name, was, op.Registers, before)
			}
			other := []uint64{value() & i.mask(), was ^ 8, was ^ 1}[random.IntN(3)]
			if got, ok := op.Apply(other); ok {
				r, c := op.Registers, false
				if want := i.does(&r, &c, other) & i.mask(); c != carry || want != got&i.mask() && !bytesOf(i, got, other) || r != after && !failed(i, after, now) {
					t.Fatalf("%s of %#x passes for %#x: %#x, want %#x", i.name, was, other, got, want)
				}
			}
		}
	}
}

// same says where registers differ: of 32 bits that were exchanged, the upper half was lost.
func same(got, want [16]uint64, size int) string {
	for n := range got {
		if got[n] != want[n] && (size != 4 || uint32(got[n]) != uint32(want[n])) {
			return "register"
		}
	}
	return ""
}

// A compare-and-exchange that found something else changes nothing, whatever is there now.
func failed(i instruction, after [16]uint64, now uint64) bool {
	return i.name[0] == 'c' && after[rax]&i.mask() == now
}

func bytesOf(i instruction, got, other uint64) bool { return i.name[0] == 'c' && got == other }

// What is no atomic instruction, or wrote elsewhere, is none.
func TestFindNone(t *testing.T) {
	w := Write{RIP: 0x1000, Address: cell, Size: 8, Value: 1}
	w.Registers[rdi] = cell
	for _, code := range [][]byte{
		{}, {0xf0}, {0x90, 0x90}, {0x48, 0x89, 0x37} /* mov */, {0x48, 0x01, 0x37} /* add */, {0xf0, 0x48, 0xff, 0x47, 0x08}, /* incq 8(%rdi) */
		{0xf0, 0x65, 0x48, 0xff, 0x07} /* of another segment */, {0xf0, 0xff, 0x07}, /* of another size */
		{0xf0, 0x48, 0x11, 0x37} /* adc */, {0xf0, 0x48, 0x0f, 0xc7, 0x0f}, /* cmpxchg16b */
	} {
		if w.Code = code; len(code) > 0 {
			if op, ok := Find(w); ok {
				t.Errorf("% x: found, of %d bytes", code, op.Length)
			}
		}
	}
	if _, ok := Find(w); ok {
		t.Error("nothing: found")
	}
	w.Code, w.Size = []byte{0xf0, 0xff, 0x05, 0, 0x10, 0, 0}, 4 // incl 0x1000(%rip)
	if w.Address = w.RIP + 0x1000; func() bool { _, ok := Find(w); return !ok }() {
		t.Error("an address by RIP: not found")
	}
	w.Code, w.Registers[rsi], w.Size = []byte{0xf0, 0x48, 0x0f, 0xab, 0x37}, 64+5, 8 // bts of a bit beyond the operand
	if w.Address = cell + 8; func() bool { _, ok := Find(w); return !ok }() {
		t.Error("a bit beyond the operand: not found")
	}
}

// Many that add to parts of one word lose nothing; what crosses a word is refused.
func TestSwap(t *testing.T) {
	b := make([]byte, 16)
	var all sync.WaitGroup
	for n := range 4 {
		all.Go(func() {
			for range 1000 {
				if !Swap(b[2*n:2*n+2], func(was uint64) (uint64, bool) { return was + 1, true }) {
					t.Error("refused")
					return
				}
			}
		})
	}
	all.Wait()
	if !slices.Equal(b[:8], []byte{0xe8, 3, 0xe8, 3, 0xe8, 3, 0xe8, 3}) {
		t.Errorf("% x", b)
	}
	if Swap(b[6:10], func(uint64) (uint64, bool) { return 0, true }) || Swap(b[:4], func(uint64) (uint64, bool) { return 0, false }) {
		t.Error("swapped across words, or what was not to be")
	}
	for _, n := range []int{1, 2, 3, 4, 5, 8} {
		to := make([]byte, 16)
		Store(to[:n], []byte{1, 2, 3, 4, 5, 6, 7, 8}[:n])
		if !slices.Equal(to[:9], append([]byte{1, 2, 3, 4, 5, 6, 7, 8}[:n:n], make([]byte, 9-n)...)) {
			t.Errorf("%d bytes: % x", n, to)
		}
	}
}

func FuzzFind(f *testing.F) {
	for _, i := range instructions {
		f.Add(i.code, uint64(cell), uint64(3), uint8(3))
	}
	f.Fuzz(func(t *testing.T, code []byte, address, value uint64, size uint8) {
		w := Write{Code: code, RIP: 0xffffffffc0000000, Address: address, Value: value, Size: 1 << (size % 4)}
		for n := range w.Registers {
			w.Registers[n] = cell + uint64(n)
		}
		op, ok := Find(w)
		if !ok {
			return
		}
		if op.Length < 2 || op.Length > min(len(code), MaxLength) {
			t.Errorf("of %d bytes", op.Length)
		}
		op.Apply(value)
	})
}
