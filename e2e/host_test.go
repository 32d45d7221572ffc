// Package e2e tests Redoubt as an operator meets it: the built programs, real kernels, real
// QEMU, real swtpm, through the command line.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab/debian"
)

var (
	programsDir string // where the built programs are
	scratch     string // what tests share, removed at the end
)

func TestMain(m *testing.M) {
	if os.Getenv(busySession) != "" {
		busy()
		return
	}
	os.Exit(func() int {
		dir, err := filepath.Abs("../bin")
		if err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			return 1
		}
		// In the lab the programs are those the host built; there is no time to build there.
		if os.Getenv("REDOUBT_IN_LAB") == "" {
			c := exec.Command("go", "build", "-o", dir+"/", "../cmd/...")
			c.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := c.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "e2e: build: %v\n%s", err, out)
				return 1
			}
		}
		programsDir = dir
		if scratch, err = os.MkdirTemp("", "redoubt-e2e-"); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			return 1
		}
		defer func() { _ = os.RemoveAll(scratch) }()
		if os.Getenv("REDOUBT_IN_LAB") != "" {
			// A copy: the host may build anew while the lab runs.
			programsDir = filepath.Join(scratch, "bin")
			if err := os.CopyFS(programsDir, os.DirFS(dir)); err != nil {
				fmt.Fprintln(os.Stderr, "e2e:", err)
				return 1
			}
		}
		defer scheduleApart()()
		return m.Run()
	}())
}

// autogroup is the host's setting that `redoubt up` turns off.
const autogroup = "/proc/sys/kernel/sched_autogroup_enabled"

// scheduleApart is what `redoubt up` does, for all that tests start, and what the function it returns undoes: tests run two
// Redoubts at a time, and the one that goes down would turn it on under the other.
func scheduleApart() (undo func()) {
	b, err := os.ReadFile(autogroup)
	if err != nil || strings.TrimSpace(string(b)) != "1" || os.WriteFile(autogroup, []byte("0\n"), 0) != nil {
		return func() {} // not there, off, or not ours to turn off, as `redoubt up` says
	}
	return func() { _ = os.WriteFile(autogroup, []byte("1\n"), 0) }
}

// host is one running Redoubt with directories of its own.
type host struct {
	t     testing.TB
	dir   string
	cache *debian.Root
}

// newHost starts Redoubt and ends it with the test.
func newHost(t testing.TB, upArgs ...string) *host {
	t.Helper()
	h := newDownHost(t)
	h.must(append([]string{"up"}, upArgs...)...)
	t.Cleanup(func() {
		if t.Failed() {
			h.dumpLogs()
		}
		h.must("down", "--grace", "0s")
	})
	return h
}

// newDownHost prepares a host without starting it. Tests with a host run beside others, one a processor: each host has
// directories, networks and processes of its own. Not so what shares its test's host, nor long runs.
func newDownHost(t testing.TB) *host {
	t.Helper()
	if t, ok := t.(*testing.T); ok && !strings.Contains(t.Name(), "/") && os.Getenv("REDOUBT_SOAK") == "" {
		t.Parallel()
	}
	cache, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	return &host{t: t, dir: t.TempDir(), cache: cache}
}

func (h *host) path(elem ...string) string { return filepath.Join(append([]string{h.dir}, elem...)...) }

// result is what a command line did.
type result struct {
	out, err string
	status   int
}

// run runs the command line.
func (h *host) run(args ...string) result {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	return h.runInput(ctx, "", args...)
}

func (h *host) runInput(ctx context.Context, input string, args ...string) result {
	h.t.Helper()
	return h.runAs(ctx, 0, input, args...)
}

// runAs runs the command line as a user.
func (h *host) runAs(ctx context.Context, uid uint32, input string, args ...string) result {
	h.t.Helper()
	c := exec.CommandContext(ctx, filepath.Join(programsDir, "redoubt"), args...)
	c.Env = append(os.Environ(), "REDOUBT_TOOLS="+h.cache.Tools(), "REDOUBT_RUN_DIR="+h.path("run"), "REDOUBT_STATE_DIR="+h.path("state"))
	if uid != 0 {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	c.Stdin = strings.NewReader(input)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		h.t.Fatalf("redoubt %s: %v", strings.Join(args, " "), err)
	}
	return result{out.String(), errs.String(), c.ProcessState.ExitCode()}
}

// must runs a command line that has to succeed.
func (h *host) must(args ...string) string {
	h.t.Helper()
	r := h.run(args...)
	if r.status != 0 {
		h.t.Fatalf("redoubt %s: exit status %d: %s%s", strings.Join(args, " "), r.status, r.out, r.err)
	}
	return r.out
}

// fails runs a command line that has to fail with one line that contains want.
func (h *host) fails(status int, want string, args ...string) {
	h.t.Helper()
	r := h.run(args...)
	if r.status != status || !strings.Contains(r.err, want) || strings.Count(r.err, "\n") != 1 {
		h.t.Errorf("redoubt %s: exit status %d: %q; want status %d and one line with %q", strings.Join(args, " "), r.status, r.err, status, want)
	}
}

// guest is `redoubt show --json`.
type guest struct {
	State    string `json:"state"`
	Reason   string `json:"reason"`
	Emulator string `json:"emulator"`
	EKSHA256 string `json:"ekSHA256"`
	Starts   int    `json:"starts"`
	Timeline []struct {
		Time time.Time `json:"time"`
		Kind string    `json:"kind"`
		Text string    `json:"text"`
	} `json:"timeline"`
}

func (h *host) show(name string) guest {
	h.t.Helper()
	var g guest
	if err := json.Unmarshal([]byte(h.must("show", name, "--json")), &g); err != nil {
		h.t.Fatal(err)
	}
	return g
}

// at is how long after the request something happened for the first time.
func (g guest) at(kind string) (time.Duration, bool) {
	for _, e := range g.Timeline {
		if e.Kind == kind {
			return e.Time.Sub(g.Timeline[0].Time), true
		}
	}
	return 0, false
}

func (h *host) console(name string) string {
	b, err := os.ReadFile(h.path("run", "log", "console-"+name+".log"))
	if err != nil {
		h.t.Fatal(err)
	}
	return strings.ReplaceAll(string(b), "\r", "")
}

// client is a command of the CLI that talks to the API alone.
func (h *host) client(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, filepath.Join(programsDir, "redoubt"), args...)
	c.Env = append(os.Environ(), "REDOUBT_RUN_DIR="+h.path("run"))
	return c
}

// stream runs the CLI for what it prints as it goes. end ends it.
func (h *host) stream(ctx context.Context, args ...string) (out io.Reader, end func()) {
	h.t.Helper()
	c := h.client(ctx, args...)
	out, err := c.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	return out, func() { _ = c.Process.Kill(); _ = c.Wait() }
}

// await follows the console until it holds want, or the guest is down.
func (h *host) await(name, want string, limit time.Duration) string {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	out, end := h.stream(ctx, "logs", name, "--follow")
	defer end()
	var seen strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := out.Read(buf)
		seen.Write(bytes.ReplaceAll(buf[:n], []byte("\r"), nil))
		if strings.Contains(seen.String(), want) {
			return seen.String()
		}
		if err != nil {
			g := h.show(name)
			h.t.Fatalf("%s: no %q on the console within %v; guest is %s: %s\n%s", name, want, limit, g.State, g.Reason, lastLines(seen.String(), 40))
		}
	}
}

// awaitDown follows the guest's events until it is down.
func (h *host) awaitDown(name string, limit time.Duration) guest {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	// A log that is followed ends with the guest.
	r := h.runInput(ctx, "", "logs", name, "--follow")
	g := h.show(name)
	if g.State != "stopped" && g.State != "failed" {
		h.t.Fatalf("%s is %s after %v\n%s", name, g.State, limit, lastLines(r.out, 40))
	}
	return g
}

// lastLines is the end of a log, its long lines cut.
func lastLines(s string, n int) string {
	l := strings.Split(s, "\n")
	for i := range l {
		l[i] = l[i][:min(len(l[i]), 1000)]
	}
	return strings.Join(l[max(0, len(l)-n):], "\n")
}

func (h *host) dumpLogs() {
	logs, _ := filepath.Glob(h.path("run", "log", "*.log"))
	for _, f := range logs {
		b, err := os.ReadFile(f)
		if err != nil || len(b) == 0 {
			continue
		}
		h.t.Logf("%s:\n%s", filepath.Base(f), lastLines(string(b), 30))
	}
}
