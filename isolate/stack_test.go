package isolate

import (
	"bytes"
	"math/rand/v2"
	"testing"

	layout "redoubt.dev/redoubt/isolate/view"
)

// Of a stack on which a module has changed some words, those are found, and no others: as by looking at each.
func TestChanged(t *testing.T) {
	l, err := layout.New(make([]byte, layout.RWSize), make([]byte, layout.ROSize))
	if err != nil {
		t.Fatal(err)
	}
	const from, pages = 0xffffc90000000000, layout.StackPages
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 200 {
		v := &view{layout: l, stack: &stack{span: span{from, from + pages*pageSize}}}
		v.shown.from = from + r.Uint64N(pages*pageSize/8)*8 + uint64(round%2)*r.Uint64N(8)
		for n := range v.shown.words {
			v.shown.words[n] = byte(r.Uint32())
		}
		for n := range pages {
			to, _ := l.Stack(n)
			copy(to, v.shown.words[n*pageSize:])
		}
		for range r.IntN(6) {
			off := r.IntN(pages * pageSize)
			to, _ := l.Stack(off / pageSize)
			to[off%pageSize] ^= 1
		}
		var got, want []uint64
		begin := from + r.Uint64N(pages*pageSize/8)*8
		for at := v.changed(begin, v.stack.to); at < v.stack.to; at = v.changed(at+8, v.stack.to) {
			got = append(got, at)
		}
		for at := begin; at < v.stack.to; at += 8 {
			if at < v.shown.from || !bytes.Equal(v.mine(at), v.shown.words[at-from:][:8]) {
				want = append(want, at)
			}
		}
		if len(got) != len(want) {
			t.Fatalf("round %d: %d words changed, want %d", round, len(got), len(want))
		}
		for n := range got {
			if got[n] != want[n] {
				t.Fatalf("round %d: word %#x changed, want %#x", round, got[n], want[n])
			}
		}
	}
}
