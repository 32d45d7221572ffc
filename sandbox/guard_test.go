package sandbox

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// testID is a user and group of nobody on the machine.
const testID = 0x52450002

// buildProbe builds the program that tests run; a machine without Go is given it by name.
var buildProbe = sync.OnceValues(func() (string, error) {
	if bin := os.Getenv("REDOUBT_TEST_PROBE"); bin != "" {
		return bin, nil
	}
	dir, err := os.MkdirTemp("", "probe")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "probe")
	cmd := exec.Command("go", "build", "-o", bin, "./attack/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return bin, nil
})

func probe(t testing.TB) string {
	t.Helper()
	bin, err := buildProbe()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

func goPolicy(t testing.TB, more string) *Policy {
	t.Helper()
	p, err := ParsePolicy("test", []byte("include go\n"+more))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// run runs the probe to its end.
func run(t testing.TB, s *Spec, args ...string) (string, *Guard, error) {
	t.Helper()
	cmd := exec.Command(probe(t), args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	g, err := (&Host{Launcher: probe(t)}).Prepare(cmd, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	err = g.Wait()
	return out.String(), g, err
}

// serve starts the probe and keeps it until the test ends it.
func serve(t *testing.T, s *Spec, attr *unix.SysProcAttr) (*Guard, func() error) {
	t.Helper()
	cmd := exec.Command(probe(t), "serve")
	cmd.SysProcAttr = attr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	g, err := (&Host{Launcher: probe(t)}).Prepare(cmd, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	end := sync.OnceValue(func() error { in.Close(); return g.Wait() })
	t.Cleanup(func() { _ = end() })
	return g, end
}

// The kernel reports for every thread what the Spec declares, whatever the Spec.
func TestObserveIsDeclared(t *testing.T) {
	dir := t.TempDir()
	for name, s := range map[string]*Spec{
		"strictest": {},
		"rich": {
			Groups: []uint32{testID + 1, testID + 2}, Share: []Namespace{Net, IPC},
			Root: []Bind{
				{Source: dir, Target: "/state", Writable: true, NoExec: true},
				{Source: "/usr/lib/locale", NoExec: true},
				{Source: "/etc/hostname", Target: "/name"},
				{Source: "/dev/null", Device: true, Writable: true},
				{Link: "usr/lib", Target: "/lib"},
			},
			Proc: true, Capabilities: []Capability{NetRaw, IPCLock}, Memory: 300<<20 + 1, Files: 100, Processes: 99,
		},
		"whole tree":             {Root: []Bind{{Source: "/usr", Target: "/"}}},
		"host's user namespace":  {Share: []Namespace{User, Net}, Capabilities: []Capability{NetAdmin}, Groups: []uint32{testID + 3}},
		"host's PID namespace":   {Share: []Namespace{PID, UTS, CgroupNS}},
		"host's user, no groups": {Share: []Namespace{User}},
	} {
		t.Run(name, func(t *testing.T) {
			s.Name, s.UID, s.GID = "test", testID, testID+100
			s.Policy = goPolicy(t, "tgkill")
			g, end := serve(t, s, nil)
			got, err := Observe(g.cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range s.Declared().Differences(got) {
				t.Error(d)
			}
			if err := end(); err != nil {
				t.Error(err)
			}
		})
	}
}

// The difference is seen where there is one: this very test has no sandbox.
func TestObserveSeesDifferences(t *testing.T) {
	s := &Spec{Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, "")}
	got, err := Observe(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	d := strings.Join(s.Declared().Differences(got), "\n")
	for _, want := range []string{"user: 0, not", "seccomp: off, not filter", "own namespaces: []", "no_new_privs: false", "mounts: "} {
		if !strings.Contains(d, want) {
			t.Errorf("no %q in\n%s", want, d)
		}
	}
}

// Nothing of what a Go program does by itself is outside its base list.
func TestLearnedIsListed(t *testing.T) {
	s := &Spec{Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, ""), Learn: true}
	for range 5 {
		out, g, err := run(t, s, "busy")
		if err != nil || out != "done\n" || len(g.Learned()) > 0 {
			t.Fatalf("%q, %v, outside the list: %v", out, err, g.Learned())
		}
	}
	out, g, err := run(t, &Spec{Name: "test", UID: testID, GID: testID, Policy: MustParsePolicy("x", []byte("write\nexit_group")), Learn: true}, "busy")
	if err != nil || out != "done\n" || g.Learned()["futex"] == 0 {
		t.Fatalf("%q, %v, %v", out, err, g.Learned())
	}
}

// A call outside the list ends the process, and its parent can name it.
func TestViolation(t *testing.T) {
	out, _, err := run(t, &Spec{Name: "redoubt-test", UID: testID, GID: testID, Policy: goPolicy(t, "")}, "caps")
	var v *Violation
	if !errors.As(err, &v) || v.Call != "socket" || v.Args[0] != unix.AF_PACKET || out != "" {
		t.Fatalf("%q, %v", out, err)
	}
	if want := "redoubt-test was killed by its sandbox: system call socket(0x11, 0x3, 0x0, 0x0, 0x0, 0x0) is not in its list"; err.Error() != want {
		t.Error(err)
	}
}

// Without its parent, who would be told, a call outside the list is not made.
func TestParentGone(t *testing.T) {
	cmd := exec.Command(probe(t), "late")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	g, err := (&Host{Launcher: probe(t)}).Prepare(cmd, &Spec{Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, "")})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	out := bufio.NewReader(stdout)
	if line, err := out.ReadString('\n'); err != nil || line != "ready\n" {
		t.Errorf("%q, %v", line, err)
	}
	g.notes.Close() // as the end of the parent does
	<-g.watched
	in.Close()
	if line, err := out.ReadString('\n'); err != nil || line != unix.ENOSYS.Error()+"\n" {
		t.Errorf("%q, %v", line, err)
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// A declared capability is there and works; it reaches no further than the process's own
// network namespace.
func TestCapability(t *testing.T) {
	for _, caps := range [][]Capability{nil, {NetRaw}} {
		out, _, err := run(t, &Spec{Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, "socket"), Capabilities: caps}, "caps")
		if want := map[bool]string{true: "true <nil>\n", false: "false operation not permitted\n"}[caps != nil]; err != nil || out != want {
			t.Errorf("%v: %q, %v", caps, out, err)
		}
	}
}

// A writable directory is writable, all else is not.
func TestRoot(t *testing.T) {
	state, readonly := t.TempDir(), t.TempDir()
	if err := os.Chown(state, testID, testID); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(readonly, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(readonly, "file"), []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, _, err := run(t, &Spec{
		Name: "test", UID: testID, GID: testID,
		Policy: MustParsePolicy("files", []byte("openat\nnewfstatat\ninclude go\n")),
		Root:   []Bind{{Source: state, Target: "/state", Writable: true}, {Source: readonly, Target: "/readonly"}},
	}, "files")
	want := "<nil> open /readonly/new: read-only file system open /new: read-only file system\ntext <nil>\n"
	if err != nil || out != want {
		t.Errorf("%q, %v", out, err)
	}
	st, err := os.Stat(filepath.Join(state, "new"))
	if err != nil || st.Sys().(*syscall.Stat_t).Uid != testID {
		t.Errorf("%v, %v", st, err)
	}
}

// The memory limit is in force, and the reason of the end is known.
func TestMemory(t *testing.T) {
	s := &Spec{Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, ""), Memory: 64 << 20}
	out, _, err := run(t, s, "memory")
	if !errors.Is(err, ErrMemory) || out != "" {
		t.Errorf("%q, %v", out, err)
	}
	// Without a cgroup: a limit of data, where the Spec allows it.
	s.Optional = []Ingredient{MemoryCgroup}
	cmd := exec.Command(probe(t), "memory")
	var text bytes.Buffer
	cmd.Stdout, cmd.Stderr = &text, &text
	h := &Host{Launcher: probe(t), Cgroup: &Cgroup{dir: "/nonexistent"}}
	g, err := h.Prepare(cmd, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	if err := g.Wait(); err == nil || !strings.Contains(text.String(), "out of memory") {
		t.Errorf("%v, %.200q", err, text.String())
	}
	s.Optional = nil
	if _, err := h.Prepare(exec.Command(probe(t)), s); err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("a limit that cannot be had: %v", err)
	}
}

// Descriptors reach the program only if they were given to it.
func TestDescriptors(t *testing.T) {
	// One that leaks into every child.
	leak, err := unix.Open("/etc/passwd", unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leak)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	cmd := exec.Command(probe(t), "descriptors")
	var out bytes.Buffer
	cmd.Stdout = &out
	cmd.ExtraFiles = []*os.File{null}
	g, err := (&Host{Launcher: probe(t)}).Prepare(cmd, &Spec{Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, "")})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	if err := g.Wait(); err != nil || out.String() != "descriptor 3\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
}

// Process 1 of a PID namespace ends by SIGTERM if its runtime handles it, as Go's does, and by
// SIGKILL always.
func TestSignals(t *testing.T) {
	s := &Spec{Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, "")}
	for sig, want := range map[unix.Signal]string{unix.SIGTERM: "exit status 2", unix.SIGKILL: "signal: killed"} {
		g, _ := serve(t, s, nil)
		if err := g.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if err := g.Wait(); err == nil || err.Error() != want {
			t.Errorf("%v: %v, want %s", sig, err, want)
		}
	}
}

// A start that fails says why and leaves nothing.
func TestStartFails(t *testing.T) {
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	private := filepath.Join(t.TempDir(), "private")
	if err := os.WriteFile(private, []byte("\x7fELF"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		root []Bind
		want string
	}{
		{"/bin/true", nil, "execve: no such file or directory"}, // its loader is not there
		{script, nil, "execve: "},
		{private, nil, "execve: permission denied"},
		{"/nonexistent", nil, "no such file"},
		{probe(t), []Bind{{Source: "/nonexistent"}}, "root entry /nonexistent: no such file"},
		{probe(t), []Bind{{Source: "/etc", Target: "/a"}, {Source: "/dev/null", Target: "/a/b/c"}}, "root: /a/b/c"},
	} {
		g, err := (&Host{Launcher: probe(t)}).Prepare(exec.Command(c.path), &Spec{
			Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, ""), Root: c.root, Memory: 64 << 20,
		})
		if err == nil {
			err = g.Start()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.path, err, c.want)
		}
	}
	c, err := FindCgroup()
	if err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(c.Dir(), fmt.Sprintf("redoubt-test-%d-*", os.Getpid())))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	// A launcher that is no launcher.
	g, err := (&Host{Launcher: "/bin/true"}).Prepare(exec.Command(probe(t)), &Spec{Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, "")})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err == nil {
		t.Error("started")
	}
}

// The running program can be the launcher.
func TestOwnLauncher(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "as-program")
	// Instrumented for races this binary is a program of libc and needs its libraries.
	root := []Bind{{Source: "/usr"}, {Link: "usr/lib64", Target: "/lib64"}, {Link: "usr/lib", Target: "/lib"}}
	var out bytes.Buffer
	cmd.Stderr = &out
	g, err := (&Host{}).Prepare(cmd, &Spec{Name: "test", UID: testID, GID: testID, Policy: MustParsePolicy("open", []byte("write\nexit_group")), Root: root, Proc: true, Learn: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	if err := g.Wait(); err == nil || err.Error() != "exit status 7" {
		t.Error(err, out.String())
	}
}

func TestSpecCheck(t *testing.T) {
	good := func() *Spec { return &Spec{Name: "x", UID: 1, GID: 1, Policy: goPolicy(t, "")} }
	if err := good().Check(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(s *Spec){
		"without a name":      func(s *Spec) { s.Name = "" },
		"not root's":          func(s *Spec) { s.UID = 0 },
		"no seccomp list":     func(s *Spec) { s.Policy = nil },
		`namespace "time"`:    func(s *Spec) { s.Share = []Namespace{"time"} },
		"mount namespace":     func(s *Spec) { s.Share = []Namespace{Mount} },
		"show the host":       func(s *Spec) { s.Share, s.Proc = []Namespace{PID}, true },
		"clean absolute path": func(s *Spec) { s.Root = []Bind{{Source: "/a/../b"}} },
		"source or be a link": func(s *Spec) { s.Root = []Bind{{Target: "/a"}} },
		"leaves no room":      func(s *Spec) { s.Root, s.Proc = []Bind{{Source: "/usr", Target: "/"}}, true },
		"by Proc only":        func(s *Spec) { s.Root = []Bind{{Source: "/proc"}} },
	} {
		s := good()
		change(s)
		if err := s.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestCheck(t *testing.T) {
	for _, l := range Check() {
		t.Errorf("this host: %v", l)
	}
}

// A process that has ended is none, whether or not its parent knows.
func TestObserveEnded(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if s, err := Observe(cmd.Process.Pid); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a zombie: %+v, %v", s, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if _, err := Observe(cmd.Process.Pid); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("one that was waited for: %v", err)
	}
}

// One that ends while it is looked at is seen as it was, or as none.
func TestObserveEnding(t *testing.T) {
	s := &Spec{Name: "test", UID: testID, GID: testID, Memory: 300 << 20}
	s.Policy = goPolicy(t, "tgkill")
	for range 20 {
		g, end := serve(t, s, nil)
		over := make(chan error, 1)
		go func() { over <- end() }()
		for {
			got, err := Observe(g.cmd.Process.Pid)
			if errors.Is(err, os.ErrNotExist) {
				break
			}
			if d := s.Declared().Differences(got); err != nil || len(d) > 0 {
				t.Fatalf("%v, %v", d, err)
			}
		}
		if err := <-over; err != nil {
			t.Fatal(err)
		}
	}
}
