// Package disk keeps the contents of the store in a file, so that whatever a client was told is
// done is still there after any process was killed at any instant.
//
// One commit of the tree is one transaction of bbolt, written before the client is answered.
// There is no fsync: the file is for a file system that lives as long as the host is up (/run),
// and it has to survive the death of processes, not of the host. bbolt makes a commit visible
// by its last write, of one of two checksummed pages that name the root, so a process killed in
// between leaves the contents of the commit before.
//
// A file that does not check out is refused and left as it is.
package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

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
	version      = []byte("1")
)

// DB is an open file.
type DB struct{ db *bolt.DB }

// Open opens or makes the file in the open directory dir and loads what it holds into t, which
// must be new. It needs dir only until it returns.
func Open(dir *os.File, t *tree.Tree) (*DB, error) {
	path := dir.Name() + "/" + File
	var db *bolt.DB
	err := guard(func() (err error) {
		db, err = bolt.Open(path, 0o600, &bolt.Options{
			Timeout:         time.Millisecond, // the lock is free or it is an error
			NoSync:          true,
			NoGrowSync:      true,
			NoFreelistSync:  true,
			FreelistType:    bolt.FreelistMapType,
			InitialMmapSize: 64 << 20,
			OpenFile: func(_ string, flag int, mode os.FileMode) (*os.File, error) {
				fd, err := unix.Openat(int(dir.Fd()), File, flag|unix.O_CLOEXEC|unix.O_NOFOLLOW, uint32(mode))
				if err != nil {
					return nil, err
				}
				return os.NewFile(uintptr(fd), path), nil
			},
		})
		return err
	})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("%w: %s", ErrInUse, path)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch), errors.Is(err, ErrCorrupt):
		return nil, fmt.Errorf("%w: %s: %w; nothing was changed: remove it to start empty, once no guest runs", ErrCorrupt, path, err)
	case err != nil:
		return nil, fmt.Errorf("store: %s: %w", path, err)
	}
	d := &DB{db: db}
	if err := guard(func() error { return d.load(t) }); err != nil {
		d.db = nil
		_ = guard(db.Close)
		return nil, fmt.Errorf("%w: %s: %w; nothing was changed: remove it to start empty, once no guest runs", ErrCorrupt, path, err)
	}
	return d, nil
}

// guard turns the panics by which bbolt answers some damage into errors.
func guard(f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrCorrupt, r)
		}
	}()
	return f()
}

func (d *DB) load(t *tree.Tree) error {
	fresh := false
	err := d.db.View(func(tx *bolt.Tx) error {
		if fresh = tx.Bucket(formatBucket) == nil; fresh {
			if k, _ := tx.Cursor().First(); k != nil {
				return fmt.Errorf("a file of another program: it has %q", k)
			}
			return nil
		}
		if v := tx.Bucket(formatBucket).Get(versionKey); string(v) != string(version) {
			return fmt.Errorf("format %q, this program knows %q", v, version)
		}
		for err := range tx.Check() {
			return err // the first says enough; the others are read by nobody
		}
		b := tx.Bucket(nodesBucket)
		if b == nil {
			return errors.New("no nodes")
		}
		return b.ForEach(func(k, v []byte) error {
			c, err := decode(v)
			if err != nil {
				return fmt.Errorf("%q: %w", k, err)
			}
			c.Path = string(k)
			return t.Load(c)
		})
	})
	if err != nil || !fresh {
		return err
	}
	return d.db.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucket(formatBucket)
		if err == nil {
			err = b.Put(versionKey, version)
		}
		if err == nil {
			_, err = tx.CreateBucket(nodesBucket)
		}
		return err
	})
}

// Keep is a tree.Persist.
func (d *DB) Keep(changes []tree.Change) error {
	return d.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(nodesBucket)
		for _, c := range changes {
			var err error
			if c.Removed {
				err = b.Delete([]byte(c.Path))
			} else {
				err = b.Put([]byte(c.Path), encode(c))
			}
			if err != nil {
				return fmt.Errorf("keep %q: %w", c.Path, err)
			}
		}
		return nil
	})
}

// Close lets the file go.
func (d *DB) Close() error { return d.db.Close() }

// encode makes the value of a key: the number of permissions, each as a domain and a byte of
// access, then the node's value.
func encode(c tree.Change) []byte {
	b := binary.LittleEndian.AppendUint16(make([]byte, 0, 2+5*len(c.Perms)+len(c.Value)), uint16(len(c.Perms)))
	for _, p := range c.Perms {
		b = append(binary.LittleEndian.AppendUint32(b, uint32(p.Domain)), byte(p.Access))
	}
	return append(b, c.Value...)
}

// decode copies: bbolt's memory is not ours to keep.
func decode(b []byte) (tree.Change, error) {
	var c tree.Change
	if len(b) < 2 {
		return c, errors.New("cut off at offset 0")
	}
	n := int(binary.LittleEndian.Uint16(b))
	if len(b) < 2+5*n {
		return c, fmt.Errorf("%d permissions at offset 2 of %d bytes", n, len(b))
	}
	for i := range n {
		p := b[2+5*i:]
		if p[4]&^byte(tree.Both) != 0 {
			return c, fmt.Errorf("access %#x at offset %d", p[4], 2+5*i+4)
		}
		c.Perms = append(c.Perms, tree.Perm{Domain: tree.Domain(binary.LittleEndian.Uint32(p)), Access: tree.Access(p[4])})
	}
	c.Value = append([]byte(nil), b[2+5*n:]...)
	return c, nil
}
