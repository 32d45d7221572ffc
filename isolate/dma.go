package isolate

import (
	"errors"
	"fmt"

	"redoubt.dev/redoubt/introspect/types"
	"redoubt.dev/redoubt/kvm"
)

// lists are what modules give devices to write to: struct scatterlist, and struct sg_table.
type lists struct {
	size                 uint64
	page, offset, length types.Field
	first, entries       types.Field
}

func (l *lists) find(all *types.Types) error {
	var err error
	for _, f := range []struct {
		to                *types.Field
		structure, member string
	}{
		{&l.page, "scatterlist", "page_link"},
		{&l.offset, "scatterlist", "offset"},
		{&l.length, "scatterlist", "length"},
		{&l.first, "sg_table", "sgl"},
		{&l.entries, "sg_table", "orig_nents"},
	} {
		var ferr error
		if *f.to, ferr = all.Field(f.structure, f.member); ferr != nil {
			err = errors.Join(err, fmt.Errorf("struct %s: %s: %w", f.structure, f.member, ferr))
		}
	}
	size, serr := all.Size("scatterlist")
	l.size = size
	return errors.Join(err, serr)
}

// maxPieces bounds what one call may have a device write.
const maxPieces = 1 << 12

// A piece is memory that a device is to write.
type piece struct{ at, size uint64 }

var errPieces = fmt.Errorf("more than %d pieces, or a list that leads nowhere", maxPieces)

// byDevice are the functions of the kernel's that have a device write for a module, and what that is: the buffers that it puts into a
// virtio queue for that, and what it maps for a device to write (Documentation/core-api/dma-api.rst). false: this call has none
// write.
var byDevice = map[string]func(*Isolation, *kvm.Regs) (all []piece, ok bool, err error){
	"virtqueue_add_inbuf": (*Isolation).inBuffers, "virtqueue_add_inbuf_ctx": (*Isolation).inBuffers, "virtqueue_add_inbuf_premapped": (*Isolation).inBuffers,
	"virtqueue_add_sgs": func(i *Isolation, r *kvm.Regs) (all []piece, ok bool, err error) {
		out, in := argument(r, 2)&0xffffffff, argument(r, 3)&0xffffffff
		for n := out; n < out+in && err == nil; n++ {
			if n-out >= maxPieces {
				return nil, true, errPieces
			}
			all, err = i.scattered(all, i.wordAt(argument(r, 1)+n*8), maxPieces)
		}
		return all, true, err
	},
	"dma_map_sg_attrs": func(i *Isolation, r *kvm.Regs) (all []piece, ok bool, err error) {
		if !written(argument(r, 3)) {
			return nil, false, nil
		}
		all, err = i.scattered(nil, argument(r, 1), argument(r, 2)&0xffffffff)
		return all, true, err
	},
	"dma_map_sgtable": func(i *Isolation, r *kvm.Regs) (all []piece, ok bool, err error) {
		if !written(argument(r, 2)) {
			return nil, false, nil
		}
		l, t := &i.kernel.lists, argument(r, 1)
		all, err = i.scattered(nil, i.wordAt(t+l.first.Offset), i.half(t+l.entries.Offset))
		return all, true, err
	},
	"dma_map_page_attrs": func(i *Isolation, r *kvm.Regs) (all []piece, ok bool, err error) {
		if !written(argument(r, 4)) {
			return nil, false, nil
		}
		return []piece{{i.pageAddress(argument(r, 1)) + argument(r, 2), argument(r, 3)}}, true, nil
	},
}

func (i *Isolation) inBuffers(r *kvm.Regs) (all []piece, ok bool, err error) {
	all, err = i.scattered(nil, argument(r, 1), argument(r, 2)&0xffffffff)
	return all, true, err
}

// written says whether a device writes what is mapped in a direction (enum dma_data_direction).
func written(direction uint64) bool {
	const toDevice, none = 1, 3
	d := direction & 0xffffffff
	return d != toDevice && d != none
}

// scattered adds what a list of so many entries at most names: one ends where its last entry says so.
func (i *Isolation) scattered(all []piece, at, entries uint64) ([]piece, error) {
	const chain, last = 1, 2
	l := &i.kernel.lists
	for n := uint64(0); n < entries; at += l.size {
		link := i.wordAt(at + l.page.Offset)
		if link&chain != 0 {
			at = link&^3 - l.size
			if entries--; entries > maxPieces { // a chain of chains ends, too
				entries = maxPieces
			}
			continue
		}
		if n++; link == 0 || len(all) == maxPieces {
			return nil, errPieces
		}
		all = append(all, piece{i.pageAddress(link&^3) + i.half(at+l.offset.Offset), i.half(at + l.length.Offset)})
		if link&last != 0 {
			break
		}
	}
	return all, nil
}

// half reads 4 bytes of the kernel's; 0 where there are none.
func (i *Isolation) half(at uint64) uint64 {
	b, err := i.bytes(at, 4)
	if err != nil {
		return 0
	}
	return uint64(b[0]) | uint64(b[1])<<8 | uint64(b[2])<<16 | uint64(b[3])<<24
}
