package vhostuser

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/virtio"
)

// A front is a front end with a block driver: it owns guest memory and one ring in it, and
// reconnects to one back end after the other.
//
// Guest memory: descriptors at 0, available ring at 0x1000, used ring at 0x2000, and from
// 0x10000 a slot for each request: its header, its status, and at the next page its data.
type front struct {
	t          testing.TB
	mem        *os.File
	ram        []byte
	kick, call *os.File
	flight     *os.File
	flightMsg  []byte
	c          *net.UnixConn
	end        chan error // of the back end's Serve
	rings      *Rings     // of the device; nil: nobody asks

	avail, used uint16
}

const (
	memSize   = 4 << 20
	guestBase = 0x40000000
	userBase  = 0x7f0000000000
	atAvail   = 0x1000
	atUsed    = 0x2000
	atSlots   = 0x10000
	slotSize  = 0x2000
	queueSize = 64 // slots of three descriptors each: 21 requests at once
	slots     = queueSize / 3
)

func newFront(t testing.TB) *front {
	t.Helper()
	f := &front{t: t, mem: memfd(t, memSize, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)}
	ram, err := unix.Mmap(int(f.mem.Fd()), 0, memSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	f.ram = ram
	f.kick, f.call = eventfd(t), eventfd(t)
	t.Cleanup(func() {
		_ = f.close()
		if err := unix.Munmap(ram); err != nil {
			t.Error(err)
		}
	})
	return f
}

func memfd(t testing.TB, size int64, seals int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "guest")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return f
}

func eventfd(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "eventfd")
	t.Cleanup(func() { f.Close() })
	return f
}

func socketpair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var c [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "vhost-user")
		n, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		c[i] = n.(*net.UnixConn)
	}
	return c[0], c[1]
}

// whitelist allows the front's memory.
func (f *front) whitelist() Whitelist {
	st, err := f.mem.Stat()
	if err != nil {
		f.t.Fatal(err)
	}
	return Whitelist{st}
}

// serve connects to a back end in this process.
func (f *front) serve(backend virtio.Backend) {
	f.t.Helper()
	own, theirs := socketpair(f.t)
	f.c, f.end = own, make(chan error, 1)
	end := f.end
	go func() {
		end <- Serve(context.Background(), theirs, backend, Options{Memory: f.whitelist(), Rings: f.rings})
	}()
}

// close ends the connection and returns what Serve did.
func (f *front) close() error {
	if f.c == nil {
		return nil
	}
	_ = f.c.Close()
	f.c = nil
	if f.end == nil {
		return nil
	}
	return <-f.end
}

// send sends a request; with answer it returns the reply's payload and the file beside it.
func (f *front) send(r request, payload []byte, answer bool, files ...*os.File) ([]byte, *os.File, error) {
	b := make([]byte, headerSize, headerSize+len(payload))
	le := binary.LittleEndian
	le.PutUint32(b, uint32(r))
	flags := uint32(flagVersion)
	if !answer {
		flags |= flagNeedAck
	}
	le.PutUint32(b[4:], flags)
	le.PutUint32(b[8:], uint32(len(payload)))
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := f.c.WriteMsgUnix(append(b, payload...), oob, nil); err != nil {
		return nil, nil, err
	}
	head, anc := make([]byte, headerSize), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := f.c.ReadMsgUnix(head, anc)
	if err != nil {
		return nil, nil, err
	}
	if n != headerSize {
		return nil, nil, io.ErrUnexpectedEOF
	}
	got, err := descriptors(anc[:oobn])
	if err != nil {
		return nil, nil, err
	}
	p := make([]byte, le.Uint32(head[8:]))
	if _, err := io.ReadFull(f.c, p); err != nil {
		return nil, nil, err
	}
	if !answer && le.Uint64(p) != 0 {
		return nil, nil, fmt.Errorf("%v: refused", r)
	}
	if len(got) == 1 {
		return p, got[0], nil
	}
	return p, nil, nil
}

func (f *front) must(r request, payload []byte, answer bool, files ...*os.File) []byte {
	f.t.Helper()
	p, _, err := f.send(r, payload, answer, files...)
	if err != nil {
		f.t.Fatalf("%v: %v", r, err)
	}
	return p
}

func words(v ...uint64) (b []byte) {
	for _, w := range v {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b
}

func table(r ...region) []byte {
	b := words(uint64(len(r)))
	for _, r := range r {
		b = append(b, words(r.guest, r.size, r.user, r.offset)...)
	}
	return b
}

func addr(index uint32, desc, avail, used uint64) []byte {
	return append(words(uint64(index)), words(userBase+desc, userBase+used, userBase+avail, 0)...)
}

// negotiate does what a front end does before its rings run, features aside.
func (f *front) negotiate() {
	f.t.Helper()
	offered := binary.LittleEndian.Uint64(f.must(getFeatures, nil, true))
	f.must(getProtocolFeatures, nil, true)
	// Only from here on are requests acknowledged.
	if _, err := f.c.Write(append([]byte{byte(setProtocolFeatures), 0, 0, 0, flagVersion, 0, 0, 0, 8, 0, 0, 0}, u64(protoOffered)...)); err != nil {
		f.t.Fatal(err)
	}
	f.must(setOwner, nil, false)
	f.must(setFeatures, u64(offered&^virtio.FeatureEventIdx), false)
}

// start makes the ring run, where it was left.
func (f *front) start() {
	f.t.Helper()
	f.negotiate()
	f.must(setMemTable, table(region{guestBase, memSize, userBase, 0}), false, f.mem)
	if f.flight == nil {
		ask := inflightHead{queues: 1, depth: queueSize}.bytes(24)
		p, file, err := f.send(getInflight, ask, true)
		if err != nil || file == nil {
			f.t.Fatalf("in-flight region: %v %v", file, err)
		}
		f.t.Cleanup(func() { file.Close() })
		f.flight, f.flightMsg = file, p
	}
	f.must(setInflight, f.flightMsg, false, f.flight)
	f.must(setVringNum, vringState{0, queueSize}.bytes(), false)
	// As QEMU does after a crash: the used index, for the rest is the in-flight region's.
	f.must(setVringBase, vringState{0, uint32(f.shownUsed())}.bytes(), false)
	f.must(setVringAddr, addr(0, 0, atAvail, atUsed), false)
	f.must(setVringCall, u64(0), false, f.call)
	f.must(setVringKick, u64(0), false, f.kick)
	f.must(setVringEnable, vringState{0, 1}.bytes(), false)
}

func (f *front) shownUsed() uint16 { return binary.LittleEndian.Uint16(f.ram[atUsed+2:]) }

// reset is the driver's: rings of zeros, from the beginning.
func (f *front) reset() {
	clear(f.ram[:atSlots])
	f.avail, f.used = 0, 0
}

// slot is where request i's bytes are.
func (f *front) slot(i int) []byte { return f.ram[atSlots+i*slotSize:][:slotSize] }

// data is request i's payload.
func (f *front) data(i int) []byte { return f.slot(i)[4096:] }

// status is request i's status byte.
func (f *front) status(i int) *byte { return &f.slot(i)[16] }

// submit makes request i available: kind at sector, with n bytes of its data.
func (f *front) submit(i int, kind uint32, sector uint64, n int) {
	le := binary.LittleEndian
	s := f.slot(i)
	le.PutUint32(s, kind)
	le.PutUint64(s[8:], sector)
	*f.status(i) = 0xff
	at := uint64(guestBase + atSlots + i*slotSize)
	head := uint16(3 * i)
	desc := func(d uint16, addr uint64, n uint32, flags, next uint16) {
		b := f.ram[16*int(d):]
		le.PutUint64(b, addr)
		le.PutUint32(b[8:], n)
		le.PutUint16(b[12:], flags)
		le.PutUint16(b[14:], next)
	}
	write := uint16(0)
	if kind == 0 || kind == 8 {
		write = 2
	}
	if n == 0 {
		desc(head, at, 16, 1, head+2)
	} else {
		desc(head, at, 16, 1, head+1)
		desc(head+1, at+4096, uint32(n), 1|write, head+2)
	}
	desc(head+2, at+16, 1, 2, 0)
	le.PutUint16(f.ram[atAvail+4+2*int(f.avail%queueSize):], head)
	f.avail++
	le.PutUint16(f.ram[atAvail+2:], f.avail)
	if _, err := f.kick.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		f.t.Fatal(err)
	}
}

// next waits for a completion and returns which request it is of.
func (f *front) next() int {
	f.t.Helper()
	var b [8]byte
	for f.shownUsed() == f.used {
		if _, err := f.call.Read(b[:]); err != nil {
			f.t.Fatal(err)
		}
	}
	head := binary.LittleEndian.Uint32(f.ram[atUsed+4+8*int(f.used%queueSize):])
	f.used++
	return int(head / 3)
}

// do carries out one request and returns its status.
func (f *front) do(i int, kind uint32, sector uint64, n int) byte {
	f.t.Helper()
	f.submit(i, kind, sector, n)
	if got := f.next(); got != i {
		f.t.Fatalf("request %d came back, not %d", got, i)
	}
	return *f.status(i)
}
