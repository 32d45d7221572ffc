package lab

import (
	"bytes"
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
	"path/filepath"
	"strings"
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
// else compiled here and run in one boot of L1. The status is 0 where all passed.
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
	script := "failed=0\n"
	for i, p := range packages {
		bin := filepath.Join(dir, fmt.Sprintf("%d.test", i))
		cmd := exec.CommandContext(ctx, "go", "test", "-c", "-o", bin, p.path)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("go test -c %s: %w\n%s", p.path, err, out)
		}
		args := []string{bin, "-test.timeout=" + left(ctx).String()}
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
	script += "exit $failed\n"
	job := Job{Args: []string{"/bin/sh", "-c", script}, CPUs: r.CPUs, Output: r.Output}
	if KVM() {
		cmd := exec.CommandContext(ctx, job.Args[0], job.Args[1:]...)
		cmd.Stdout, cmd.Stderr = r.Output, r.Output
		err := cmd.Run()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			return exit.ExitCode(), nil
		}
		return 0, err
	}
	return Run(ctx, job)
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
			tp.tests = append(tp.tests, names...)
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
