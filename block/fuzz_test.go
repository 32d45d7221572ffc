package block

import (
	"encoding/binary"
	"testing"
)

// FuzzOverlay makes of its input changes, reads and new openings, and holds the overlay to a model.
func FuzzOverlay(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x10\x00\x01\x08\x00\x10\x01\x02\x00\x00\xff\xff\x03\x00\x00\x00\x00"))
	f.Add([]byte("\x01\x0f\xff\x00\x02\x04\x00\x00\x00\x00\x00\x0f\xff\x00\x02\x02\x10\x00\x10\x00"))
	f.Fuzz(func(t *testing.T, program []byte) {
		const size = 48<<10 + 512
		base, model := newBase(t, size, 5)
		before := sum(t, base)
		path := newOverlay(t, base)
		o := openOverlay(t, path, base)
		for i := 0; len(program) >= 5 && i < 64; i, program = i+1, program[5:] {
			off := int64(binary.BigEndian.Uint16(program[1:])) % size
			n := int64(binary.BigEndian.Uint16(program[3:])) % (size - off + 1)
			switch program[0] % 5 {
			case 0, 1:
				p := make([]byte, n)
				for j := range p {
					p[j] = byte(i + 1)
				}
				if _, err := o.WriteAt(p, off); err != nil {
					t.Fatal(err)
				}
				copy(model[off:], p)
			case 2:
				if err := o.Discard(off, n); err != nil {
					t.Fatal(err)
				}
				clear(model[off : off+n])
			case 3:
				sameAsModel(t, o, model, off, n)
			case 4:
				if err := o.Close(); err != nil {
					t.Fatal(err)
				}
				o = openOverlay(t, path, base)
			}
		}
		sameAsModel(t, o, model, 0, size)
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		if sum(t, base) != before {
			t.Fatal("the base was changed")
		}
	})
}

// FuzzOverlayRecord: what is no record is refused, what is one is that one.
func FuzzOverlayRecord(f *testing.F) {
	f.Add(record{baseRecord{1 << 20, 1700000000, 5}, 7}.append(nil))
	f.Add([]byte(trailerMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord(b)
		if err == nil && string(r.append(nil)) != string(b[:trailerSize]) {
			t.Fatalf("%x is %+v", b, r)
		}
	})
}
