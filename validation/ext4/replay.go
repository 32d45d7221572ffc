package ext4

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
)

// A replayed block is one whose contents a committed transaction holds.
type replayed struct {
	place    uint64 // of its contents, on the device
	sequence uint32 // of the transaction
	sum      uint32
	escaped  bool
}

// bytesReplayed is about what the map keeps for a block.
const bytesReplayed = 64

// replay has everything read as it will be once the journal was replayed, and reads the superblock anew.
func (f *FS) replay() error {
	j, err := f.openJournal()
	if err != nil {
		return err
	}
	if j.start == 0 {
		return nil
	}
	parts, err := j.scan()
	if err != nil {
		return err
	}
	blocks, err := j.collect(parts)
	if err != nil {
		return err
	}
	if err := j.verify(blocks); err != nil {
		return err
	}
	f.replayed = blocks
	f.cache.drop()
	b := make([]byte, superSize)
	if err := f.read(b, superOffset); err != nil {
		return err
	}
	sb, err := parseSuper(b, f.size)
	if err != nil {
		return fmt.Errorf("after its journal's replay: %w", err)
	}
	if sb.blockSize != f.sb.blockSize {
		return at(superOffset+0x18, ErrCorrupt, "superblock: blocks of %d bytes, of %d after its journal's replay", f.sb.blockSize, sb.blockSize)
	}
	f.sb = sb
	return nil
}

// A part of a transaction is a descriptor or a revocation block of it.
type part struct {
	block    uint64 // of the journal
	sequence uint32
}

// A scan goes once through the journal and finds what was committed.
type scan struct {
	*journal
	parts     []part
	pending   int    // parts of the transaction in hand, at the end of parts
	next      uint64 // block
	sequence  uint32
	walked    uint64
	doubtful  int64  // where the transaction in hand has a wrong checksum, -1: nowhere
	lastTime  uint64 // of a commit
	data      uint32 // the first version's checksum of the transaction in hand
	buf, more []byte
}

// scan finds the parts of all committed transactions.
func (j *journal) scan() ([]part, error) {
	bs := j.fs.sb.blockSize
	s := &scan{journal: j, next: j.start, sequence: j.sequence, doubtful: -1, data: ^uint32(0), buf: make([]byte, bs), more: make([]byte, bs)}
	for {
		on, err := s.step()
		if err != nil {
			return nil, err
		}
		if !on {
			break
		}
		if s.walked > j.last-j.first {
			return nil, at(j.in.offset, ErrCorrupt, "journal: transaction %d is longer than the journal", s.sequence)
		}
	}
	if err := s.refuseFastCommits(); err != nil {
		return nil, err
	}
	return s.parts[:len(s.parts)-s.pending], nil
}

// step looks at one block; false: the transactions end before it.
func (s *scan) step() (bool, error) {
	be := binary.BigEndian
	block := s.next
	off, err := s.read(s.buf, block)
	if err != nil {
		return false, err
	}
	if be.Uint32(s.buf) != journalMagic || be.Uint32(s.buf[8:]) != s.sequence {
		return false, nil
	}
	s.next = s.journal.next(block, 1)
	s.walked++
	switch be.Uint32(s.buf[4:]) {
	case blockDescriptor:
		return true, s.descriptor(part{block, s.sequence}, off)
	case blockRevoke:
		if !s.whole(s.buf) {
			s.doubtful = off
		}
		s.parts = append(s.parts, part{block, s.sequence})
		s.pending++
		return true, nil
	case blockCommit:
		return s.commit(off)
	}
	return false, nil
}

func (s *scan) descriptor(p part, off int64) error {
	if !s.whole(s.buf) {
		s.doubtful = off
	}
	n := uint64(len(s.tags(s.buf)))
	s.parts = append(s.parts, p)
	s.pending++
	s.walked += n
	if s.compat&journalCompatSum != 0 && s.walked <= s.last-s.first {
		s.data = crc32be(s.data, s.buf)
		for k := range n {
			if _, err := s.read(s.more, s.journal.next(s.next, k)); err != nil {
				return err
			}
			s.data = crc32be(s.data, s.more)
		}
	}
	s.next = s.journal.next(s.next, n)
	return nil
}

// commit ends a transaction. What is wrong with it matters if it was committed after the last one: an older commit is
// left over from the journal's last round. Commits that do not wait for their data may be written before those.
func (s *scan) commit(off int64) (bool, error) {
	time := binary.BigEndian.Uint64(s.buf[0x30:])
	good := s.committed(s.buf, s.data)
	if (!good || s.doubtful >= 0) && time < s.lastTime {
		return false, nil
	}
	switch {
	case !good && s.has(journalAsync):
		return false, nil
	case !good:
		return false, at(off, ErrChecksum, "journal: commit of transaction %d", s.sequence)
	case s.doubtful >= 0:
		return false, at(s.doubtful, ErrChecksum, "journal: transaction %d", s.sequence)
	}
	s.lastTime, s.data, s.pending = time, ^uint32(0), 0
	s.sequence++
	return true, nil
}

// refuseFastCommits: what was written since the last transaction in the form of fast commits is not replayed here, and
// without it the file system would be read as it was before ("Journal (jbd2)": "Fast commits").
func (s *scan) refuseFastCommits() error {
	if !s.has(journalFastCommit) || s.last+1 >= s.end {
		return nil
	}
	off, err := s.read(s.buf, s.last+1)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	if le.Uint16(s.buf) == fastCommitHead && le.Uint32(s.buf[8:]) == s.sequence {
		return at(off, ErrUnsupported, "journal: fast commits after transaction %d: have the guest sync or unmount the file system, or run e2fsck", s.sequence-1)
	}
	return nil
}

// collect finds the last contents of each block, in committed transactions only, and leaves out what was revoked since.
func (j *journal) collect(parts []part) (map[uint64]replayed, error) {
	blocks := make(map[uint64]replayed)
	b := make([]byte, j.fs.sb.blockSize)
	var revocations []part
	for _, p := range parts {
		off, err := j.read(b, p.block)
		if err != nil {
			return nil, err
		}
		if binary.BigEndian.Uint32(b[4:]) == blockRevoke {
			revocations = append(revocations, p)
			continue
		}
		for k, t := range j.tags(b) {
			if t.block >= uint64(j.fs.size/j.fs.sb.blockSize) {
				return nil, at(off, ErrCorrupt, "journal: transaction %d: block %d, behind the device's end", p.sequence, t.block)
			}
			place, err := j.place(j.next(p.block, uint64(k)+1))
			if err != nil {
				return nil, err
			}
			blocks[t.block] = replayed{place, p.sequence, t.sum, t.escaped}
		}
		if int64(len(blocks)) > j.fs.memory/bytesReplayed {
			return nil, at(off, ErrEffort, "journal: %d blocks to replay", len(blocks))
		}
	}
	return blocks, j.revoke(blocks, revocations, b)
}

func (j *journal) revoke(blocks map[uint64]replayed, revocations []part, b []byte) error {
	for _, p := range revocations {
		off, err := j.read(b, p.block)
		if err != nil {
			return err
		}
		list, ok := j.revoked(b)
		if !ok {
			return at(off, ErrCorrupt, "journal: revocation block of transaction %d", p.sequence)
		}
		for _, n := range list {
			if r, ok := blocks[n]; ok && int32(p.sequence-r.sequence) >= 0 {
				delete(blocks, n)
			}
		}
	}
	return nil
}

// verify checks the contents of the blocks, in the order they lie in.
func (j *journal) verify(blocks map[uint64]replayed) error {
	if !j.sums() {
		return nil
	}
	b := make([]byte, j.fs.sb.blockSize)
	order := slices.SortedFunc(maps.Keys(blocks), func(x, y uint64) int { return cmp.Compare(blocks[x].place, blocks[y].place) })
	for _, n := range order {
		r := blocks[n]
		if err := j.fs.readDevice(b, j.fs.sb.offset(r.place)); err != nil {
			return err
		}
		if !j.matches(b, r) {
			return at(j.fs.sb.offset(r.place), ErrChecksum, "journal: block %d in transaction %d", n, r.sequence)
		}
	}
	return nil
}
