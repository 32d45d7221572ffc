package sandbox

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// ProgramRoot is the root that a dynamic program of the host or of an unpacked package tree
// needs, and no more: itself (programs find their modules from /proc/self/exe), its loader, the
// libraries it and they are linked with, and the files and
// directories in more, all at their own paths. There is no other program in it. search are the
// directories of libraries, in the order of LD_LIBRARY_PATH; none means Debian's.
func ProgramRoot(program string, search []string, more ...string) ([]Bind, error) {
	if len(search) == 0 {
		search = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64"}
	}
	c := &closure{search: search, found: map[string]bool{}}
	if err := c.add(program); err != nil {
		return nil, fmt.Errorf("root of %s: %w", program, err)
	}
	c.binds = append(c.binds, Bind{Source: program})
	for _, path := range more {
		// What is loaded at run time brings its own libraries.
		if strings.Contains(filepath.Base(path), ".so") {
			if err := c.add(path); err != nil {
				return nil, fmt.Errorf("root of %s: %w", program, err)
			}
		}
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return nil, fmt.Errorf("root of %s: %w", program, err)
		}
		c.binds = append(c.binds, Bind{Source: real, Target: path})
	}
	return c.binds, nil
}

// A closure collects the libraries of programs.
type closure struct {
	search []string
	found  map[string]bool // names in DT_NEEDED
	binds  []Bind
}

func (c *closure) add(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP || p.Filesz > 4096 {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		loader := strings.TrimRight(string(b), "\x00")
		if err := c.addLibrary(filepath.Base(loader), nil, loader); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	// The loader's own rule: DT_RUNPATH comes after LD_LIBRARY_PATH, ld.so(8).
	runPath, err := f.DynString(elf.DT_RUNPATH)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	names, err := f.DynString(elf.DT_NEEDED)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, n := range names {
		if err := c.addLibrary(n, runPath, ""); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// addLibrary adds a library by its name and all that it needs; target is where it must lie, ""
// where it was found.
func (c *closure) addLibrary(name string, runPath []string, target string) error {
	if c.found[name] {
		return nil
	}
	dirs := c.search
	for _, r := range runPath {
		dirs = append(dirs[:len(dirs):len(dirs)], strings.Split(r, ":")...)
	}
	if target != "" {
		dirs = append(dirs[:len(dirs):len(dirs)], filepath.Dir(target))
	}
	for _, d := range dirs {
		path := filepath.Join(d, name)
		real, err := filepath.EvalSymlinks(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if st, err := os.Stat(real); err != nil || !st.Mode().IsRegular() {
			continue
		}
		c.found[name] = true
		if target == "" {
			target = path
		}
		c.binds = append(c.binds, Bind{Source: real, Target: target})
		return c.add(real)
	}
	return fmt.Errorf("library %s is in none of %s", name, strings.Join(dirs, ", "))
}
