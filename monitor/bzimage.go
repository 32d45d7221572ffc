package monitor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// ErrKernel says that a file is no kernel this monitor can enter.
var ErrKernel = errors.New("not a bootable kernel")

// Offsets in a bzImage, and in the boot parameters, which share the header's
// (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").
const (
	hdrStart        = 0x1f1
	hdrSetupSects   = 0x1f1
	hdrBootFlag     = 0x1fe
	hdrJump         = 0x201 // second byte of the jump: the header ends at 0x202 plus it
	hdrMagic        = 0x202
	hdrVersion      = 0x206
	hdrLoader       = 0x210
	hdrRamdisk      = 0x218
	hdrRamdiskSize  = 0x21c
	hdrCmdline      = 0x228
	hdrInitrdMax    = 0x22c
	hdrAlignment    = 0x230
	hdrXLoadFlags   = 0x236
	hdrCmdlineSize  = 0x238
	hdrPrefAddress  = 0x258
	hdrInitSize     = 0x260
	hdrEndMin       = 0x268
	setupMax        = 65 * 512
	sector          = 512
	magicHdrS       = "HdrS"
	minProtocol     = 0x020c
	xlfKernel64     = 1 << 0
	entry64         = 0x200
	undefinedLoader = 0xff
)

// A bzImage is a kernel's header, checked.
type bzImage struct {
	header                []byte // from hdrStart, to be copied to the boot parameters
	payload, payloadSize  int64  // the protected-mode kernel in the file
	load, initSize        uint64 // where it wants to be, and what it needs there
	initrdMax, cmdlineMax uint64
}

// parseBzImage reads the header of a kernel of size bytes.
func parseBzImage(r io.ReaderAt, size int64) (*bzImage, error) {
	bad := func(off int, what string) (*bzImage, error) {
		return nil, fmt.Errorf("%w: offset %#x: %s", ErrKernel, off, what)
	}
	h := make([]byte, 0x300)
	if n, err := r.ReadAt(h, 0); err != nil && (!errors.Is(err, io.EOF) || n < hdrEndMin) {
		return bad(n, "the file ends in the header: "+err.Error())
	}
	if binary.LittleEndian.Uint16(h[hdrBootFlag:]) != 0xaa55 || string(h[hdrMagic:hdrMagic+4]) != magicHdrS {
		return bad(hdrMagic, "no bzImage header")
	}
	if v := binary.LittleEndian.Uint16(h[hdrVersion:]); v < minProtocol {
		return bad(hdrVersion, fmt.Sprintf("boot protocol %d.%02d, want 2.12", v>>8, v&0xff))
	}
	if binary.LittleEndian.Uint16(h[hdrXLoadFlags:])&xlfKernel64 == 0 {
		return bad(hdrXLoadFlags, "no 64-bit entry point")
	}
	end := hdrMagic + int(h[hdrJump])
	if end < hdrEndMin || end > 0x290 { // the boot parameters' e820 map begins at 0x2d0
		return bad(hdrJump, fmt.Sprintf("header ends at %#x", end))
	}
	setup := int64(h[hdrSetupSects])
	if setup == 0 {
		setup = 4
	}
	k := &bzImage{
		header:     h[hdrStart:end],
		payload:    (setup + 1) * sector,
		load:       binary.LittleEndian.Uint64(h[hdrPrefAddress:]),
		initSize:   uint64(binary.LittleEndian.Uint32(h[hdrInitSize:])),
		initrdMax:  uint64(binary.LittleEndian.Uint32(h[hdrInitrdMax:])),
		cmdlineMax: uint64(binary.LittleEndian.Uint32(h[hdrCmdlineSize:])),
	}
	k.payloadSize = size - k.payload
	align := uint64(binary.LittleEndian.Uint32(h[hdrAlignment:]))
	switch {
	case k.payloadSize <= entry64:
		return bad(hdrSetupSects, fmt.Sprintf("the kernel begins at %d of %d bytes", k.payload, size))
	case align == 0 || align&(align-1) != 0 || k.load%align != 0:
		return bad(hdrPrefAddress, fmt.Sprintf("preferred address %#x with alignment %#x", k.load, align))
	case k.load < oneMiB || k.load >= lowRAMLimit || k.initSize < uint64(k.payloadSize):
		return bad(hdrPrefAddress, fmt.Sprintf("%#x bytes at preferred address %#x", k.initSize, k.load))
	}
	return k, nil
}
