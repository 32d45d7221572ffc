package acpi

import (
	"encoding/binary"
	"fmt"
)

// A small assembler of ACPI Machine Language (ACPI 6.5 §20): each function returns the
// encoding of one term. Input is this package's own, so mistakes panic.

// concat joins terms.
func concat(terms ...[]byte) []byte {
	var out []byte
	for _, t := range terms {
		out = append(out, t...)
	}
	return out
}

// packageLength prefixes body with its length, which counts itself (§20.2.4).
func packageLength(body []byte) []byte {
	switch n := len(body); {
	case n+1 < 1<<6:
		return append([]byte{byte(n + 1)}, body...)
	case n+2 < 1<<12:
		n += 2
		return append([]byte{1<<6 | byte(n&0xf), byte(n >> 4)}, body...)
	case n+3 < 1<<20:
		n += 3
		return append([]byte{2<<6 | byte(n&0xf), byte(n >> 4), byte(n >> 12)}, body...)
	}
	panic(fmt.Sprintf("AML package of %d bytes", len(body)))
}

// path is a NameString: an optional root or segments joined by dots.
func path(s string) []byte {
	var out []byte
	if s[0] == '\\' {
		out, s = append(out, '\\'), s[1:]
	}
	if len(s)%5 != 4 {
		panic("AML path " + s)
	}
	switch n := (len(s) + 1) / 5; n {
	case 1:
	case 2:
		out = append(out, 0x2e)
	default:
		out = append(out, 0x2f, byte(n))
	}
	for i := 0; i < len(s); i += 5 {
		out = append(out, s[i:i+4]...)
	}
	return out
}

func scope(name string, terms ...[]byte) []byte {
	return append([]byte{0x10}, packageLength(concat(path(name), concat(terms...)))...)
}

func device(name string, terms ...[]byte) []byte {
	return append([]byte{0x5b, 0x82}, packageLength(concat(path(name), concat(terms...)))...)
}

func method(name string, args byte, terms ...[]byte) []byte {
	return append([]byte{0x14}, packageLength(concat(path(name), []byte{args}, concat(terms...)))...)
}

func name(n string, value []byte) []byte { return concat([]byte{0x08}, path(n), value) }

func integer(v uint64) []byte {
	switch {
	case v <= 1:
		return []byte{byte(v)}
	case v < 1<<8:
		return []byte{0x0a, byte(v)}
	case v < 1<<16:
		return binary.LittleEndian.AppendUint16([]byte{0x0b}, uint16(v))
	case v < 1<<32:
		return binary.LittleEndian.AppendUint32([]byte{0x0c}, uint32(v))
	}
	return binary.LittleEndian.AppendUint64([]byte{0x0e}, v)
}

func str(s string) []byte { return append(append([]byte{0x0d}, s...), 0) }

func list(elements ...[]byte) []byte {
	return append([]byte{0x12}, packageLength(append([]byte{byte(len(elements))}, concat(elements...)...))...)
}

func notify(object string, value uint64) []byte {
	return concat([]byte{0x86}, path(object), integer(value))
}

// eisaID is a compressed EISA identifier such as PNP0A08 (§19.3.4).
func eisaID(id string) []byte {
	var v uint32
	for i := range 3 {
		v = v<<5 | uint32(id[i]-'@')
	}
	for i := 3; i < 7; i++ {
		d := uint32(id[i] - '0')
		if id[i] >= 'A' {
			d = uint32(id[i]-'A') + 10
		}
		v = v<<4 | d
	}
	return binary.BigEndian.AppendUint32([]byte{0x0c}, v)
}

// resources is a resource template buffer (§6.4).
func resources(descriptors ...[]byte) []byte {
	body := append(concat(descriptors...), 0x79, 0) // end tag; checksum 0 means none
	return append([]byte{0x11}, packageLength(concat(integer(uint64(len(body))), body))...)
}

// memory32 is a fixed range (§6.4.3.4).
func memory32(base, size uint32) []byte {
	out := []byte{0x86, 9, 0, 1}
	out = binary.LittleEndian.AppendUint32(out, base)
	return binary.LittleEndian.AppendUint32(out, size)
}

// ports is a fixed I/O range, decoded on 16 bits (§6.4.2.5).
func ports(base uint16, n byte) []byte {
	out := []byte{0x47, 1}
	out = binary.LittleEndian.AppendUint16(out, base)
	out = binary.LittleEndian.AppendUint16(out, base)
	return append(out, 1, n)
}

// isaIRQ is an edge-triggered, active-high interrupt below 16 (§6.4.2.1).
func isaIRQ(n uint) []byte {
	return binary.LittleEndian.AppendUint16([]byte{0x22}, uint16(1)<<n)
}

// interrupt is an edge-triggered, active-high, exclusive interrupt its device consumes (§6.4.3.6).
func interrupt(gsi uint32) []byte {
	return binary.LittleEndian.AppendUint32([]byte{0x89, 6, 0, 0x03, 1}, gsi)
}

// window is memory that a bridge passes on (§6.4.3.5.2): fixed, read-write.
func window(base, size uint32) []byte {
	out := []byte{0x87, 23, 0, 0, 0x0c, 0x01}
	for _, v := range []uint32{0, base, base + size - 1, 0, size} {
		out = binary.LittleEndian.AppendUint32(out, v)
	}
	return out
}

// buses is a range of bus numbers (§6.4.3.5.3).
func buses(first, last uint16) []byte {
	out := []byte{0x88, 13, 0, 2, 0x0c, 0}
	for _, v := range []uint16{0, first, last, 0, last - first + 1} {
		out = binary.LittleEndian.AppendUint16(out, v)
	}
	return out
}
