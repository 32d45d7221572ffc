// Package journal is what one vTPM manager leaves to the next of a vTPM that is in use: memory
// that outlives the process, and that it writes in an order in which it may be killed between any
// two steps.
//
// For each guest it holds the facts of this boot (number, platform authorisation, event log), the
// last command of the guest and the last one of the host with their responses, and the commands of the host's
// present sequence as far as they load or save something. The engine is one process with one
// command at a time, so at most one command of the two is under way.
//
// The order, for a command: its bytes, then Executing, then the command is sent; its response is
// looked at in the socket and put here, then Answered, then it is taken from the socket; then the
// guest gets it. What a manager was killed in, its successor finds: a command that is Executing was
// sent or not, which it asks the engine (engine.Adopt); one that is Answered needs no engine.
//
// The memory is the Builder's. A manager that was taken over may have written anything into it:
// [Open] checks it and refuses what no manager would have left.
package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Bounds in bytes.
const (
	MaxMessage = 4096     // a command or response
	MaxLog     = 32 << 10 // an event log
	MaxAuth    = 64       // a platform authorisation
	maxTurn    = 64 << 10 // a host's sequence
)

// Fact is a bit of what is true of a vTPM.
type Fact uint32

const (
	Ready    Fact = 1 << iota // measured; the guest may be let in
	Durable                   // its record is on disk
	Open                      // the gate has opened: the guest is let in
	GuestLog                  // the event log is for the guest, too
	IMA                       // that the guest measured was told
	all      = Ready | Durable | Open | GuestLog | IMA
)

// ErrJournal says that the memory is not what a manager left.
var ErrJournal = errors.New("vTPM journal")

// Offsets. All numbers are little-endian.
const (
	atMagic    = 0
	atFacts    = 8
	atInstance = 12
	atLocality = 16
	atProbes   = 20
	atNonce    = 24 // nonceSize bytes
	atAuth     = 64 // length, bytes
	atGuest    = 256
	atHost     = atGuest + slotSize
	atLog      = atHost + slotSize    // length, bytes
	atTurn     = atLog + 8 + MaxLog   // length, host's sequence number, entries
	size       = atTurn + 8 + maxTurn // used of Size

	// Size of the memory.
	Size = 128 << 10

	magic     = 0x314c4e4a4d505456 // "VTPMJNL1"
	nonceSize = 32
)

// SettingLocality is in place of a locality while the engine is told another one.
const SettingLocality = 0xff

// A Journal is one guest's. Facts may be told and asked by anybody at any time; everything else is
// the vTPM's present user's.
type Journal struct {
	facts  sync.Mutex
	mem    []byte
	mapped bool
	Guest  Slot
	Host   Slot
}

// Create makes the memory, empty.
func Create() (*os.File, error) {
	fd, err := unix.MemfdCreate("vtpm-journal", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrJournal, err)
	}
	f := os.NewFile(uintptr(fd), "vtpm-journal")
	err = f.Truncate(Size)
	if err == nil { // whoever maps it may rely on its size
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%w: %w", ErrJournal, err)
	}
	return f, nil
}

// Volatile is a journal that ends with this process.
func Volatile() *Journal { return over(make([]byte, Size)) }

func over(mem []byte) *Journal {
	j := &Journal{mem: mem}
	j.Guest, j.Host = Slot{mem[atGuest:][:slotSize]}, Slot{mem[atHost:][:slotSize]}
	return j
}

// Map maps the memory of f, which stays the caller's, for a vTPM that begins: what is in it does not
// matter before Begin.
func Map(f *os.File) (*Journal, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrJournal, err)
	}
	if st.Size() != Size {
		return nil, fmt.Errorf("%w of %d bytes, it has %d", ErrJournal, st.Size(), Size)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("%w: map: %w", ErrJournal, err)
	}
	j := over(mem)
	j.mapped = true
	return j, nil
}

// OpenFile maps the memory of f and checks what another manager left in it. fresh says that
// nothing was.
func OpenFile(f *os.File) (j *Journal, fresh bool, err error) {
	if j, err = Map(f); err != nil {
		return nil, false, err
	}
	if binary.LittleEndian.Uint64(j.mem) == 0 {
		return j, true, nil
	}
	if err := j.check(); err != nil {
		return nil, false, errors.Join(err, j.Close())
	}
	return j, false, nil
}

// Close gives the mapping back; the memory stays.
func (j *Journal) Close() error {
	if !j.mapped {
		return nil
	}
	j.mapped = false
	err := unix.Munmap(j.mem)
	j.mem, j.Guest, j.Host = nil, Slot{}, Slot{}
	return err
}

func (j *Journal) check() error {
	bad := func(what string, at int, v uint64) error {
		return fmt.Errorf("%w: %s %#x at offset %d", ErrJournal, what, v, at)
	}
	if v := binary.LittleEndian.Uint64(j.mem); v != magic {
		return bad("magic", atMagic, v)
	}
	if v := j.u32(atFacts); Fact(v)&^all != 0 {
		return bad("facts", atFacts, uint64(v))
	}
	if v := j.u32(atInstance); v == 0 || v > 1<<30 {
		return bad("instance", atInstance, uint64(v))
	}
	if v := j.u32(atLocality); v > 3 && v != SettingLocality {
		return bad("locality", atLocality, uint64(v))
	}
	for _, l := range []struct {
		what    string
		at, max int
	}{{"authorisation's length", atAuth, MaxAuth}, {"log's length", atLog, MaxLog}, {"sequence's length", atTurn, maxTurn}} {
		if v := j.u32(l.at); uint64(v) > uint64(l.max) {
			return bad(l.what, l.at, uint64(v))
		}
	}
	for _, s := range []struct {
		slot Slot
		at   int
	}{{j.Guest, atGuest}, {j.Host, atHost}} {
		if err := s.slot.check(s.at); err != nil {
			return err
		}
	}
	if j.Guest.under() && j.Host.under() {
		return fmt.Errorf("%w: two commands under way", ErrJournal)
	}
	_, err := j.Turn()
	return err
}

func (j *Journal) u32(at int) uint32       { return binary.LittleEndian.Uint32(j.mem[at:]) }
func (j *Journal) setU32(at int, v uint32) { binary.LittleEndian.PutUint32(j.mem[at:], v) }

// Begin is the start of a boot: nothing is true yet, nothing under way. nonce is random, of 32 bytes.
func (j *Journal) Begin(instance int, nonce []byte) {
	clear(j.mem)
	copy(j.mem[atNonce:][:nonceSize], nonce)
	j.setU32(atInstance, uint32(instance))
	binary.LittleEndian.PutUint64(j.mem, magic)
}

// Restart is the start of another boot of the vTPM that runs: of the facts, only that its record
// is on disk stays true, and the commands were another guest's front end's.
func (j *Journal) Restart() {
	j.NoMore(all &^ Durable)
	clear(j.Guest.mem)
	j.setU32(atLog, 0)
}

// Is reports whether all of the facts are true.
func (j *Journal) Is(f Fact) bool {
	j.facts.Lock()
	defer j.facts.Unlock()
	return Fact(j.u32(atFacts))&f == f
}

// Now makes facts true.
func (j *Journal) Now(f Fact) {
	j.facts.Lock()
	defer j.facts.Unlock()
	j.setU32(atFacts, j.u32(atFacts)|uint32(f))
}

// NoMore makes facts untrue.
func (j *Journal) NoMore(f Fact) {
	j.facts.Lock()
	defer j.facts.Unlock()
	j.setU32(atFacts, j.u32(atFacts)&^uint32(f))
}

// Instance is the vTPM's number.
func (j *Journal) Instance() int { return int(j.u32(atInstance)) }

// Locality is the engine's, or SettingLocality.
func (j *Journal) Locality() uint8 { return uint8(j.u32(atLocality)) }

// SetLocality is told before and after the engine is.
func (j *Journal) SetLocality(l uint8) { j.setU32(atLocality, uint32(l)) }

// NextProbe begins another probe and returns its number, from 1 on.
func (j *Journal) NextProbe() uint32 {
	n := j.u32(atProbes) + 1
	j.setU32(atProbes, n)
	return n
}

// Probes is the number of the last one.
func (j *Journal) Probes() uint32 { return j.u32(atProbes) }

// Nonce is what makes this boot's probes its own.
func (j *Journal) Nonce() []byte { return append([]byte(nil), j.mem[atNonce:][:nonceSize]...) }

// Auth is the platform authorisation.
func (j *Journal) Auth() []byte { return j.bytes(atAuth, 4) }

// SetAuth keeps at most MaxAuth bytes.
func (j *Journal) SetAuth(b []byte) { j.setBytes(atAuth, 4, b, MaxAuth) }

// Log is the event log of what was measured.
func (j *Journal) Log() []byte { return j.bytes(atLog, 8) }

// SetLog keeps a log; false if it is longer than MaxLog.
func (j *Journal) SetLog(b []byte) bool {
	if len(b) > MaxLog {
		return false
	}
	j.setBytes(atLog, 8, b, MaxLog)
	return true
}

func (j *Journal) bytes(at, head int) []byte {
	return append([]byte(nil), j.mem[at+head:][:j.u32(at)]...)
}

func (j *Journal) setBytes(at, head int, b []byte, limit int) {
	n := copy(j.mem[at+head:][:limit], b)
	j.setU32(at, uint32(n))
}
