package lab

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

// A TestRun says which tests to run.
type TestRun struct {
	Packages []string  // patterns of `go list`
	Run      string    // -run: replaces the choice of the tests that call NeedsKVM
	Bench    string    // -bench: benchmarks to run instead of tests
	Verbose  bool      // -v
	CPUs     int       // L1's, as in Job
	Output   io.Writer // in the form of go test
}

// Test runs the tests of the packages that call NeedsKVM: by `go test` where KVM is usable,
// else compiled here and run in L1: in two machines at once where this host has the processors, as one
// L1 keeps one of them busy. Benchmarks, and tests that were named, have a machine to themselves. The status is 0 where all passed.
func Test(ctx context.Context, r TestRun) (status int, err error) {
	packages, err := kvmTests(ctx, r)
	if err != nil {
		return 0, err
	}
	if len(packages) == 0 {
		return 0, fmt.Errorf("lab: no test in %s calls lab.NeedsKVM", strings.Join(r.Packages, " "))
	}
	dir, err := os.MkdirTemp("", "redoubt-labtest-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for i := range packages {
		p := &packages[i]
		p.binary = filepath.Join(dir, fmt.Sprintf("%d.test", i))
		cmd := exec.CommandContext(ctx, "go", "test", "-c", "-o", p.binary, p.path)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("go test -c %s: %w\n%s", p.path, err, out)
		}
	}
	if KVM() {
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", script(ctx, r, packages))
		cmd.Stdout, cmd.Stderr = r.Output, r.Output
		err := cmd.Run()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			return exit.ExitCode(), nil
		}
		return 0, err
	}
	machines := 2
	if r.Bench != "" || r.Run != "" || r.CPUs > 1 || runtime.NumCPU() < 2 {
		machines = 1
	}
	var (
		running sync.WaitGroup
		mu      sync.Mutex // over status and err, and the output
	)
	for _, share := range shares(packages, machines) {
		job := Job{Args: []string{"/bin/sh", "-c", script(ctx, r, share)}, CPUs: r.CPUs}
		out := &lines{mu: &mu, to: r.Output}
		job.Output = out
		running.Go(func() {
			s, jerr := Run(ctx, job)
			out.flush()
			mu.Lock()
			defer mu.Unlock()
			status, err = max(status, s), errors.Join(err, jerr)
		})
	}
	running.Wait()
	return status, err
}

// script runs the tests of packages one after another.
func script(ctx context.Context, r TestRun, packages []testPackage) string {
	script := "failed=0\n"
	for _, p := range packages {
		args := []string{p.binary, "-test.timeout=" + left(ctx).String()}
		switch {
		case r.Bench != "":
			args = append(args, "-test.run=^$", "-test.bench="+r.Bench)
		case r.Run != "":
			args = append(args, "-test.run="+r.Run)
		default:
			args = append(args, "-test.run=^("+strings.Join(p.tests, "|")+")$")
		}
		if r.Verbose {
			args = append(args, "-test.v")
		}
		for i := range args {
			args[i] = quote(args[i])
		}
		script += fmt.Sprintf("cd %s && start=$(cut -d' ' -f1 /proc/uptime)\n", quote(p.dir))
		script += fmt.Sprintf("if %s; then w=ok; else w=FAIL; failed=1; fi\n", strings.Join(args, " "))
		script += fmt.Sprintf("printf '%%s\\t%%s\\t%%ss\\n' $w %s $(echo $start $(cut -d' ' -f1 /proc/uptime) | awk '{print $2-$1}')\n", quote(p.path))
	}
	return script + "exit $failed\n"
}

// starting is how much longer a test of package e2e takes than one of another: it starts all services, and guests.
const starting = 3

// shares deals tests out to n machines at most, so that each has about as much to do. A package whose tests are dealt out to
// several is in several shares.
func shares(packages []testPackage, n int) [][]testPackage {
	cost := func(p testPackage) int {
		if path.Base(p.path) == "e2e" {
			return starting
		}
		return 1
	}
	left := 0
	for _, p := range packages {
		left += cost(p) * len(p.tests)
	}
	// The dear tests first: what is left is then shared out by smaller parts.
	sorted := slices.SortedStableFunc(slices.Values(packages), func(a, b testPackage) int { return cmp.Compare(cost(b), cost(a)) })
	var all [][]testPackage
	for ; n > 0 && left > 0; n-- {
		var share []testPackage
		room := (left + n - 1) / n
		for len(sorted) > 0 && room > 0 {
			p := sorted[0]
			k := min(len(p.tests), (room+cost(p)-1)/cost(p))
			part := p
			part.tests, p.tests = p.tests[:k], p.tests[k:]
			share = append(share, part)
			room, left = room-k*cost(p), left-k*cost(p)
			if sorted[0] = p; len(p.tests) == 0 {
				sorted = sorted[1:]
			}
		}
		all = append(all, share)
	}
	return all
}

// lines passes whole lines on, so that two machines' do not mix.
type lines struct {
	mu  *sync.Mutex // over to
	to  io.Writer
	buf []byte
}

func (l *lines) Write(p []byte) (int, error) {
	l.buf = append(l.buf, p...)
	n := bytes.LastIndexByte(l.buf, '\n') + 1
	if n == 0 {
		return len(p), nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := l.to.Write(l.buf[:n])
	l.buf = l.buf[n:]
	return len(p), err
}

func (l *lines) flush() {
	if len(l.buf) > 0 {
		_, _ = l.Write([]byte{'\n'})
	}
}

// left is how long a package may take: what ctx leaves.
func left(ctx context.Context) time.Duration {
	end, ok := ctx.Deadline()
	if !ok {
		return 20 * time.Minute
	}
	return max(time.Until(end).Truncate(time.Second), time.Second)
}

type testPackage struct {
	path, dir string
	tests     []string
	binary    string
}

// kvmTests lists the packages that hold such tests, with the tests' names.
func kvmTests(ctx context.Context, r TestRun) ([]testPackage, error) {
	args := append([]string{"list", "-json=ImportPath,Dir,TestGoFiles,XTestGoFiles"}, r.Packages...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Stderr = r.Output
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var found []testPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var p struct {
			ImportPath, Dir           string
			TestGoFiles, XTestGoFiles []string
		}
		if err := dec.Decode(&p); err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		tp := testPackage{path: p.ImportPath, dir: p.Dir}
		for _, file := range append(p.TestGoFiles, p.XTestGoFiles...) {
			names, err := callers(filepath.Join(p.Dir, file))
			if err != nil {
				return nil, err
			}
			for _, n := range names { // benchmarks are asked for, and all of a package's then
				if r.Bench != "" || strings.HasPrefix(n, "Test") {
					tp.tests = append(tp.tests, n)
				}
			}
		}
		if len(tp.tests) > 0 {
			found = append(found, tp)
		}
	}
	return found, nil
}

// callers names the file's test functions and benchmarks that call lab.NeedsKVM themselves.
func callers(file string) ([]string, error) {
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok || fn.Recv != nil || (!strings.HasPrefix(fn.Name.Name, "Test") && !strings.HasPrefix(fn.Name.Name, "Benchmark")) {
			continue
		}
		calls := false
		ast.Inspect(fn, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == "NeedsKVM" {
				calls = true
			}
			return !calls
		})
		if calls {
			names = append(names, fn.Name.Name)
		}
	}
	return names, nil
}
