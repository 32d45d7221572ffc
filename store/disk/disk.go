// Package disk keeps the contents of the store in a file, so that whatever a client was told is
// done is still there after any process was killed at any instant.
//
// One commit of the tree is one transaction of bbolt, written before the client is answered.
// There is no fsync: the file is for a file system that lives as long as the host is up (/run),
// and it has to survive the death of processes, not of the host. bbolt makes a commit visible
// by its last write, of one of two checksummed pages that name the root, so a process killed in
// between leaves the contents of the commit before.
//
// A file that does not check out is refused and left as it is. To check out, both root pages
// must be whole (no process's death damages one), each record must have its checksum, and their
// number and the sum of their checksums must be those that the last commit noted. A file that
// does is read once (parse.go) and then written anew beside it and put in its place by a rename, so that
// nothing but its records is relied upon, and a file that exists is always whole.
package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
	"redoubt.dev/redoubt/store/tree"
)

// File is the name of the file in its directory.
const File = "contents.db"

var (
	// ErrCorrupt says that the file is damaged or not ours. It is never replaced: who finds it
	// decides.
	ErrCorrupt = errors.New("store: contents are damaged")
	// ErrInUse says that another process has it open.
	ErrInUse = errors.New("store: contents are in use by another process")
)

// The buckets of the file. Keys of nodes are their paths, those of attributes as in tree.Change.
var (
	nodesBucket  = []byte("nodes")
	formatBucket = []byte("format")
	versionKey   = []byte("version")
	sumKey       = []byte("sum")
	version      = []byte("1")
)

// DB is an open file.
type DB struct {
	db   *bolt.DB
	lock *os.File // the directory, locked
	sum  sum
}

// sum is what all records add up to.
type sum struct{ records, checksums uint64 }

func (s sum) encode() []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, s.records), s.checksums)
}

// replace takes one record (nil: none) for another (nil: none).
func (s *sum) replace(old, new []byte) {
	if old != nil {
		s.records--
		s.checksums -= uint64(binary.LittleEndian.Uint32(old))
	}
	if new != nil {
		s.records++
		s.checksums += uint64(binary.LittleEndian.Uint32(new))
	}
}

// Open opens or makes the file in the open directory dir and loads what it holds into t, which
// must be new. The directory is locked until Close: of two processes the second is refused.
func Open(dir *os.File, t *tree.Tree) (_ *DB, err error) {
	path := filepath.Join(dir.Name(), File)
	fail := func(err error) error { return fmt.Errorf("store: %s: %w", path, err) }
	// Locks belong to the open file, and dir's is shared with whoever handed it over.
	fd, err := openAt(dir, ".", unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fail(err)
	}
	d := &DB{lock: os.NewFile(uintptr(fd), dir.Name())}
	defer func() {
		if err != nil {
			d.lock.Close()
		}
	}()
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("%w: %s", ErrInUse, path)
	} else if err != nil {
		return nil, fail(err)
	}
	err = d.load(t)
	var no unix.Errno
	switch {
	case errors.Is(err, unix.ENOENT):
	case errors.As(err, &no):
		return nil, fail(err)
	case err != nil:
		return nil, fmt.Errorf("%w: %s: %w; nothing was changed: remove it to start empty, once no guest runs", ErrCorrupt, path, err)
	}
	if err := d.create(t); err != nil {
		return nil, fail(err)
	}
	return d, nil
}

// create writes the contents into a new file and puts it in place.
func (d *DB) create(t *tree.Tree) (err error) {
	const fresh = File + ".new"
	dir := int(d.lock.Fd())
	if err := unix.Unlinkat(dir, fresh, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	if d.db, err = bolt.Open(fresh, 0o600, d.options(fresh)); err != nil {
		return err
	}
	d.sum = sum{}
	err = d.db.Update(func(tx *bolt.Tx) error {
		format, err := tx.CreateBucket(formatBucket)
		if err != nil {
			return err
		}
		nodes, err := tx.CreateBucket(nodesBucket)
		if err != nil {
			return err
		}
		for c := range t.All {
			v := encode(c)
			d.sum.replace(nil, v)
			if err := nodes.Put([]byte(c.Path), v); err != nil {
				return err
			}
		}
		return errors.Join(format.Put(versionKey, version), format.Put(sumKey, d.sum.encode()))
	})
	if err == nil {
		err = unix.Renameat(dir, fresh, dir, File)
	}
	if err != nil {
		return errors.Join(err, d.db.Close())
	}
	return nil
}

func (d *DB) options(name string) *bolt.Options {
	return &bolt.Options{
		Timeout:         time.Second, // nobody else has the directory's lock, so nobody has the file's
		NoSync:          true,
		NoGrowSync:      true,
		NoFreelistSync:  true,
		NoStatistics:    true,
		FreelistType:    bolt.FreelistMapType,
		InitialMmapSize: 64 << 20, // room to grow without mapping anew
		OpenFile: func(_ string, flag int, mode os.FileMode) (*os.File, error) {
			fd, err := openAt(d.lock, name, flag|unix.O_NOFOLLOW, mode)
			if err != nil {
				return nil, err
			}
			return os.NewFile(uintptr(fd), name), nil
		},
	}
}

// openAt opens what lies in a directory.
func openAt(dir *os.File, name string, flag int, mode os.FileMode) (fd int, err error) {
	return eintr.Value(func() (int, error) { return unix.Openat(int(dir.Fd()), name, flag|unix.O_CLOEXEC, uint32(mode)) })
}

// maxSize bounds a file that is read: a hundred times what quotas let a host's guests fill.
const maxSize = 1 << 30

// load reads a file into t.
func (d *DB) load(t *tree.Tree) error {
	fd, err := openAt(d.lock, File, unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), File)
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return err
	}
	if len(b) > maxSize {
		return fmt.Errorf("more than %d bytes", maxSize)
	}
	return read(b, t)
}

func read(b []byte, t *tree.Tree) error {
	var have sum
	format := map[string]string{}
	err := parse(b, os.Getpagesize(), func(bucket string, key, value []byte) error {
		switch bucket {
		case string(formatBucket):
			format[string(key)] = string(value)
			return nil
		case string(nodesBucket):
			c, err := decode(string(key), value)
			if err != nil {
				return fmt.Errorf("%q: %w", key, err)
			}
			have.replace(nil, value)
			return t.Load(c)
		}
		return fmt.Errorf("a file of another program: bucket %q", bucket)
	})
	switch {
	case err != nil:
		return err
	case format[string(versionKey)] != string(version):
		return fmt.Errorf("format %q, this program knows %q", format[string(versionKey)], version)
	case format[string(sumKey)] != string(have.encode()):
		return fmt.Errorf("%d records, and they are not those of the last commit", have.records)
	}
	return nil
}

// Keep is a tree.Persist.
func (d *DB) Keep(changes []tree.Change) error {
	sum := d.sum
	err := d.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(nodesBucket)
		for _, c := range changes {
			key, old := []byte(c.Path), b.Get([]byte(c.Path))
			var err error
			if c.Removed {
				sum.replace(old, nil)
				err = b.Delete(key)
			} else {
				v := encode(c)
				sum.replace(old, v)
				err = b.Put(key, v)
			}
			if err != nil {
				return fmt.Errorf("keep %q: %w", c.Path, err)
			}
		}
		return tx.Bucket(formatBucket).Put(sumKey, sum.encode())
	})
	if err == nil {
		d.sum = sum
	}
	return err
}

// Close lets the file and its directory go.
func (d *DB) Close() error { return errors.Join(d.db.Close(), d.lock.Close()) }

// encode makes the value of a key: a checksum of key and rest, the number of permissions, each
// as a domain and a byte of access, then the node's value.
func encode(c tree.Change) []byte {
	b := make([]byte, 4, 6+5*len(c.Perms)+len(c.Value))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(c.Perms)))
	for _, p := range c.Perms {
		b = append(binary.LittleEndian.AppendUint32(b, uint32(p.Domain)), byte(p.Access))
	}
	b = append(b, c.Value...)
	binary.LittleEndian.PutUint32(b, checksum(c.Path, b[4:]))
	return b
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(key string, rest []byte) uint32 {
	return crc32.Update(crc32.Checksum([]byte(key), castagnoli), castagnoli, rest)
}

// decode copies: bbolt's memory is not ours to keep.
func decode(key string, b []byte) (tree.Change, error) {
	c := tree.Change{Path: key}
	if len(b) < 6 {
		return c, errors.New("cut off at offset 0")
	}
	if binary.LittleEndian.Uint32(b) != checksum(key, b[4:]) {
		return c, errors.New("wrong checksum at offset 0")
	}
	n := int(binary.LittleEndian.Uint16(b[4:]))
	if len(b) < 6+5*n {
		return c, fmt.Errorf("%d permissions at offset 4 of %d bytes", n, len(b))
	}
	for i := range n {
		p := b[6+5*i:]
		if p[4]&^byte(tree.Both) != 0 {
			return c, fmt.Errorf("access %#x at offset %d", p[4], 6+5*i+4)
		}
		c.Perms = append(c.Perms, tree.Perm{Domain: tree.Domain(binary.LittleEndian.Uint32(p)), Access: tree.Access(p[4])})
	}
	c.Value = append([]byte(nil), b[6+5*n:]...)
	return c, nil
}
