package cli

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"redoubt.dev/redoubt/validation/volume"
)

func isDir(e *volume.Entry) bool  { return e.Mode&unix.S_IFMT == unix.S_IFDIR }
func isFile(e *volume.Entry) bool { return e.Mode&unix.S_IFMT == unix.S_IFREG }

func (a *app) imageLs(o *imageOptions) *cobra.Command {
	c := &cobra.Command{
		Use:   "ls IMAGE[:partition] [PATH]",
		Short: "List a directory",
		Example: `  redoubt image ls disk.img:1 /etc
  redoubt image ls --recursive disk.img:1
  redoubt image ls --json disk.img:1 /etc/ssh`,
		Args: imageArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withImage(c.Context(), args, o, true, func(i *openImage, e *volume.Entry) error { return a.listImage(i, e, o) })
		},
	}
	c.Flags().BoolVarP(&o.recursive, "recursive", "r", false, "all that is below too")
	return c
}

func (a *app) listImage(i *openImage, e *volume.Entry, o *imageOptions) error {
	all := []imageFile{}
	bad := 0
	tick := a.ticker()
	take := func(e *volume.Entry, err error) {
		if err != nil {
			bad++
			a.progressEnd()
			fmt.Fprintf(a.err, "redoubt: %s\n", oneLine(i.fail(fmt.Errorf("%s: %w", printable(e.Path), err)).Error()))
			return
		}
		all = append(all, imageFileOf(e))
		tick.show("%s: %d files", i.name, len(all))
	}
	switch {
	case !isDir(e):
		take(e, nil)
	case o.recursive:
		for w, err := range i.Walk() {
			if i.ctx.Err() != nil {
				return i.ctx.Err()
			}
			if below(w.Path, e.Path) {
				take(w, err)
			}
		}
	default:
		for w, err := range i.ReadDir(e) {
			take(w, err)
		}
	}
	if err := a.printImageFiles(all, func(f imageFile) { a.printImageFile(f, o.recursive) }); err != nil {
		return err
	}
	if bad > 0 {
		return exitError(1)
	}
	return nil
}

// below reports whether a path is another one or in it.
func below(path, dir string) bool {
	return dir == "/" || path == dir || strings.HasPrefix(path, dir+"/")
}

func (a *app) printImageFile(f imageFile, whole bool) {
	name := f.Path
	if !whole && name != "/" {
		name = name[strings.LastIndexByte(name, '/')+1:]
	}
	name = printable(name)
	if f.Target != "" {
		name += " -> " + printable(f.Target)
	}
	size := fmt.Sprint(f.Size)
	if f.Device != "" {
		size = f.Device
	}
	fmt.Fprintf(a.out, "%-16s %s %5d:%-5d %12s %s %s\n", f.Type, f.Mode, f.UID, f.GID, size, f.Mtime.Format("2006-01-02 15:04:05"), name)
}

func (a *app) imageStat(o *imageOptions) *cobra.Command {
	return &cobra.Command{
		Use:     "stat IMAGE[:partition] [PATH]",
		Short:   "Show all of one file but its contents; without a path, of the file system",
		Example: "  redoubt image stat disk.img:1 /usr/bin/ping\n  redoubt image stat disk.img:1",
		Args:    imageArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withImage(c.Context(), args, o, false, func(i *openImage, e *volume.Entry) error {
				if len(args) == 1 {
					return a.statImage(i)
				}
				return a.statFile(i, e)
			})
		},
	}
}

func (a *app) statImage(i *openImage) error {
	info := i.Info()
	if a.json {
		return a.printJSON(map[string]any{"table": i.table, "partition": i.part, "volume": info})
	}
	fmt.Fprintf(a.out, "table       %s\n", i.table.Scheme)
	if i.table.Damage != nil {
		fmt.Fprintf(a.out, "            read from its second copy: %v\n", i.table.Damage)
	}
	for _, p := range i.table.Partitions {
		mark := ""
		if p.Number == i.part.Number {
			mark = " *"
		}
		fmt.Fprintf(a.out, "partition   %d: %s, %d bytes at %d %s%s\n", p.Number, p.Content, p.Bytes, p.Offset, printable(p.Name), mark)
	}
	fmt.Fprintf(a.out, "kind        %s\nlabel       %s\nuuid        %s\nblocks of   %d bytes\nsize        %d bytes\nfeatures    %s\n",
		info.Kind, printable(info.Label), info.UUID, info.BlockSize, info.Bytes, strings.Join(info.Features, " "))
	if info.Replayed > 0 {
		fmt.Fprintf(a.out, "journal     %d blocks of it were replayed in memory\n", info.Replayed)
	}
	return nil
}

func (a *app) statFile(i *openImage, e *volume.Entry) error {
	f := imageFileOf(e)
	xattrs, err := e.Xattrs()
	if err != nil {
		return i.fail(err)
	}
	if len(xattrs) > 0 {
		f.Xattrs = map[string][]byte{}
	}
	for _, x := range xattrs {
		f.Xattrs[x.Name] = x.Value
	}
	for x, err := range e.Extents() {
		if err != nil {
			return i.fail(err)
		}
		f.Extents = append(f.Extents, imageExtent{x.Kind.String(), x.Logical, x.Offset, x.Length})
	}
	if a.json {
		return a.printJSON(f)
	}
	fmt.Fprintf(a.out, "path     %s\ntype     %s\ninode    %d\nmode     %s\nowner    %d:%d\nlinks    %d\nsize     %d\nmtime    %s\n",
		printable(f.Path), f.Type, f.Inode, f.Mode, f.UID, f.GID, f.Links, f.Size, f.Mtime.Format("2006-01-02 15:04:05.000000000"))
	if f.Device != "" {
		fmt.Fprintf(a.out, "device   %s\n", f.Device)
	}
	if f.Target != "" {
		fmt.Fprintf(a.out, "target   %s\n", printable(f.Target))
	}
	for _, x := range xattrs {
		fmt.Fprintf(a.out, "xattr    %s = %x\n", printable(x.Name), x.Value)
	}
	for _, x := range f.Extents {
		switch x.Kind {
		case "metadata":
			fmt.Fprintf(a.out, "extent   %-9s %12d bytes at %d\n", x.Kind, x.Bytes, x.Offset)
		case "hole":
			fmt.Fprintf(a.out, "extent   %-9s %12d bytes, of the file from %d\n", x.Kind, x.Bytes, x.Logical)
		default:
			fmt.Fprintf(a.out, "extent   %-9s %12d bytes at %d, of the file from %d\n", x.Kind, x.Bytes, x.Offset, x.Logical)
		}
	}
	return nil
}

func (a *app) imageCat(o *imageOptions) *cobra.Command {
	return &cobra.Command{
		Use:     "cat IMAGE[:partition] PATH",
		Short:   "Write a file's contents to standard output",
		Example: "  redoubt image cat disk.img:1 /etc/passwd\n  redoubt image cat disk.img:1 /boot/vmlinuz > vmlinuz",
		Args:    imageArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withImage(c.Context(), args, o, true, func(i *openImage, e *volume.Entry) error {
				if !isFile(e) {
					return i.fail(fmt.Errorf("%s: a %s: only files have contents", args[1], imageTypes[e.Mode&unix.S_IFMT]))
				}
				r, err := e.Open()
				if err != nil {
					return i.fail(err)
				}
				tick := a.ticker()
				w := &watched{ctx: i.ctx, w: a.out, count: func(n int64) { tick.show("%s: %d of %d MiB", args[1], n>>20, e.Size>>20) }}
				if f, ok := a.out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
					w.count = func(int64) {} // the file itself is what is seen
				}
				_, err = r.WriteTo(w)
				a.progressEnd()
				if err != nil {
					return i.fail(err)
				}
				return nil
			})
		},
	}
}

func (a *app) imageHash(o *imageOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "hash IMAGE[:partition] [PATH]",
		Short: "Print the SHA-256 of a file, or of every file in a directory",
		Long: `Prints the SHA-256 of a file's contents or, for a directory, a line per regular file in it, sorted by path, in the form
of sha256sum: two spaces, then the path.`,
		Example: "  redoubt image hash disk.img:1 /usr/bin/sudo\n  redoubt image hash disk.img:1 /usr/bin",
		Args:    imageArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withImage(c.Context(), args, o, true, func(i *openImage, e *volume.Entry) error { return a.hashImage(i, e) })
		},
	}
}

func (a *app) hashImage(i *openImage, e *volume.Entry) error {
	all, bad := []imageFile{}, 0
	tick := a.ticker()
	total := int64(0)
	count := func(n int64) { tick.show("%s: %d files, %d MiB", i.name, len(all), (total+n)>>20) }
	take := func(w *volume.Entry, err error) {
		if err == nil && isFile(w) {
			var f imageFile
			if f, err = hashFile(i.ctx, w, count); err == nil {
				all = append(all, f)
				total += w.Size
			}
		}
		if err != nil {
			bad++
			a.progressEnd()
			fmt.Fprintf(a.err, "redoubt: %s\n", oneLine(i.fail(fmt.Errorf("%s: %w", printable(w.Path), err)).Error()))
		}
	}
	switch {
	case isDir(e):
		for w, err := range i.Walk() {
			if i.ctx.Err() != nil {
				return i.ctx.Err()
			}
			if below(w.Path, e.Path) {
				take(w, err)
			}
		}
	case isFile(e):
		take(e, nil)
	default:
		return i.fail(fmt.Errorf("%s: a %s: only files have contents", e.Path, imageTypes[e.Mode&unix.S_IFMT]))
	}
	if err := a.printImageFiles(all, func(f imageFile) { fmt.Fprintf(a.out, "%s  %s\n", f.SHA256, printable(f.Path)) }); err != nil {
		return err
	}
	if bad > 0 {
		return exitError(1)
	}
	return nil
}

func hashFile(ctx context.Context, e *volume.Entry, count func(int64)) (imageFile, error) {
	f := imageFileOf(e)
	r, err := e.Open()
	if err != nil {
		return f, err
	}
	h := sha256.New()
	if _, err := r.WriteTo(&watched{ctx: ctx, w: h, count: count}); err != nil {
		return f, err
	}
	f.SHA256 = hex.EncodeToString(h.Sum(nil))
	return f, nil
}

func (a *app) imageCheck(o *imageOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "check IMAGE[:partition]",
		Short: "Check a file system's structure",
		Long: `Checks the structure that leads to files: checksums, that blocks are inside the file system and have one owner, that
directories and numbers of links make sense. It is no fsck: free counts, backups, hash trees' order and what is lost
are not looked at, and nothing is mended. The exit status is 1 where something was found.`,
		Example: "  redoubt image check disk.img:1\n  redoubt image check --json disk.img",
		Args: func(c *cobra.Command, args []string) error {
			return names(1, "IMAGE[:partition]")(c, args)
		},
		RunE: func(c *cobra.Command, args []string) error {
			return a.withImage(c.Context(), args, o, false, func(i *openImage, _ *volume.Entry) error { return a.checkImage(i) })
		},
	}
}

func (a *app) checkImage(i *openImage) error {
	found := []string{}
	a.progress("checking %s", i.name)
	for err := range i.Check() {
		if i.ctx.Err() != nil {
			return i.ctx.Err()
		}
		found = append(found, oneLine(err.Error()))
	}
	a.progressEnd()
	if a.json {
		if err := a.printJSON(map[string]any{"image": i.name, "sound": len(found) == 0, "findings": found}); err != nil {
			return err
		}
	} else {
		for _, f := range found {
			fmt.Fprintf(a.out, "%s: %s\n", i.name, f)
		}
		if len(found) == 0 {
			fmt.Fprintf(a.out, "%s: nothing found\n", i.name)
		}
	}
	if len(found) > 0 {
		return exitError(1)
	}
	return nil
}

// printImageFiles ends the progress and prints files in the order of their paths, each by line where not all are JSON.
func (a *app) printImageFiles(all []imageFile, line func(imageFile)) error {
	a.progressEnd()
	slices.SortFunc(all, func(x, y imageFile) int { return strings.Compare(x.Path, y.Path) })
	if a.json {
		return a.printJSON(all)
	}
	for _, f := range all {
		line(f)
	}
	return nil
}
