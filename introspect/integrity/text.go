package integrity

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
)

// A Difference is where the text in memory is not what it should be.
type Difference struct {
	Address uint64 `json:"address"` // as the guest sees it
	Symbol  string `json:"symbol"`
	Kind    Kind   `json:"kind,omitempty"` // of the place, "" where nothing may be changed
	Want    string `json:"want"`           // the first bytes, in hexadecimal
	Got     string `json:"got"`
	Length  int    `json:"length"` // bytes that differ in a row
}

// Text is what became of the kernel's text.
type Text struct {
	Bytes    int          `json:"bytes"`    // from _stext to _etext
	Compared int          `json:"compared"` // each held against the image's
	Checked  int          `json:"checked"`  // of places that the kernel changes, each of which holds what may stand there
	Skipped  int          `json:"skipped"`  // of places that the kernel changes, not compared
	Sites    map[Kind]int `json:"sites"`    // places, by kind
	// Image and Memory are SHA-256 of the text as it was linked, and of what is in memory with the places that the kernel
	// changes put back. They are the same where nothing differs.
	Image       string       `json:"image"`
	Memory      string       `json:"memory"`
	Differences []Difference `json:"differences"`
	More        int          `json:"more,omitempty"` // differences that are not told
}

// mostTold bounds the differences of an answer; shown are a difference's bytes that are told.
const (
	mostTold = 64
	shown    = 16
)

// Text holds the kernel's text against the image's, byte for byte, as far as the kernel does not change it itself.
func (r *Reader) Text() (t Text, err error) {
	t.Sites, t.Differences = map[Kind]int{}, []Difference{}
	from, err := r.Kernel.Symbol("_stext")
	if err != nil {
		return t, err
	}
	to, err := r.Kernel.Symbol("_etext")
	if err != nil {
		return t, err
	}
	want, err := r.moved(from, to)
	if err != nil {
		return t, err
	}
	linked, err := r.Image.Bytes(from, to-from)
	if err != nil {
		return t, err
	}
	got := make([]byte, len(want))
	if n, err := r.Kernel.ReadAt(got, int64(from+r.Kernel.Offset)); err != nil {
		return t, fmt.Errorf("the kernel's text, %d bytes: %w", n, err)
	}
	t.Bytes = len(want)
	thunks := map[uint64]bool{}
	for s := range r.Symbols.All() {
		if strings.HasSuffix(s.Name, "return_thunk") {
			thunks[s.Address] = true
		}
	}
	again := bytes.Clone(linked) // with what differs
	sites := r.collect(from, to)
	skip := make([]bool, len(want)) // of a place the kernel changes
	done := make([]bool, len(want)) // of one that was checked
	for i := range sites {          // first those of which nothing is known: they may be over others
		s := &sites[i]
		t.Sites[s.kind]++
		if at := s.at - from; !s.kind.checked() {
			for j := range s.length {
				skip[at+j] = true
			}
		}
	}
	for i := 0; i < len(sites); {
		at, n, ok := sites[i].at-from, uint64(0), false
		for first := sites[i].at; i < len(sites) && sites[i].at == first; i++ { // of several kinds at a place one is enough
			s := &sites[i]
			end := at + s.length
			if s.kind.checked() && !slices.Contains(skip[at:end], true) {
				n = max(n, s.length)
				ok = ok || s.allowed(want[at:end], got[at:end], thunks)
			}
		}
		if n == 0 {
			continue
		}
		if !ok {
			t.differs(r, from+at, sites[i-1].kind, want[at:at+n], got[at:at+n])
			copy(again[at:at+n], got[at:at+n])
		}
		for j := range n {
			done[at+j] = true
		}
	}
	for i := 0; i < len(want); i++ {
		switch {
		case skip[i]:
			t.Skipped++
		case done[i]:
			t.Checked++
		default:
			t.Compared++
			if want[i] == got[i] {
				continue
			}
			end := i + 1
			for end < len(want) && !skip[end] && !done[end] && want[end] != got[end] {
				end++
			}
			t.differs(r, from+uint64(i), "", want[i:end], got[i:end])
			copy(again[i:end], got[i:end])
			t.Compared += end - i - 1
			i = end - 1
		}
	}
	a, b := sha256.Sum256(linked), sha256.Sum256(again)
	t.Image, t.Memory = hex.EncodeToString(a[:]), hex.EncodeToString(b[:])
	return t, nil
}

func (t *Text) differs(r *Reader, at uint64, kind Kind, want, got []byte) {
	if len(t.Differences) == mostTold {
		t.More++
		return
	}
	seen := at + r.Kernel.Offset
	t.Differences = append(t.Differences, Difference{
		Address: seen, Symbol: r.SymbolAt(seen), Kind: kind, Length: len(got),
		Want: hex.EncodeToString(want[:min(shown, len(want))]), Got: hex.EncodeToString(got[:min(shown, len(got))]),
	})
}
