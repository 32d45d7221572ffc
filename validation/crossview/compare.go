package crossview

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/ext4"
)

// Options say what is compared. All but Taken are required.
type Options struct {
	Volume  string // as names have it, such as disk0p1
	Listing *Listing
	Rules   *baseline.Rules
	Begun   time.Time // when the listing was begun, by the guest's clock
	Taken   time.Time // when the disk was as it is: what was changed a day later, or more, has a false time
	Most    int       // findings
}

// A Result is what a listing does not show.
type Result struct {
	Volume   string             `json:"volume"`
	Listed   int                `json:"listed"` // names in the listing
	Names    int                `json:"names"`  // on the disk, that were looked for
	Findings []baseline.Finding `json:"findings,omitempty"`
	Omitted  int                `json:"omitted,omitempty"` // findings that are too many
	// Unjudged is how many are not in the listing and have changed since it was begun, and Some the first of them.
	Unjudged int      `json:"unjudged,omitempty"`
	Some     []string `json:"some,omitempty"` // as baseline.ParseName reads them
}

const (
	maxSome = 16
	// coarse is how exact the times are of an inode that has seconds only.
	coarse = time.Second
	// skew is by how much a guest's clock may be ahead of its host's.
	skew = 24 * time.Hour
)

// Compare looks in a listing for each name that a file system has. A file or a directory with all that is in it that it lacks is
// one finding of the kind [baseline.Hidden]; so is what lies below a mount point. A directory that cannot be read is one, too.
// What a rule with ignore decides is left out. An error is the context's, or that of the root.
func Compare(ctx context.Context, f *ext4.FS, o Options) (Result, error) {
	c := comparison{
		ctx: ctx, fs: f, o: o, mounts: mountPoints(f), read: map[uint32]bool{}, blocks: int64(f.Info().Blocks), blockSize: f.Info().BlockSize,
		r: Result{Volume: o.Volume, Listed: o.Listing.Len()},
	}
	if o.Taken.IsZero() {
		c.o.Taken = time.Now()
	}
	root, _ := o.Listing.find([]byte("/"))
	for level := []directory{{inode: ext4.RootInode, path: root}}; len(level) > 0; {
		slices.SortFunc(level, func(a, b directory) int { return cmp.Compare(a.inode, b.inode) })
		var below []directory
		for _, d := range level {
			if err := ctx.Err(); err != nil {
				return c.r, err
			}
			below = c.directory(d, below)
		}
		level = below
	}
	for _, some := range slices.Backward(c.by[:]) {
		n := min(len(some), o.Most-len(c.r.Findings))
		c.r.Findings = append(c.r.Findings, some[:n]...)
	}
	c.r.Omitted = c.found - len(c.r.Findings)
	slices.SortFunc(c.r.Findings, baseline.Finding.Compare)
	return c.r, nil
}

// A directory is one that the listing has.
type directory struct {
	inode uint32
	path  string // the listing's, so that what is kept of paths is no more than that
	moved bool   // it may have been elsewhere when the listing was made
}

type comparison struct {
	ctx       context.Context
	fs        *ext4.FS
	o         Options
	mounts    map[string]bool
	read      map[uint32]bool // directories
	blocks    int64           // of directories, that can still be read
	blockSize int64
	r         Result
	found     int
	by        [baseline.Critical + 1][]baseline.Finding
}

// directory compares one, and adds those in it that the listing has, too.
func (c *comparison) directory(d directory, below []directory) []directory {
	name := baseline.Name{Volume: c.o.Volume, Path: d.path}
	in, err := c.fs.Inode(d.inode)
	if err == nil && !in.IsDir() {
		return below // it only said so: the scan tells
	}
	if err == nil && c.read[d.inode] {
		err = fmt.Errorf("%w: inode %d: a second name of a directory", ext4.ErrCorrupt, d.inode)
	}
	if err == nil {
		c.blocks -= in.Size / c.blockSize
		if c.blocks < 0 {
			err = fmt.Errorf("%w: directories of more blocks than the file system", ext4.ErrEffort)
		}
	}
	if err != nil {
		c.unreadable(name, err)
		return below
	}
	c.read[d.inode] = true
	// Its name was given to it then, or its attributes changed: what comes or goes in it changes the time of its contents, too.
	moved := d.moved || d.inode != ext4.RootInode && c.since(in.Ctime) && !in.Ctime.Equal(in.Mtime)
	var under *cover
	if c.mounts[d.path] && !c.o.Listing.below(d.path) {
		under = &cover{}
	}
	path := append(make([]byte, 0, len(d.path)+256), d.path...)
	if d.path != "/" {
		path = append(path, '/')
	}
	dir, errs := len(path), 0
	for e, err := range in.ReadDir() {
		if err != nil {
			if errs++; errs == 1 {
				c.unreadable(name, err)
			}
			continue
		}
		if c.r.Names++; c.r.Names%1024 == 0 && c.ctx.Err() != nil {
			return below
		}
		path = append(path[:dir], e.Name...)
		listed, ok := c.o.Listing.find(path)
		switch {
		case !ok:
			c.missing(baseline.Name{Volume: c.o.Volume, Path: string(path)}, e.Inode, moved, under)
		case e.Type == unix.S_IFDIR || e.Type == 0:
			below = append(below, directory{e.Inode, listed, moved})
		}
	}
	if under != nil && under.names > 0 {
		text := fmt.Sprintf("hidden by what is mounted there: %d names, such as %s", under.names, baseline.Escape(under.such))
		c.add(c.o.Rules.Covered(name, under.such, text))
	}
	return below
}

// A cover is what is mounted over names of a directory.
type cover struct {
	names int
	such  string // the first in the order of names
}

// missing judges a name that the listing lacks.
func (c *comparison) missing(n baseline.Name, inode uint32, moved bool, under *cover) {
	e := baseline.Entry{Name: n}
	in, err := c.fs.Inode(inode)
	if err == nil {
		e.Mode, e.UID, e.GID, e.Links, e.Size = in.Mode, in.UID, in.GID, in.Links, in.Size
		if in.IsDir() {
			e.Links = 1
		}
		e.Major, e.Minor = in.Device()
		if in.Type() == unix.S_IFLNK {
			e.Target, _ = in.Readlink() // what it is is not what counts
		}
	}
	f, ok := c.o.Rules.Hidden(e)
	switch {
	case !ok:
	case err != nil: // the kernel shows names whose inodes it cannot read
		f.Is = "its inode cannot be read"
		c.add(f)
	case moved || c.since(in.Ctime) || c.since(in.Crtime):
		if c.r.Unjudged++; len(c.r.Some) < maxSome {
			c.r.Some = append(c.r.Some, baseline.Escape(n.String()))
		}
	case under != nil:
		base := n.Path[len(n.Path)-lastLength(n.Path):]
		if under.names++; under.names == 1 || base < under.such {
			under.such = base
		}
	default:
		c.add(f)
	}
}

func lastLength(path string) (n int) {
	for n < len(path) && path[len(path)-1-n] != '/' {
		n++
	}
	return n
}

// since reports whether a time is one since the listing was begun. One that is not yet is a lie, and no excuse.
func (c *comparison) since(t time.Time) bool {
	return t.Add(coarse).After(c.o.Begun) && t.Before(c.o.Taken.Add(skew))
}

func (c *comparison) unreadable(n baseline.Name, err error) {
	if f, ok := c.o.Rules.Blind(n, err.Error()); ok {
		c.add(f)
	}
}

// add keeps a finding, and of those that are too many the most severe.
func (c *comparison) add(f baseline.Finding) {
	c.found++
	if some := &c.by[min(f.Severity, baseline.Critical)]; len(*some) < c.o.Most {
		*some = append(*some, f)
	}
}
