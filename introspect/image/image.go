// Package image reads a Linux kernel's boot image for x86-64: it unpacks it, and says what the kernel's own bytes are
// before it has moved and patched itself.
//
// The image is a guest's and may say anything: every place is checked before it is read, and what it unpacks to is
// bounded.
//
// Source: Linux, Documentation/arch/x86/boot.rst (payload), arch/x86/boot/compressed/misc.c (handle_relocations),
// arch/x86/tools/relocs.c.
package image

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"
)

// Bounds, in bytes. Debian's kernels unpack to 60 MiB.
const (
	MaxPacked = 64 << 20
	MaxSize   = 192 << 20
	maxWindow = 128 << 20 // of xz and zstd

	usual = 16 // times as large is a kernel when it is unpacked, at most
)

// Of the setup header, by offset in the image.
const (
	headerMagic   = 0x202
	headerVersion = 0x206
	setupSectors  = 0x1f1
	payloadOffset = 0x248
	payloadLength = 0x24c
	headerEnd     = 0x250
	sector        = 512
)

// An Image is an unpacked kernel.
type Image struct {
	ELF   []byte // and what follows the file: relocations
	file  *elf.File
	loads []*elf.Prog
}

// ErrNone says that a file is no kernel that can be unpacked.
var ErrNone = errors.New("not a bzImage, nor an ELF file for x86-64")

// Unpack reads a bzImage, packed by gzip, xz, lz4 or zstd, or an ELF file (vmlinux).
func Unpack(b []byte) (*Image, error) {
	if bytes.HasPrefix(b, []byte(elf.ELFMAG)) {
		if len(b) > MaxSize {
			return nil, fmt.Errorf("a kernel of %d bytes: the most is %d", len(b), MaxSize)
		}
		return open(b)
	}
	if len(b) > MaxPacked {
		return nil, fmt.Errorf("a packed kernel of %d bytes: the most is %d", len(b), MaxPacked)
	}
	payload, err := payloadOf(b)
	if err != nil {
		return nil, err
	}
	out, err := unpack(payload)
	if err != nil {
		return nil, err
	}
	return open(out)
}

func payloadOf(b []byte) ([]byte, error) {
	le := binary.LittleEndian
	if len(b) < headerEnd || string(b[headerMagic:headerMagic+4]) != "HdrS" {
		return nil, ErrNone
	}
	if v := le.Uint16(b[headerVersion:]); v < 0x208 {
		return nil, fmt.Errorf("a bzImage of boot protocol %d.%02d: 2.08 or later says where its kernel is", v>>8, v&0xff)
	}
	setup := uint64(b[setupSectors])
	if setup == 0 {
		setup = 4
	}
	start := (setup+1)*sector + uint64(le.Uint32(b[payloadOffset:]))
	length := uint64(le.Uint32(b[payloadLength:]))
	if start > uint64(len(b)) || length > uint64(len(b))-start {
		return nil, fmt.Errorf("a bzImage whose kernel, %d bytes at %#x, is not in its %d bytes", length, start, len(b))
	}
	return b[start : start+length], nil
}

// unpack unpacks by what the payload begins with. Behind all but gzip's the kernel's build has put the unpacked size,
// which no format knows: what lies behind the end is not looked at.
func unpack(b []byte) ([]byte, error) {
	var r io.Reader
	var err error
	var name string
	switch src := bytes.NewReader(b); {
	case bytes.HasPrefix(b, []byte("\x1f\x8b")):
		name = "gzip"
		var z *gzip.Reader
		if z, err = gzip.NewReader(src); err == nil {
			z.Multistream(false)
			r = z
		}
	case bytes.HasPrefix(b, []byte("\xfd7zXZ\x00")):
		name = "xz"
		var z *xz.Reader
		if z, err = xz.NewReader(src, maxWindow); err == nil {
			z.Multistream(false)
			r = z
		}
	case bytes.HasPrefix(b, []byte("\x02\x21\x4c\x18")): // a legacy frame
		name, r = "lz4", lz4.NewReader(src)
	case bytes.HasPrefix(b, []byte("\x28\xb5\x2f\xfd")):
		name = "zstd"
		var z *zstd.Decoder
		if z, err = zstd.NewReader(bytes.NewReader(b[:max(4, len(b)-4)]), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(MaxSize), zstd.WithDecoderConcurrency(1)); err == nil {
			defer z.Close()
			r = z
		}
	default:
		return nil, fmt.Errorf("a kernel that is packed in another way than gzip, xz, lz4 or zstd: it begins with %x", b[:min(6, len(b))])
	}
	if err != nil {
		return nil, fmt.Errorf("the kernel's image, %s: %w", name, err)
	}
	var out bytes.Buffer
	if n := len(b) - 4; n > 0 { // the size, if it is there
		out.Grow(min(int(binary.LittleEndian.Uint32(b[n:])), MaxSize, usual*len(b)) + bytes.MinRead)
	}
	_, err = io.Copy(&out, io.LimitReader(r, MaxSize+1))
	switch {
	case out.Len() > MaxSize:
		return nil, fmt.Errorf("a kernel that unpacks to more than %d bytes", MaxSize)
	case name == "lz4" && bytes.HasPrefix(out.Bytes(), []byte(elf.ELFMAG)):
		// A block's length is read where the size is: the end is an error or none.
	case err != nil:
		return nil, fmt.Errorf("the kernel's image, %s: %w", name, err)
	}
	return out.Bytes(), nil
}

// maxSegments bounds an ELF file's; a kernel has a handful.
const maxSegments = 32

func open(b []byte) (*Image, error) {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("the kernel's image: %w", err)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return nil, ErrNone
	}
	i := &Image{ELF: b, file: f}
	for _, p := range f.Progs {
		if p.Type != elf.PT_LOAD {
			continue
		}
		if p.Off > uint64(len(b)) || p.Filesz > uint64(len(b))-p.Off || p.Vaddr+p.Filesz < p.Vaddr {
			return nil, fmt.Errorf("the kernel's image: a segment of %d bytes at %#x is not in its %d bytes", p.Filesz, p.Off, len(b))
		}
		i.loads = append(i.loads, p)
	}
	if len(i.loads) == 0 || len(i.loads) > maxSegments {
		return nil, fmt.Errorf("the kernel's image: %d segments: 1 to %d are read", len(i.loads), maxSegments)
	}
	return i, nil
}

// Bytes are n bytes at an address that the kernel was linked for. They are the image's: not to be changed.
func (i *Image) Bytes(address, n uint64) ([]byte, error) {
	for _, p := range i.loads {
		if address >= p.Vaddr && address-p.Vaddr < p.Filesz && n <= p.Filesz-(address-p.Vaddr) {
			return i.ELF[p.Off+address-p.Vaddr:][:n:n], nil
		}
	}
	return nil, fmt.Errorf("the kernel's image holds no %d bytes at %#x", n, address)
}

// maxText bounds Text.
const maxText = 1 << 10

// Text is the text at an address, with the zero that ends it.
func (i *Image) Text(address uint64) ([]byte, error) {
	for _, p := range i.loads {
		if address < p.Vaddr || address-p.Vaddr >= p.Filesz {
			continue
		}
		b := i.ELF[p.Off:][:p.Filesz][address-p.Vaddr:]
		if end := bytes.IndexByte(b[:min(maxText, len(b))], 0); end > 0 {
			return b[: end+1 : end+1], nil
		}
	}
	return nil, fmt.Errorf("the kernel's image holds no text at %#x", address)
}

// Section is a section's address and contents, nil where the image has none of that name. They are the image's.
func (i *Image) Section(name string) (address uint64, data []byte) {
	s := i.file.Section(name)
	if s == nil || s.Type == elf.SHT_NOBITS || s.Flags&elf.SHF_COMPRESSED != 0 ||
		s.Offset > uint64(len(i.ELF)) || s.Size > uint64(len(i.ELF))-s.Offset {
		return 0, nil
	}
	return s.Addr, i.ELF[s.Offset:][:s.Size:s.Size]
}

// Sections are the names of all sections.
func (i *Image) Sections() []string {
	names := make([]string, len(i.file.Sections))
	for n, s := range i.file.Sections {
		names[n] = s.Name
	}
	return names
}
