package scan

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/baseline"
	files "redoubt.dev/redoubt/validation/volume"
)

// walk reads all of a volume whose reader says nothing of inodes: each name is given one.
func (u *update) walk(v files.Volume) error {
	r := u.reader()
	defer u.run.readers.Put(r)
	dirs, last := map[string]uint32{}, uint32(rootInode)
	for e, err := range v.Walk() {
		if ctxErr := u.run.ctx.Err(); ctxErr != nil {
			return ctxErr
		}
		name := path.Clean(e.Path)
		if err != nil {
			u.damaged = true
			u.problem(name, err)
			continue
		}
		parent, ok := dirs[path.Dir(name)]
		if name != "/" && !ok {
			continue // nobody looks into its directory
		}
		it := &item{dir: parent, inode: rootInode, letters: path.Base(name), path: name, base: -1}
		if name == "/" {
			it.dir, it.letters = 0, ""
		} else {
			last++
			it.inode = last
		}
		if err := u.need(recordBytes + int64(len(name))); err != nil {
			u.damaged = true
			u.problem("/", err)
			break
		}
		u.lists[it.dir] = append(u.lists[it.dir], it)
		if err := u.file(r, it, e); err != nil {
			return err
		}
		if it.want&baseline.Descend != 0 {
			dirs[name], u.places[it.inode] = it.inode, it
		}
	}
	for _, list := range u.lists {
		slices.SortStableFunc(list, func(a, b *item) int { return strings.Compare(a.letters, b.letters) })
		for i := 1; i < len(list); i++ {
			if list[i].letters == list[i-1].letters {
				list[i].bad, u.damaged = true, true
				u.problem(list[i].path, fmt.Errorf("a directory has the name twice"))
				delete(u.places, list[i].inode)
			}
		}
	}
	return u.run.ctx.Err()
}

// file reads what is wanted of one.
func (u *update) file(r *reader, it *item, e *files.Entry) error {
	it.want = u.ask(it.path, e.Mode)
	rec := &record{number: it.inode, fact: fact{mode: e.Mode, uid: e.UID, gid: e.GID, links: e.Links, size: e.Size}}
	u.records[it.inode] = rec
	u.run.inodes.Add(1)
	if it.want&baseline.Xattrs != 0 {
		rec.state |= hasXattrs // there are none
	}
	if it.want&baseline.Content != 0 && e.Mode&unix.S_IFMT == unix.S_IFREG {
		file, err := e.Open()
		if err == nil {
			rec.digest, err = r.hash(file, e.Size)
		}
		if err == nil {
			rec.state |= hasDigest
		} else {
			u.damaged = true
			rec.fail(badDigest, err)
			u.problem(it.path, err)
		}
	}
	return u.run.ctx.Err()
}
