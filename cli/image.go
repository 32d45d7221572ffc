package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/validation/partition"
	"redoubt.dev/redoubt/validation/volume"
)

func (a *app) imageCommand() *cobra.Command {
	var o imageOptions
	image := &cobra.Command{
		Use:   "image",
		Short: "Read the files in a disk image, without mounting it",
		Long: `Reads the file systems in disk images: ext2, ext3, ext4 and FAT, bare or in a partition of a GPT or an MBR. Nothing is
mounted or written, no privileges are needed, and the image may be hostile. A journal that was left behind is
replayed in memory: what is shown is what the guest would see.

Name a partition behind the image, with a colon: disk.img:2. It need not be named where there is only one. The image must
not be in use by a running guest.`,
		Example: `  redoubt image ls web-1.img:1 /etc
  redoubt image cat web-1.img:1 /etc/passwd
  redoubt image hash --base debian.img web-2.img:1 /usr/bin
  redoubt image check web-1.img:1`,
	}
	image.PersistentFlags().StringVar(&o.base, "base", "", "raw image that IMAGE is an overlay over")
	image.AddCommand(a.imageLs(&o), a.imageStat(&o), a.imageCat(&o), a.imageHash(&o), a.imageCheck(&o))
	return image
}

type imageOptions struct {
	base      string
	recursive bool
}

// An openImage is a file system in an image.
type openImage struct {
	volume.Volume
	ctx   context.Context
	name  string // IMAGE[:partition], for errors
	image block.Image
	table *partition.Table
	part  *partition.Partition
}

// fail says what failed in the image.
func (i *openImage) fail(err error) error { return fmt.Errorf("image %s: %w", i.name, err) }

// splitImage takes the partition off an image's name; a file that has such a name is taken as it is.
func splitImage(arg string) (path string, number int) {
	if i := strings.LastIndexByte(arg, ':'); i > 0 {
		if n, err := strconv.ParseUint(arg[i+1:], 10, 16); err == nil {
			if _, err := os.Stat(arg); err != nil {
				return arg[:i], int(n)
			}
		}
	}
	return arg, 0
}

func openImageFile(path string, o *imageOptions) (block.Image, error) {
	if o.base == "" {
		r, err := block.Open(path, true)
		if err != nil {
			return nil, err
		}
		if block.EndsAsOverlay(r) {
			return nil, errors.Join(fmt.Errorf("image %s: an overlay: name the image that it is over with --base", path), r.Close())
		}
		return r, nil
	}
	top, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	base, err := os.Open(o.base)
	if err != nil {
		return nil, errors.Join(err, top.Close())
	}
	return block.NewOverlay(top, base, true)
}

// openImage opens the file system that an argument names.
func (a *app) openImage(ctx context.Context, arg string, o *imageOptions) (*openImage, error) {
	path, number := splitImage(arg)
	image, err := openImageFile(path, o)
	if errors.Is(err, block.ErrInUse) {
		return nil, fmt.Errorf("%w: stop the guest first", err)
	}
	if err != nil {
		return nil, err
	}
	i := &openImage{ctx: ctx, name: arg, image: image}
	if err := i.open(number); err != nil {
		return nil, errors.Join(i.fail(err), image.Close())
	}
	return i, nil
}

func (i *openImage) open(number int) error {
	table, err := partition.Read(i.image, i.image.Size(), partition.Options{})
	if err != nil {
		return err
	}
	i.table = table
	if i.part, err = i.choose(number); err != nil {
		return err
	}
	i.Volume, err = volume.OpenPartition(i.image, i.part, volume.Options{})
	return err
}

// choose finds the partition that was asked for, or the only one that can be read.
func (i *openImage) choose(number int) (*partition.Partition, error) {
	if number != 0 || len(i.table.Partitions) == 1 {
		return i.table.Find(number)
	}
	var all []string
	var found []*partition.Partition
	for k, p := range i.table.Partitions {
		all = append(all, fmt.Sprintf("%d (%s)", p.Number, p.Content))
		if p.Content.Refusal() == nil {
			found = append(found, &i.table.Partitions[k])
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("none of its partitions can be read: %s", strings.Join(all, ", "))
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("which partition? name one, as in %s:%d: %s", i.name, found[0].Number, strings.Join(all, ", "))
}

// withImage opens the image of a command's arguments and the file that they name, if they do.
func (a *app) withImage(ctx context.Context, args []string, o *imageOptions, follow bool, do func(i *openImage, e *volume.Entry) error) (err error) {
	i, err := a.openImage(ctx, args[0], o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, i.image.Close()) }()
	path := "/"
	if len(args) > 1 {
		path = args[1]
	}
	e, err := i.Lookup(path, follow)
	if err != nil {
		return i.fail(err)
	}
	return do(i, e)
}

// imageArgs is an image and, if least allows it, a path.
func imageArgs(least int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < least || len(args) > 2 {
			return usagef("%s: give IMAGE[:partition] and a path: see `%s --help`", c.CommandPath(), c.CommandPath())
		}
		return nil
	}
}

// A ticker shows progress of what lasts longer than a second.
type ticker struct {
	a    *app
	next time.Time
}

func (a *app) ticker() *ticker { return &ticker{a, time.Now().Add(time.Second)} }

func (t *ticker) show(format string, args ...any) {
	if now := time.Now(); now.After(t.next) {
		t.a.progress(format, args...)
		t.next = now.Add(200 * time.Millisecond)
	}
}

// A watched writer counts what goes through it, and ends it when the command is interrupted: a hostile guest's file may be
// as long as its disk is not.
type watched struct {
	ctx   context.Context
	w     io.Writer
	n     int64
	count func(n int64) // all of it so far
}

func (w *watched) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := w.w.Write(p)
	w.n += int64(n)
	w.count(w.n)
	return n, err
}

// imageFile is an entry as --json prints it.
type imageFile struct {
	Path   string            `json:"path"`
	Type   string            `json:"type"`
	Inode  uint64            `json:"inode"`
	Mode   string            `json:"mode"` // in octal, as of chmod
	UID    uint32            `json:"uid"`
	GID    uint32            `json:"gid"`
	Links  uint32            `json:"links"`
	Size   int64             `json:"size"`
	Mtime  time.Time         `json:"mtime"`
	Device string            `json:"device,omitempty"`
	Target string            `json:"target,omitempty"`
	SHA256 string            `json:"sha256,omitempty"`
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
	// Extents are where on the file system's device it is, in bytes.
	Extents []imageExtent `json:"extents,omitempty"`
}

type imageExtent struct {
	Kind    string `json:"kind"`
	Logical int64  `json:"logical"`
	Offset  int64  `json:"offset"`
	Bytes   int64  `json:"bytes"`
}

var imageTypes = map[uint32]string{
	unix.S_IFREG: "file", unix.S_IFDIR: "directory", unix.S_IFLNK: "link", unix.S_IFCHR: "character device", unix.S_IFBLK: "block device",
	unix.S_IFIFO: "fifo", unix.S_IFSOCK: "socket",
}

func imageFileOf(e *volume.Entry) imageFile {
	f := imageFile{
		Path: e.Path, Type: imageTypes[e.Mode&unix.S_IFMT], Inode: e.Inode, Mode: fmt.Sprintf("%04o", e.Mode&0o7777), UID: e.UID, GID: e.GID,
		Links: e.Links, Size: e.Size, Mtime: e.Mtime, Target: e.Target,
	}
	if t := e.Mode & unix.S_IFMT; t == unix.S_IFCHR || t == unix.S_IFBLK {
		f.Device = fmt.Sprintf("%d:%d", e.Major, e.Minor)
	}
	return f
}
