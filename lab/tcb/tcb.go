// Package tcb counts the code that runs with all of Redoubt's privileges: the Builder, the Supervisor that
// starts it, the launcher of sandboxes, and what they are built of.
package tcb

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"go/scanner"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Program is the one that uses the privileges, Supervisor the one that hands them on, Launcher the one
// that gives them up.
const (
	Program    = "redoubt.dev/redoubt/cmd/redoubt-builder"
	Supervisor = "redoubt.dev/redoubt/cmd/redoubt-supervisor"
	Launcher   = "redoubt.dev/redoubt/cmd/redoubt-launcher"
)

// own are the Builder itself: what knows of guests, tenants and services at once. The mechanisms that it
// uses stand by themselves, each with its own contract; those that no other program has are marked.
var own = []string{Program, "redoubt.dev/redoubt/services/builder"}

// Most is how many lines the Builder itself may have.
const Most = 3000

// A Package is a part of the program.
type Package struct {
	Path, Module string
	Lines        int  // of code: neither blank nor comment only
	Own          bool // the Builder itself
	Alone        bool // no other of Redoubt's programs has it
}

// Count counts both programs' packages, the standard library's left out, as they are built for this
// machine; dir is somewhere in Redoubt's module. What the linker leaves out of a package is counted.
func Count(ctx context.Context, dir string) ([]Package, error) {
	others, err := elsewhere(ctx, dir)
	if err != nil {
		return nil, err
	}
	out, err := list(ctx, dir, "-deps", "-json=ImportPath,Dir,Standard,Module,GoFiles,SFiles", Program, Supervisor, Launcher)
	if err != nil {
		return nil, err
	}
	var all []Package
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var l struct {
			ImportPath, Dir string
			Standard        bool
			Module          struct{ Path string }
			GoFiles, SFiles []string
		}
		if err := dec.Decode(&l); err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		if l.Standard {
			continue
		}
		p := Package{Path: l.ImportPath, Module: l.Module.Path, Own: slices.Contains(own, l.ImportPath), Alone: !others[l.ImportPath]}
		for _, name := range append(l.GoFiles, l.SFiles...) {
			text, err := os.ReadFile(filepath.Join(l.Dir, name))
			if err != nil {
				return nil, err
			}
			p.Lines += lines(text)
		}
		all = append(all, p)
	}
	return all, nil
}

// elsewhere are the packages that another of Redoubt's programs has.
func elsewhere(ctx context.Context, dir string) (map[string]bool, error) {
	out, err := list(ctx, dir, "redoubt.dev/redoubt/cmd/...")
	if err != nil {
		return nil, err
	}
	programs := slices.DeleteFunc(strings.Fields(string(out)), func(p string) bool { return p == Program || p == Supervisor || p == Launcher })
	if out, err = list(ctx, dir, append([]string{"-deps"}, programs...)...); err != nil {
		return nil, err
	}
	all := map[string]bool{}
	for _, p := range strings.Fields(string(out)) {
		all[p] = true
	}
	return all, nil
}

func list(ctx context.Context, dir string, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, "go", append([]string{"list"}, args...)...)
	c.Dir, c.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w: %s", err, errs.String())
	}
	return out, nil
}

// lines counts those that hold a token. Assembler has Go's comments, and its tokens are near enough
// to Go's.
func lines(text []byte) int {
	files := token.NewFileSet()
	file := files.AddFile("", files.Base(), len(text))
	var s scanner.Scanner
	s.Init(file, text, func(token.Position, string) {}, 0)
	n, last := 0, 0
	for {
		pos, tok, lit := s.Scan()
		if tok == token.EOF {
			return n
		}
		if tok == token.SEMICOLON && lit == "\n" {
			continue // the scanner's own
		}
		first := file.Line(pos)
		if first == last { // more of a line that is counted
			first++
		}
		end := file.Line(pos) + strings.Count(lit, "\n")
		if end >= first {
			n += end - first + 1
			last = end
		}
	}
}

// Own sums up the Builder's own packages.
func Own(all []Package) int {
	n := 0
	for _, p := range all {
		if p.Own {
			n += p.Lines
		}
	}
	return n
}

// Print writes sums by module, largest last, and within each by package.
func Print(w io.Writer, all []Package) {
	const module, self = "redoubt.dev/redoubt", "redoubt.dev/redoubt (the Builder's own)"
	by := map[string][]Package{}
	sum := map[string]int{}
	total := 0
	for _, p := range all {
		m := p.Module
		if p.Own {
			m = self
		}
		by[m] = append(by[m], p)
		sum[m] += p.Lines
		total += p.Lines
	}
	names := make([]string, 0, len(by))
	for m := range by {
		names = append(names, m)
	}
	slices.SortFunc(names, func(a, b string) int { return sum[a] - sum[b] })
	for _, m := range names {
		fmt.Fprintf(w, "%7d  %s\n", sum[m], m)
		slices.SortFunc(by[m], func(a, b Package) int { return b.Lines - a.Lines })
		for _, p := range by[m] {
			name := strings.TrimPrefix(strings.TrimPrefix(p.Path, module+"/"), p.Module+"/")
			mark := ""
			if p.Alone && p.Module == module {
				mark = "  (only these programs have it)"
			}
			fmt.Fprintf(w, "         %7d  %s%s\n", p.Lines, name, mark)
		}
	}
	fmt.Fprintf(w, "%7d  lines of code in all, without the standard library\n", total)
}
