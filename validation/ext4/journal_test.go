package ext4

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A journalShape is how a test writes a journal.
type journalShape struct {
	compat, incompat uint32
	start            uint64 // block of the first transaction
}

// A transaction is what a test commits.
type transaction struct {
	blocks  map[uint64][]byte
	revoked []uint64
	time    uint64
	spoil   string // what of it is damaged: "data", "descriptor", "revocation", "commit", "no commit"
}

// A journalWriter writes transactions as the kernel does, from its format alone.
type journalWriter struct {
	t        testing.TB
	file     *os.File
	j        *journal
	at       uint64
	sequence uint32
	sum      uint32 // the first version's
}

// writeJournal leaves an image as if a machine had stopped once the transactions were in its journal.
func writeJournal(t testing.TB, image string, shape journalShape, all ...transaction) {
	t.Helper()
	f := open(t, image)
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	j, err := f.openJournal()
	if err != nil {
		t.Fatal(err)
	}
	w := &journalWriter{t: t, file: file, j: j, at: shape.start, sequence: 7}
	b := make([]byte, f.sb.blockSize)
	if _, err := j.read(b, 0); err != nil {
		t.Fatal(err)
	}
	be := binary.BigEndian
	be.PutUint32(b[4:], blockSuperV2)
	be.PutUint32(b[0x18:], w.sequence)
	be.PutUint32(b[0x1c:], uint32(shape.start))
	be.PutUint32(b[0x24:], shape.compat)
	be.PutUint32(b[0x28:], shape.incompat)
	clear(b[0xfc:0x100])
	b[0x50] = 0
	j.compat, j.incompat = shape.compat, shape.incompat
	if j.sums() {
		b[0x50] = 4
		j.seed = crc32c(^uint32(0), b[0x30:0x40])
		be.PutUint32(b[0xfc:], crc32c(^uint32(0), b[:1024]))
	}
	w.put(0, b)
	for _, tx := range all {
		w.transaction(tx)
	}
	changeSuper(t, image, func(b []byte) {
		binary.LittleEndian.PutUint32(b[0x60:], binary.LittleEndian.Uint32(b[0x60:])|incompatRecover)
	})
}

// changeSuper changes an image's superblock, and makes its checksum right.
func changeSuper(t testing.TB, image string, change func(b []byte)) {
	t.Helper()
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	b := make([]byte, superSize)
	if _, err := file.ReadAt(b, superOffset); err != nil {
		t.Fatal(err)
	}
	change(b)
	binary.LittleEndian.PutUint32(b[0x3fc:], crc32c(^uint32(0), b[:0x3fc]))
	if _, err := file.WriteAt(b, superOffset); err != nil {
		t.Fatal(err)
	}
}

func (w *journalWriter) put(n uint64, b []byte) {
	w.t.Helper()
	place, err := w.j.place(n)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.file.WriteAt(b, w.j.fs.sb.offset(place)); err != nil {
		w.t.Fatal(err)
	}
}

// next writes a block at the end of what was written.
func (w *journalWriter) next(b []byte) {
	w.t.Helper()
	w.put(w.at, b)
	w.at = w.j.next(w.at, 1)
}

func (w *journalWriter) header(kind uint32) []byte {
	b := make([]byte, w.j.fs.sb.blockSize)
	binary.BigEndian.PutUint32(b, journalMagic)
	binary.BigEndian.PutUint32(b[4:], kind)
	binary.BigEndian.PutUint32(b[8:], w.sequence)
	return b
}

func (w *journalWriter) tail(b []byte, spoil bool) {
	if w.j.sums() {
		binary.BigEndian.PutUint32(b[len(b)-4:], crc32c(w.j.seed, b))
	}
	if spoil {
		b[len(b)-1]++
	}
}

func (w *journalWriter) transaction(tx transaction) {
	w.sum = ^uint32(0)
	order := slices.Sorted(maps.Keys(tx.blocks))
	most := (int(w.j.fs.sb.blockSize) - journalHeader - 16 - 4) / w.j.tagSize()
	for part := range slices.Chunk(order, most) {
		w.descriptor(tx, part)
	}
	for part := range slices.Chunk(tx.revoked, 50) {
		b := w.header(blockRevoke)
		list := b[:journalHeader+4]
		for _, n := range part {
			if w.j.has(journal64Bit) {
				list = binary.BigEndian.AppendUint64(list, n)
			} else {
				list = binary.BigEndian.AppendUint32(list, uint32(n))
			}
		}
		binary.BigEndian.PutUint32(b[journalHeader:], uint32(len(list)))
		w.tail(b, tx.spoil == "revocation")
		w.next(b)
	}
	if tx.spoil != "no commit" {
		w.commit(tx)
	}
	w.sequence++
}

func (w *journalWriter) descriptor(tx transaction, part []uint64) {
	be := binary.BigEndian
	b := w.header(blockDescriptor)
	var data [][]byte
	pos := journalHeader
	for k, n := range part {
		d := bytes.Clone(tx.blocks[n])
		flags := uint32(0)
		if be.Uint32(d) == journalMagic {
			clear(d[:4])
			flags |= tagEscaped
		}
		if k > 0 {
			flags |= tagSameUUID
		}
		if k == len(part)-1 {
			flags |= tagLast
		}
		var sequence [4]byte
		be.PutUint32(sequence[:], w.sequence)
		sum := crc32c(crc32c(w.j.seed, sequence[:]), d)
		be.PutUint32(b[pos:], uint32(n))
		if w.j.has(journalSumV3) {
			be.PutUint32(b[pos+4:], flags)
			be.PutUint32(b[pos+12:], sum)
		} else {
			be.PutUint16(b[pos+6:], uint16(flags))
			if w.j.has(journalSumV2) {
				be.PutUint16(b[pos+4:], uint16(sum))
			}
		}
		if w.j.has(journal64Bit) {
			be.PutUint32(b[pos+8:], uint32(n>>32))
		}
		if pos += w.j.tagSize(); k == 0 {
			pos += 16
		}
		data = append(data, d)
	}
	w.tail(b, false)
	w.sum = crc32be(w.sum, b)
	if tx.spoil == "descriptor" {
		b[len(b)-1]++
	}
	w.next(b)
	for k, d := range data {
		w.sum = crc32be(w.sum, d)
		if tx.spoil == "data" && k == len(data)/2 {
			d[17]++
		}
		w.next(d)
	}
}

func (w *journalWriter) commit(tx transaction) {
	be := binary.BigEndian
	b := w.header(blockCommit)
	be.PutUint64(b[0x30:], 1_700_000_000+tx.time)
	switch {
	case w.j.sums():
		be.PutUint32(b[0x10:], crc32c(w.j.seed, b))
	case w.j.compat&journalCompatSum != 0:
		b[0xc], b[0xd] = 1, 4
		be.PutUint32(b[0x10:], w.sum)
	}
	if tx.spoil == "commit" {
		b[0x10]++
	}
	w.next(b)
}

// summary says everything of a file system's files that a replay could have changed.
func summary(t testing.TB, f *FS) map[string]string {
	t.Helper()
	all := map[string]string{}
	for e, err := range f.Walk() {
		if err != nil {
			t.Errorf("%v: %v", e, err)
			continue
		}
		in := e.Inode
		s := fmt.Sprintf("%d %o %d %d %d %d %v", in.Number, in.Mode, in.Links, in.UID, in.GID, in.Size, in.Mtime)
		xattrs, err := in.Xattrs()
		if err != nil {
			t.Errorf("%v: %v", e, err)
		}
		s += fmt.Sprint(xattrs)
		if in.Type() == unix.S_IFREG {
			h := sha256.New()
			r, err := in.Open()
			if err == nil {
				_, err = r.WriteTo(h)
			}
			if err != nil {
				t.Errorf("%v: %v", e, err)
			}
			s += fmt.Sprintf(" %x", h.Sum(nil))
		}
		if in.Type() == unix.S_IFLNK {
			target, err := in.Readlink()
			s += fmt.Sprint(target, err)
		}
		all[e.Path] = s
	}
	return all
}

func sameSummary(t testing.TB, what string, got, want map[string]string) {
	t.Helper()
	for p, s := range want {
		if got[p] != s {
			t.Errorf("%s: %s is %q, not %q", what, p, got[p], s)
		}
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			t.Errorf("%s: %s is there", what, p)
		}
	}
}

// A history is an image and what was done to it: the blocks that each step changed.
type history struct {
	first, last string
	steps       []map[uint64][]byte
}

// newHistory makes an image of some files and changes it twice.
func newHistory(t testing.TB, args ...string) *history {
	t.Helper()
	tr := newTree(t)
	for i := range 40 {
		tr.file(t, fmt.Sprintf("/files/%d", i), random(uint64(i), 100*i))
	}
	tr.file(t, "/changed", random(50, 9000))
	h := &history{first: tr.image(t, "8M", args...)}
	escaped := filepath.Join(t.TempDir(), "escaped")
	write(t, escaped, append(binary.BigEndian.AppendUint32(nil, journalMagic), random(51, 20000)...))
	h.last = h.first
	for _, commands := range [][]string{
		{"rm /files/3", "mkdir /new", "cd /new", "write " + escaped + " escaped", "cd /", "rm /changed", "ea_set /files/5 user.x y"},
		{"rm /files/30", "cd /new", "write " + escaped + " again", "symlink link target", "cd /", "sif /files/6 mode 0100755", "mkdir /new/below", "ln /files/7 /new/seven"},
	} {
		next := copyFile(t, h.last)
		debugfs(t, next, commands...)
		repair(t, next) // debugfs leaves numbers of links
		h.steps = append(h.steps, changes(t, h.last, next))
		h.last = next
	}
	return h
}

// changes are the blocks in which two images differ, but for those of the journal.
func changes(t testing.TB, a, b string) map[uint64][]byte {
	t.Helper()
	f := open(t, a)
	bs := f.sb.blockSize
	skip := map[uint64]bool{}
	j, err := f.Inode(f.sb.journalInode)
	if err != nil {
		t.Fatal(err)
	}
	for e, err := range j.Extents() {
		if err != nil {
			t.Fatal(err)
		}
		for k := e.Offset / bs; e.Kind == Data && k < (e.Offset+e.Length)/bs; k++ {
			skip[uint64(k)] = true
		}
	}
	x, errX := os.ReadFile(a)
	y, errY := os.ReadFile(b)
	if err := errors.Join(errX, errY); err != nil {
		t.Fatal(err)
	}
	all := map[uint64][]byte{}
	for n := range uint64(len(x)) / uint64(bs) {
		p := y[int64(n)*bs:][:bs]
		if !skip[n] && !bytes.Equal(x[int64(n)*bs:][:bs], p) {
			all[n] = p
		}
	}
	if len(all) == 0 {
		t.Fatal("nothing changed")
	}
	return all
}

// junk is a transaction that must have no effect: it would wipe some of the blocks that others changed.
func (h *history) junk(n int) map[uint64][]byte {
	all := map[uint64][]byte{}
	for b, p := range h.steps[1] {
		if len(all) < n {
			all[b] = bytes.Repeat([]byte{0xa5}, len(p))
		}
	}
	return all
}

// replays holds an image that needs recovery to one that e2fsck recovered, and to what it must be.
func (h *history) replays(t testing.TB, image, want string) {
	t.Helper()
	before := sha(t, image)
	f := open(t, image)
	got := summary(t, f)
	sameSummary(t, "as it must be", got, summary(t, open(t, want)))
	mended := copyFile(t, image)
	repair(t, mended)
	sameSummary(t, "as e2fsck mends it", got, summary(t, open(t, mended)))
	noProblems(t, f)
	if sha(t, image) != before {
		t.Error("the image was changed")
	}
}

func sha(t testing.TB, path string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

func isAny(err error, kinds ...error) bool {
	return slices.ContainsFunc(kinds, func(k error) bool { return errors.Is(err, k) })
}

func blockList(m map[uint64][]byte) (list string, data []byte) {
	var all []string
	for _, n := range slices.Sorted(maps.Keys(m)) {
		all = append(all, fmt.Sprint(n))
		data = append(data, m[n]...)
	}
	return strings.Join(all, ","), data
}
