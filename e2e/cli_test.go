package e2e

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/pidfd"
)

// follows is a command of the CLI that goes on while toolstacks come and go.
type follows struct {
	h    *host
	c    *exec.Cmd
	out  bytes.Buffer
	errs bytes.Buffer
}

func (h *host) follows(ctx context.Context, args ...string) *follows {
	h.t.Helper()
	f := &follows{h: h, c: h.client(ctx, args...)}
	f.c.Stdout, f.c.Stderr = &f.out, &f.errs
	if err := f.c.Start(); err != nil {
		h.t.Fatal(err)
	}
	return f
}

// end waits for a command that has to succeed.
func (f *follows) end() string {
	f.h.t.Helper()
	if err := f.c.Wait(); err != nil {
		f.h.t.Errorf("%v: %v: %s", f.c.Args[1:], err, f.errs.String())
	}
	return f.out.String()
}

// TestFollowReplaced: what is followed and waited for outlives the toolstacks that serve it, and misses and repeats nothing.
func TestFollowReplaced(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*bootTime)
	defer cancel()
	h.start(start{emulator: "qemu", what: "wait", args: []string{"--unsafe-vtpm-delay", "4s"}})
	waits := h.follows(ctx, "run", "guest", "--wait")
	logs := h.follows(ctx, "logs", "guest", "--follow")
	events, left := h.stream(ctx, "events", "--follow")
	defer left()
	for range 3 {
		<-time.After(300 * time.Millisecond) // any moment of the boot
		h.must("reset", "toolstack")
		<-time.After(300 * time.Millisecond)
		for _, pid := range h.processes("redoubt-toolstack") {
			_ = unix.Kill(pid, unix.SIGKILL) // one that was replaced may end meanwhile
		}
	}
	if out := waits.end(); !strings.Contains(out, "guest guest is running") {
		t.Errorf("run --wait: %s", out)
	}
	h.await("guest", "READY\n", 2*bootTime)
	h.must("reset", "toolstack", "guest")
	h.must("stop", "guest", "--grace", "60s")
	want, err := os.ReadFile(h.path("run", "log", "console-guest.log"))
	if err != nil {
		t.Fatal(err)
	}
	if out := logs.end(); out != string(want) || !strings.Contains(out, "PRESSED") {
		t.Errorf("%d bytes followed, %d printed by the guest:\n%s", len(out), len(want), lastLines(out, 20))
	}
	seen := map[string]int{}
	var all []string
	for lines := bufio.NewScanner(events); lines.Scan(); {
		seen[lines.Text()]++
		if all = append(all, lines.Text()); strings.Contains(lines.Text(), "ended") {
			break
		}
	}
	for line, n := range seen {
		if n > 1 {
			t.Errorf("%d times: %s", n, line)
		}
	}
	text := strings.Join(all, "\n")
	for _, what := range []string{"requested", "kernel started", "vTPM ready", "ended"} {
		if strings.Count(text, what) != 1 {
			t.Errorf("event %q not once:\n%s", what, text)
		}
	}
}

// TestLockFile: whether Redoubt runs only root can tell or change, and who has ended holds nothing, whatever it left behind.
func TestLockFile(t *testing.T) {
	h := newHost(t)
	lock := h.path("run", "lock")
	for _, dir := range []string{h.dir, filepath.Dir(h.dir)} {
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	const nobody = 65534
	flock := exec.CommandContext(t.Context(), "flock", "--shared", "--nonblock", lock, "true")
	flock.SysProcAttr = &unix.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if out, err := flock.CombinedOutput(); err == nil || !strings.Contains(string(out), "ermission denied") {
		t.Errorf("another user locks the file: %v: %s", err, out)
	}
	for line, want := range map[string]string{
		"down":              "use sudo",
		"--tenant other ps": `there is no tenant "other", or Redoubt does not run`,
		"reset toolstack":   "use sudo",
	} {
		if r := h.runAs(t.Context(), nobody, "", strings.Fields(line)...); r.status != 1 || !strings.Contains(r.err, want) {
			t.Errorf("%s: exit status %d, %q; want %q", line, r.status, r.err, want)
		}
	}
	if r := h.runAs(t.Context(), nobody, "", "doctor"); !strings.Contains(r.out, "only root can tell: use sudo") {
		t.Errorf("doctor: %s", r.out)
	}
	h.fails(1, `there is no tenant "other": make it`, "--tenant", "other", "ps")

	pid := h.only("Supervisor", "redoubt-supervisor")
	supervisor, builder := openPIDFD(t, pid), openPIDFD(t, h.only("Builder", "redoubt-builder"))
	if err := pidfd.Signal(supervisor, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, p := range []*os.File{supervisor, builder} {
		if err := pidfd.Await(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(lock); err != nil || strings.TrimSpace(string(b)) != strconv.Itoa(pid) {
		t.Errorf("%q is left in the lock's file: %v", b, err) // else this shows nothing
	}
	if out := h.must("down"); !strings.Contains(out, "does not run") {
		t.Errorf("down: %s", out)
	}
	if out := h.must("up"); !strings.Contains(out, "is up") {
		t.Errorf("up: %s", out)
	}
}
