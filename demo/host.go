package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
)

// host is one Redoubt with directories of its own.
type host struct {
	bin     string // where all programs are
	program string // the command line
	probe   string // the program that attacks
	guest   string // the program that loads a guest's disk
	dir     string
	cache   *debian.Root
}

func (h *host) path(elem ...string) string { return filepath.Join(append([]string{h.dir}, elem...)...) }

// command prepares a command line. It runs in the demo's directory, so that what is shown of
// it is short, and in a process group of its own: Ctrl-C is for the demo, which then ends it.
func (h *host) command(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, h.program, args...)
	c.Dir = h.dir
	c.Env = append(os.Environ(), "REDOUBT_TOOLS="+h.cache.Tools(),
		"REDOUBT_RUN_DIR="+h.path("run"), "REDOUBT_STATE_DIR="+h.path("state"))
	c.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	return c
}

// A statusError is a command line that ended with a status other than 0.
type statusError struct {
	status int
	text   string // what it printed on standard error
}

func (e *statusError) Error() string { return fmt.Sprintf("exit status %d: %s", e.status, e.text) }

// redoubt runs a command line and returns its standard output, of a failed one too.
func (h *host) redoubt(ctx context.Context, args ...string) (string, error) {
	c := h.command(ctx, args...)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return out.String(), nil
	case ctx.Err() != nil:
		return out.String(), context.Cause(ctx)
	case errors.As(err, &exit):
		return out.String(), &statusError{exit.ExitCode(), strings.TrimSpace(errs.String())}
	}
	return out.String(), err
}

// guest is what `redoubt show --json` tells.
type guest struct {
	State    string `json:"state"`
	Reason   string `json:"reason"`
	Emulator string `json:"emulator"`
	Timeline []struct {
		Time time.Time `json:"time"`
		Kind string    `json:"kind"`
	} `json:"timeline"`
}

func (h *host) show(ctx context.Context, name string) (guest, error) {
	var g guest
	out, err := h.redoubt(ctx, "show", name, "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &g)
	}
	return g, err
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

// console follows a guest's console until it holds want, and returns all of it so far.
func (h *host) console(ctx context.Context, name, want string) (string, error) {
	following, cancel := context.WithCancel(ctx)
	defer cancel()
	c := h.command(following, "logs", name, "--follow")
	out, err := c.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := c.Start(); err != nil {
		return "", err
	}
	var seen strings.Builder
	buf := make([]byte, 4096)
	for err == nil && !strings.Contains(seen.String(), want) {
		var n int
		n, err = out.Read(buf)
		seen.Write(bytes.ReplaceAll(buf[:n], []byte("\r"), nil))
	}
	cancel()
	_ = c.Wait() // ended by us, or the guest is down
	switch {
	case strings.Contains(seen.String(), want):
		return seen.String(), nil
	case ctx.Err() != nil:
		return seen.String(), context.Cause(ctx)
	}
	g, err := h.show(ctx, name)
	if err != nil {
		return seen.String(), err
	}
	return seen.String(), fmt.Errorf("guest %s is %s before it said %s: %s", name, g.State, want, g.Reason)
}

// A process is one that lives or lived: a number alone may be used again.
type process struct {
	pid   int
	start string // its start time, in the kernel's ticks
	name  string
}

// processes lists the Builder and all its descendants.
func (h *host) processes() ([]process, error) {
	b, err := os.ReadFile(h.path("run", "lock"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if len(b) == 0 {
		return nil, nil // nobody holds the lock
	}
	builder, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return nil, err
	}
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	found := map[int]process{}
	parent := map[int]int{}
	for _, dir := range all {
		pid, _ := strconv.Atoi(filepath.Base(dir)) // the pattern says so
		if p, up, ok := stat(pid); ok {
			found[pid], parent[pid] = p, up
		}
	}
	var out []process
	for pid, p := range found {
		for up := pid; up > 1; up = parent[up] {
			if up == builder {
				out = append(out, p)
				break
			}
		}
	}
	return out, nil
}

// stat reads /proc/PID/stat (proc_pid_stat(5)); a process that is gone or a zombie is not ok.
func stat(pid int) (p process, parent int, ok bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, 0, false
	}
	_, rest, _ := strings.Cut(string(b), " (")
	name, rest, ok := cutLast(rest, ") ") // a name may hold anything
	f := strings.Fields(rest)
	if !ok || len(f) < 20 || f[0] == "Z" || f[0] == "X" {
		return process{}, 0, false
	}
	parent, err = strconv.Atoi(f[1])
	return process{pid, f[19], name}, parent, err == nil
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// lives reports whether it is still there.
func (p process) lives() bool {
	now, _, ok := stat(p.pid)
	return ok && now.start == p.start
}
