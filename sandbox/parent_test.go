package sandbox

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/pidfd"
)

// parent prepares a sandbox, sees its launcher through to execve, says its process number and does not let it execute.
func parent() {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	bin := os.Getenv("REDOUBT_TEST_PROBE")
	p, err := BasePolicy("go")
	fail(err)
	cmd := exec.Command(bin)
	g, err := (&Host{Launcher: bin}).Prepare(cmd, &Spec{Name: "test", UID: testID, GID: testID, Policy: p})
	fail(err)
	fail(cmd.Start())
	g.closeFiles()
	_, err = g.sync.Write([]byte{msgGo})
	fail(err)
	kind, _, err := g.receive()
	fail(err)
	if kind != msgFilter {
		fail(fmt.Errorf("message %q", kind))
	}
	fmt.Println(cmd.Process.Pid)
	_ = unix.Pause() // it is killed
}

// TestLauncherEndsWithParent: who starts a sandbox and is killed over it leaves no process.
func TestLauncherEndsWithParent(t *testing.T) {
	cmd := exec.Command(os.Args[0], "as-parent")
	cmd.Env = append(os.Environ(), "REDOUBT_TEST_PROBE="+probe(t))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	_, serr := fmt.Fscan(out, &pid)
	var launcher *os.File
	if serr == nil {
		launcher, err = pidfd.Open(pid)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // killed
	if serr != nil || err != nil {
		t.Fatal(serr, err)
	}
	defer launcher.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := pidfd.Await(ctx, launcher); err != nil {
		t.Errorf("the launcher outlives its parent: %v", err)
		_ = pidfd.Signal(launcher, unix.SIGKILL)
	}
}
