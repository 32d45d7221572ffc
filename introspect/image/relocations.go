package image

import (
	"encoding/binary"
	"errors"
	"slices"
)

// Relocations are the places that the kernel changes when it is not where it was linked for, by address: those that
// hold an address in 4 or 8 bytes, and those in 4 bytes that a higher place makes lower (of per-CPU variables, until 6.14).
type Relocations struct{ Add32, Sub32, Add64 []uint64 }

// ErrRelocations says that what follows the ELF file is no relocations.
var ErrRelocations = errors.New("the kernel's image has no relocations: it cannot have moved (CONFIG_RANDOMIZE_BASE)")

// Relocations reads them from the image's end, where each list of 4-byte addresses is written backwards, so that it
// ends with a zero.
func (i *Image) Relocations() (r Relocations, err error) {
	at := len(i.ELF)
	var lists [3][]uint64
	n := 0
	for ; n < len(lists); n++ {
		list, next, ok := i.list(at)
		if !ok {
			break
		}
		lists[n], at = list, next
	}
	switch {
	case n == 3 && len(lists[2]) > 0: // there always are addresses in 8 bytes: none are the ELF file's last zeros
		r = Relocations{lists[0], lists[1], lists[2]}
	case n >= 2:
		r = Relocations{Add32: lists[0], Add64: lists[1]}
	}
	if len(r.Add32) == 0 {
		return Relocations{}, ErrRelocations
	}
	for _, l := range [][]uint64{r.Add32, r.Sub32, r.Add64} {
		slices.Sort(l)
	}
	return r, nil
}

// list reads a list backwards; each of its members is in the kernel.
func (i *Image) list(end int) (all []uint64, begin int, ok bool) {
	for at := end - 4; at >= 0; at -= 4 {
		v := binary.LittleEndian.Uint32(i.ELF[at:])
		if v == 0 {
			return all, at, true
		}
		address := uint64(int64(int32(v)))
		if !i.has(address) {
			return nil, 0, false
		}
		all = append(all, address)
	}
	return nil, 0, false
}

// base is by how much a kernel's addresses are above the places it is loaded to (__START_KERNEL_map).
const base = 0xffffffff80000000

// has reports whether an address is in the kernel, by where its segments are loaded: that of per-CPU variables is linked
// for zero.
func (i *Image) has(address uint64) bool {
	for _, p := range i.loads {
		if first := p.Paddr + base; address >= first && address-first < p.Memsz {
			return true
		}
	}
	return false
}

// Moved copies the image's bytes from one address to another as they are where the kernel was moved by an offset.
func (i *Image) Moved(from, to, offset uint64, r Relocations) ([]byte, error) {
	if to < from {
		return nil, errors.New("the kernel's image: an end before its beginning")
	}
	b, err := i.Bytes(from, to-from)
	if err != nil {
		return nil, err
	}
	b = slices.Clone(b)
	le := binary.LittleEndian
	each := func(list []uint64, size uint64, do func(p []byte)) {
		first, _ := slices.BinarySearch(list, from)
		for _, a := range list[first:] {
			if a+size > to {
				return
			}
			do(b[a-from:])
		}
	}
	each(r.Add32, 4, func(p []byte) { le.PutUint32(p, le.Uint32(p)+uint32(offset)) })
	each(r.Sub32, 4, func(p []byte) { le.PutUint32(p, le.Uint32(p)-uint32(offset)) })
	each(r.Add64, 8, func(p []byte) { le.PutUint64(p, le.Uint64(p)+offset) })
	return b, nil
}
