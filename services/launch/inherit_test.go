package launch

import (
	"errors"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/fdstore/fdstoretest"
	"redoubt.dev/redoubt/pidfd"
	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/services"
)

// sleeper is a process that runs until it is ended, and its pidfd.
func sleeper(t *testing.T) (*exec.Cmd, *os.File) {
	t.Helper()
	c := exec.Command("sleep", "1000")
	must(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	f, err := pidfd.Open(c.Process.Pid)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return c, f
}

// TestInherit: of what a Builder that died has left the next one goes on with the processes that guests are made
// of, and ends all others, which are gone when it has.
func TestInherit(t *testing.T) {
	keeper := fdstoretest.New(t)
	store, _ := keeper.Next()
	last := New(t.TempDir(), 0, store, sandbox.Host{})
	hold := func(name string, files ...*os.File) (*exec.Cmd, *instance) {
		t.Helper()
		s, err := services.Find(name)
		must(t, err)
		of, err := last.take(s)
		must(t, err)
		c, f := sleeper(t)
		h := sandbox.Held{PID: c.Process.Pid, Name: name + "-x", PIDFD: f}
		i := services.Instance{Label: h.Name, UID: of.user, Memory: 1 << 20}
		must(t, last.hold(of, i, h)) // what it is held for at first is its end
		if len(files) > 0 {
			h.Notes = files[0]
			must(t, last.hold(of, i, h, files[1:]...))
		}
		return c, of
	}
	// Notes that end at once are those of a process without a filter.
	notes, w, err := os.Pipe()
	must(t, err)
	w.Close()
	var pipe [2]int
	must(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	must(t, unix.SetNonblock(pipe[0], true))
	output, said := os.NewFile(uintptr(pipe[0]), "output"), os.NewFile(uintptr(pipe[1]), "output")
	defer said.Close() // another one has it, too
	control, _, err := ipc.Files()
	must(t, err)
	line, owner, err := ipc.Streams("lifeline")
	must(t, err)
	emulator, of := hold(services.Emulator, notes, control, output)
	qemu, _ := hold(services.Emulator, notes, line) // what a foreign program is kept with
	unborn, _ := hold(services.Emulator)
	back, _ := hold(services.BlkBack)

	store, left := keeper.Next()
	next := New(t.TempDir(), 0, store, sandbox.Host{})
	if _, err := next.Inherit(left, back.Process.Pid); err == nil {
		t.Error("a BlkBack is inherited")
	}
	proc, err := next.Inherit(left, emulator.Process.Pid)
	must(t, err)
	must(t, next.InheritProgram(left, qemu.Process.Pid))
	if _, err := next.Inherit(left, emulator.Process.Pid); err == nil {
		t.Error("it is inherited twice")
	}
	must(t, next.EndLeft(left))
	for name, c := range map[string]*exec.Cmd{"BlkBack": back, "the unborn one": unborn} {
		var end *exec.ExitError
		if err := c.Wait(); !errors.As(err, &end) || end.Sys().(interface{ Signal() unix.Signal }).Signal() != unix.SIGKILL {
			t.Errorf("%s: %v", name, err)
		}
	}
	list := next.List()
	if len(list) != 2 || list[0].Label != "emulator-x" || list[0].Declared.UID == list[1].Declared.UID {
		t.Errorf("%+v", list)
	}
	if next.running[of.user] == nil {
		t.Error("its user is free")
	}
	// Both end as they would have ended for the last Builder.
	proc.Kill()
	_ = emulator.Wait()
	<-proc.Done()
	if !errors.Is(proc.Err(), sandbox.ErrNotParent) {
		t.Error(proc.Err())
	}
	owner.Close()
	_ = qemu.Wait()
	next.Wait()
	if n := keeper.Len(); n != 0 {
		t.Errorf("%d processes are kept", n)
	}
}
