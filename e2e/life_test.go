package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/pidfd"
)

func (h *host) writeSpec(path, name, emulator, what, more string) {
	h.t.Helper()
	kernel, err := h.cache.Vmlinuz(debian.Usual)
	if err != nil {
		h.t.Fatal(err)
	}
	doc := fmt.Sprintf("name: %s\nemulator: %s\nmemory: 256MiB\nboot:\n  kernel: %s\n  initrd: %s\n  cmdline: %s e2e=%s\n%s",
		name, emulator, kernel, initrd(h.t, h.cache, debian.Usual, false), debian.Cmdline, what, more)
	if err := os.WriteFile(path, []byte(doc), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

func TestLifeQEMU(t *testing.T) { life(t, "qemu") }

func TestLifeNative(t *testing.T) {
	lab.NeedsKVM(t)
	life(t, "native")
}

// life: every way a guest can end is told for what it was.
func life(t *testing.T, emulator string) {
	h := newHost(t)
	at := func(t *testing.T) *host { return &host{t, h.dir, h.cache} }
	t.Run("reboot", func(t *testing.T) {
		h := at(t)
		disk := h.path("reboot.img")
		h.must("disk", "create", disk, "8MiB")
		h.start(start{name: "reboot", emulator: emulator, what: "reboot", args: []string{"--disk", disk}})
		g := h.awaitDown("reboot", 2*bootTime)
		if c := h.console("reboot"); !strings.Contains(c, "FIRST") || !strings.Contains(c, "SECOND") {
			t.Fatalf("no second boot; guest is %s: %s\n%s", g.State, g.Reason, lastLines(c, 30))
		}
		if g.State != "stopped" || g.Starts != 2 {
			t.Fatalf("guest is %s after %d starts: %s", g.State, g.Starts, g.Reason)
		}
		readFacts(h.console("reboot")).keptTrust(t)
	})
	t.Run("devices", func(t *testing.T) {
		h := at(t)
		disk, other := h.path("rw.img"), h.path("ro.img")
		for _, d := range []string{disk, other} {
			h.must("disk", "create", d, "8MiB")
		}
		write(t, disk, "first")
		h.start(start{name: "devices", emulator: emulator, what: "devices", args: []string{"--cpus", "2", "--disk", disk, "--disk", other + ":ro"}})
		// The guest says hello and waits for its answer.
		ctx, cancel := context.WithTimeout(t.Context(), bootTime)
		defer cancel()
		r := h.runInput(ctx, "hello, guest\n", "console", "devices", "--channel")
		g := h.awaitDown("devices", bootTime)
		c := h.console("devices")
		for _, want := range []string{"CPUS 2", "RNG virtio_rng.0 64", "DISK first", "READONLY 1", "CHANNEL hello, guest", "E2E-DONE"} {
			if !strings.Contains(c, want) {
				t.Errorf("no %q on the console; guest is %s: %s\n%s", want, g.State, g.Reason, lastLines(c, 20))
			}
		}
		if !strings.Contains(r.out, "hello, host") {
			t.Errorf("the channel brought %q", r.out)
		}
		b, err := os.ReadFile(disk)
		if err != nil || string(b[512:519]) != "written" {
			t.Errorf("the disk holds %q, %v", b[512:519], err)
		}
	})
	t.Run("panic", func(t *testing.T) {
		h := at(t)
		// panic=-1: the kernel resets at once, and its successor panics too; stop it then.
		h.start(start{name: "panic", emulator: emulator, what: "panic", cmdline: "panic=-1"})
		h.await("panic", "Kernel panic", bootTime)
		h.must("stop", "panic", "--grace", "0s")
		if g := h.show("panic"); g.State != "stopped" {
			t.Fatalf("guest is %s: %s", g.State, g.Reason)
		}
	})
	t.Run("nothing-left", func(t *testing.T) {
		// Whatever became of those guests, in the middle of a reboot too, nothing of them runs.
		for _, p := range []string{"redoubt-emulator", "redoubt-blkback", "qemu-system-x86_64", "swtpm"} {
			if pids := at(t).processes(p); len(pids) != 0 {
				t.Errorf("%s still runs: %v", p, pids)
			}
		}
	})
	t.Run("power-button", func(t *testing.T) {
		h := at(t)
		h.start(start{name: "button", emulator: emulator, what: "wait"})
		h.await("button", "READY", bootTime)
		h.must("stop", "button", "--grace", "60s")
		g := h.show("button")
		if g.State != "stopped" || !strings.Contains(h.console("button"), "PRESSED") {
			t.Fatalf("guest is %s: %s\n%s", g.State, g.Reason, lastLines(h.console("button"), 5))
		}
		h.must("stop", "button") // again: no error
		h.must("rm", "button")
		h.fails(1, "no such guest", "show", "button")
	})
	t.Run("insist-and-crashes", func(t *testing.T) {
		h := at(t)
		h.start(start{name: "deaf", emulator: emulator, what: "deaf"})
		h.await("deaf", "READY", bootTime)
		h.fails(1, "running", "rm", "deaf")
		h.must("run", "deaf") // runs already: no error
		h.must("stop", "deaf", "--grace", "1s")
		if g := h.show("deaf"); g.State != "stopped" {
			t.Fatalf("guest is %s: %s", g.State, g.Reason)
		}
		// The emulator ended from outside, first with a word, then without.
		h.must("run", "deaf")
		h.await("deaf", "READY", bootTime)
		if err := unix.Kill(h.only("emulator", "redoubt-emulator"), unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if g := h.awaitDown("deaf", 20*time.Second); g.State != "failed" || !strings.Contains(g.Reason, "from outside") {
			t.Fatalf("guest is %s: %s", g.State, g.Reason)
		}
		h.must("run", "deaf")
		h.await("deaf", "READY", bootTime)
		h.kill("emulator", "redoubt-emulator")
		if g := h.awaitDown("deaf", 20*time.Second); g.State != "failed" || !strings.Contains(g.Reason, "killed") {
			t.Fatalf("guest is %s: %s", g.State, g.Reason)
		}
		// The vTPM's engine killed: the guest is failed closed.
		h.must("run", "deaf")
		h.await("deaf", "READY", bootTime)
		h.kill("engine", "swtpm")
		if g := h.awaitDown("deaf", 20*time.Second); g.State != "failed" || !strings.Contains(g.Reason, "vTPM") {
			t.Fatalf("guest is %s: %s", g.State, g.Reason)
		}
		// And it comes up again with the same identity.
		ek := h.show("deaf").EKSHA256
		h.must("run", "deaf", "--wait")
		h.await("deaf", "READY", bootTime)
		if again := h.show("deaf").EKSHA256; again != ek || ek == "" {
			t.Fatalf("endorsement key %q became %q", ek, again)
		}
		readFacts(h.console("deaf")).keptTrust(t)
		h.must("stop", "deaf", "--grace", "0s")
	})
}

func write(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
}

// kill ends the one process of this host's that runs a program, at once.
func (h *host) kill(what, program string) {
	h.t.Helper()
	if err := unix.Kill(h.only(what, program), unix.SIGKILL); err != nil {
		h.t.Fatal(err)
	}
}

// only is the one process of this host's that runs a program.
func (h *host) only(what, program string) int {
	h.t.Helper()
	pids := h.processes(program)
	if len(pids) != 1 {
		h.t.Fatalf("%s: processes %v", what, pids)
	}
	return pids[0]
}

// openPIDFD names a process until the test's end.
func openPIDFD(t testing.TB, pid int) *os.File {
	t.Helper()
	f, err := pidfd.Open(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// holdStill stops the one process of this host's that runs a program, until goOn or the test's end.
func (h *host) holdStill(program string) (goOn func()) {
	h.t.Helper()
	f := openPIDFD(h.t, h.only(program, program))
	if err := pidfd.Signal(f, unix.SIGSTOP); err != nil {
		h.t.Fatal(err)
	}
	goOn = func() { _ = pidfd.Signal(f, unix.SIGCONT) } // who was killed meanwhile does not go on
	h.t.Cleanup(goOn)
	return goOn
}

// lockHolder is the process that holds the host's lock: the Supervisor.
func (h *host) lockHolder() int {
	h.t.Helper()
	b, err := os.ReadFile(h.path("run", "lock"))
	if err != nil {
		h.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		h.t.Fatal(err)
	}
	return pid
}

// processes lists the descendants of this host's Supervisor that run a program.
func (h *host) processes(program string) []int {
	h.t.Helper()
	supervisor := h.lockHolder()
	parent := map[int]int{}
	name := map[int]string{}
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range all {
		pid, _ := strconv.Atoi(filepath.Base(p))
		stat, err := os.ReadFile(p + "/stat")
		if err != nil {
			continue // it ended meanwhile
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(rest); len(f) > 1 && f[0] != "Z" {
			parent[pid], _ = strconv.Atoi(f[1])
		}
		if cmd, err := os.ReadFile(p + "/cmdline"); err == nil {
			arg0, _, _ := strings.Cut(string(cmd), "\x00")
			name[pid] = filepath.Base(arg0)
		}
	}
	var out []int
	for pid, n := range name {
		if n != program {
			continue
		}
		for p := pid; p > 1; p = parent[p] {
			if p == supervisor {
				out = append(out, pid)
				break
			}
		}
	}
	return out
}

// TestSupervisorKilled: when the Supervisor is killed everything else ends, guests included, also where the
// Builder is killed at the same moment, and the next ones start cleanly.
func TestSupervisorKilled(t *testing.T) {
	for _, programs := range [][]string{{"redoubt-supervisor"}, {"redoubt-supervisor", "redoubt-builder"}} {
		t.Run(programs[len(programs)-1], func(t *testing.T) {
			h := newDownHost(t)
			h.must("up")
			h.start(start{emulator: "qemu", what: "deaf"})
			var left []int
			for _, p := range []string{
				"redoubt-builder", "redoubt-emulator", "redoubt-vtpm", "redoubt-store-state", "redoubt-toolstack",
				"qemu-system-x86_64", "swtpm",
			} {
				pids := h.processes(p)
				if len(pids) == 0 {
					t.Fatalf("no process %s", p)
				}
				left = append(left, pids...)
			}
			var ends []*os.File
			for _, pid := range left {
				ends = append(ends, openPIDFD(t, pid))
			}
			var kill []int
			for _, p := range programs {
				kill = append(kill, h.processes(p)...)
			}
			// Both are held still first, so that neither sees the other's end.
			for _, s := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} {
				for _, pid := range kill {
					if err := unix.Kill(pid, s); err != nil {
						t.Fatal(err)
					}
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			for i := range ends {
				if err := pidfd.Await(ctx, ends[i]); err != nil {
					name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", left[i]))
					t.Errorf("process %d outlives %v (%v): %s", left[i], programs, err, name)
				}
			}
			h.must("up")
			h.must("rm", "guest")
			h.must("down")
		})
	}
}

// TestErrors: every mistake is one line that names its place and the mend.
func TestErrors(t *testing.T) {
	h := newHost(t)
	bad := h.path("bad.yaml")
	if err := os.WriteFile(bad, []byte("name: a\ncpus: 99\nboot: {kernel: /k}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.fails(2, "line 2: cpus: 99: use 1 to 8", "run", bad)
	h.fails(2, "--help", "run")
	h.fails(2, "unknown flag", "ps", "--nonsense")
	h.fails(2, "boot.kernel: /nonexistent: no such file", "run", "--name", "a", "--kernel", "/nonexistent")
	h.fails(1, `guest "nobody": no such guest`, "stop", "nobody")
	h.fails(1, `guest "nobody": no such guest`, "run", "nobody")
	h.fails(2, "give a guest's name", "show")
	h.fails(2, "no size", "disk", "create", h.path("x.img"), "many")
	if !lab.KVM() {
		r := h.tryStart(start{name: "n", emulator: "native", what: "off"})
		if r.status == 0 || !strings.Contains(r.err, "doctor") {
			t.Errorf("native without KVM: %+v", r)
		}
	}
	if out := h.must("ps", "--all", "--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("failed starts left guests: %s", out)
	}
}
