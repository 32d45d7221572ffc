package symbols

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"testing"

	"redoubt.dev/redoubt/introspect/image"
	"redoubt.dev/redoubt/lab/debian"
)

// layout is what changes from kernel to kernel.
type layout struct {
	name   string
	behind bool // addresses lie behind the tokens' index
	seqs   bool // kallsyms_seqs_of_names before the tokens
}

var layouts = []layout{{"6.1", false, false}, {"6.2", false, true}, {"6.4", true, false}}

const base = firstText + 0x1000000

// written is an image with a table of symbols, as scripts/kallsyms.c writes it: each character is a token of its own,
// and "sys_" is one.
func (l layout) written(all []Symbol) []byte {
	le := binary.LittleEndian
	pad := func(b []byte) []byte { return append(b, make([]byte, align8(len(b))-len(b))...) }
	var index, table, names, markers, offsets []byte
	const word = 1
	for i := range tokens {
		index = le.AppendUint16(index, uint16(len(table)))
		switch {
		case i == word:
			table = append(table, "sys_"...)
		case i < ' ':
			table = append(table, '?') // unused
		default:
			table = append(table, byte(i))
		}
		table = append(table, 0)
	}
	for i, s := range all {
		if i%markerEvery == 0 {
			markers = le.AppendUint32(markers, uint32(len(names)))
		}
		text := bytes.ReplaceAll([]byte(string(s.Kind)+s.Name), []byte("sys_"), []byte{word})
		if len(text) < 0x80 {
			names = append(names, byte(len(text)))
		} else {
			names = append(names, byte(len(text))|0x80, byte(len(text)>>7))
		}
		names = append(names, text...)
		if s.Address < firstText { // per-CPU
			offsets = le.AppendUint32(offsets, uint32(s.Address))
		} else {
			offsets = le.AppendUint32(offsets, uint32(base-1-s.Address))
		}
	}
	addresses := le.AppendUint64(pad(offsets), base)
	image := append([]byte("\x7fELF, and much else.    "), make([]byte, 4096)...)
	if !l.behind {
		image = append(image, addresses...)
	}
	image = le.AppendUint64(image, uint64(len(all)))
	image = append(append(image, pad(names)...), pad(markers)...)
	if l.seqs {
		image = append(image, pad(make([]byte, 3*len(all)))...)
	}
	image = append(append(image, pad(table)...), pad(index)...)
	if l.behind {
		image = append(image, addresses...)
	}
	return append(image, make([]byte, 64)...)
}

func some(n int) (all []Symbol) {
	all = append(all, Symbol{"fixed_percpu_data", 'A', 0})
	for i := range n - 1 {
		all = append(all, Symbol{fmt.Sprintf("sys_call_%d", i/2), "Tt"[i%2], base + uint64(i)*16})
	}
	all[n/2].Name += string(bytes.Repeat([]byte("long"), 100))
	return all
}

// TestFind: every layout, with what is found equal to what was written.
func TestFind(t *testing.T) {
	for _, l := range layouts {
		t.Run(l.name, func(t *testing.T) {
			all := some(1000)
			s, err := Find(l.written(all))
			if err != nil {
				t.Fatal(err)
			}
			if s.Len() != len(all) {
				t.Fatalf("%d symbols", s.Len())
			}
			for i, want := range all {
				if s.all[i] != want {
					t.Errorf("symbol %d: %+v, not %+v", i, s.all[i], want)
				}
			}
			if got, ok := s.Lookup("sys_call_7"); !ok || got.Address != base+14*16 {
				t.Errorf("%+v, %v", got, ok)
			}
			if got, ok := s.Lookup("sys_call"); ok {
				t.Errorf("%+v", got)
			}
			for at, want := range map[uint64]string{base + 14*16: "sys_call_7", base + 15*16 - 1: "sys_call_7", 5: "fixed_percpu_data"} {
				if got, ok := s.At(at); !ok || got.Name != want {
					t.Errorf("%#x: %+v, %v", at, got, ok)
				}
			}
		})
	}
}

// TestDamaged: an image of which a part is missing or does not agree with the rest has no table.
func TestDamaged(t *testing.T) {
	for _, l := range layouts {
		whole := l.written(some(600))
		for cut := 1; cut < len(whole); cut += len(whole) / 50 {
			if s, err := Find(whole[:len(whole)-cut]); err == nil && cut > 64 {
				t.Errorf("%s without the last %d bytes: %d symbols", l.name, cut, s.Len())
			}
		}
		at := bytes.Index(whole, []byte("call_4")) // in the names
		for _, c := range []byte{0, 0xff} {
			b := bytes.Clone(whole)
			b[at-3] = c // a length, or near one: what follows is read at other places
			b[at-2] = c
			if _, err := Find(b); !errors.Is(err, ErrNone) {
				t.Errorf("%s: %v", l.name, err)
			}
		}
	}
}

// TestEffort: an image that looks like tables everywhere is given up.
func TestEffort(t *testing.T) {
	one := layouts[0].written(some(20))
	tail := one[bytes.LastIndex(one, []byte("sys_\x00"))-16:] // tokens and index, without names
	var b []byte
	for len(b) < 4<<20 {
		b = append(b, tail...)
		b = append(b, make([]byte, align8(len(b))-len(b))...)
		b = binary.LittleEndian.AppendUint64(b, mostCount)
		b = append(b, bytes.Repeat([]byte{1, 'x'}, 2000)...)
	}
	if _, err := Find(b); !errors.Is(err, ErrEffort) && !errors.Is(err, ErrNone) {
		t.Error(err)
	}
}

// TestDebian: Debian's kernels, with the layouts of 6.1 and of 6.4 and later, have their symbols, in the order in which kernels
// are linked.
func TestDebian(t *testing.T) {
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"6.1-cloud", "6.12-cloud"} {
		t.Run(name, func(t *testing.T) {
			path, err := root.Vmlinuz(name)
			if err != nil {
				t.Fatal(err)
			}
			packed, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			img, err := image.Unpack(packed)
			if err != nil {
				t.Fatal(err)
			}
			s, err := Find(img.ELF)
			if err != nil {
				t.Fatal(err)
			}
			at := func(name string) uint64 {
				x, ok := s.Lookup(name)
				if !ok {
					t.Errorf("no %s", name)
				}
				return x.Address
			}
			if text := at("_text"); text != 0xffffffff81000000 {
				t.Errorf("_text at %#x", text)
			}
			order := []string{"_text", "commit_creds", "_etext", "sys_call_table", "init_task", "modules", "_end"}
			for i := range order[1:] {
				if at(order[i]) >= at(order[i+1]) {
					t.Errorf("%s at %#x, %s at %#x", order[i], at(order[i]), order[i+1], at(order[i+1]))
				}
			}
			if s.Len() < 50000 {
				t.Errorf("%d symbols", s.Len())
			}
			if next, ok := s.After(at("_text")); !ok || next <= at("_text") {
				t.Errorf("after _text: %#x, %v", next, ok)
			}
		})
	}
}

// FuzzFind: whatever the image, the search ends, and what it finds can be looked up.
func FuzzFind(f *testing.F) {
	for _, l := range layouts {
		f.Add(l.written(some(20)))
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		s, err := Find(image)
		if err != nil {
			return
		}
		for _, x := range s.all {
			if _, ok := s.Lookup(x.Name); !ok {
				t.Errorf("%+v", x)
			}
		}
	})
}
