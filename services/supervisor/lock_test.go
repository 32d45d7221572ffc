package supervisor

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "lock")
	holder := func(want int) {
		t.Helper()
		if pid, err := Holder(path); pid != want || err != nil {
			t.Errorf("held by %d, %v; want %d", pid, err, want)
		}
	}
	holder(0)
	unlock, err := Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	holder(os.Getpid())
	if _, err := Lock(path); err == nil || !strings.Contains(err.Error(), "runs already") {
		t.Errorf("%v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != fmt.Sprintln(os.Getpid()) {
		t.Errorf("%q, %v", b, err)
	}
	// A child that was started meanwhile does not hold it.
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = child.Process.Kill(); _ = child.Wait() }()
	unlock()
	holder(0)
	again, err := Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	again()
}

// TestLockMode: nobody but root may open the file, and so lock it; one of an older Redoubt is made so.
func TestLockMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	for _, old := range []bool{false, true} {
		if old {
			if err := os.Chmod(path, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		unlock, err := Lock(path)
		if err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
			t.Errorf("old %v: mode %v, %v", old, st.Mode(), err)
		}
		unlock()
	}
}

// TestLeftLock: the process id that a killed Supervisor leaves is nobody's.
func TestLeftLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	if err := os.WriteFile(path, []byte("4711\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil { // whatever this is, it is no Supervisor
		t.Fatal(err)
	}
	if pid, err := Holder(path); pid != 0 || err != nil {
		t.Errorf("held by %d, %v", pid, err)
	}
}

// TestHolderTakesNothing: whoever asks keeps no Supervisor from starting.
func TestHolderTakesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	end, asked := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(asked)
		for {
			select {
			case <-end:
				return
			default:
				_, _ = Holder(path) // it may be locked and hold no process id yet
			}
		}
	}()
	for range 2000 {
		unlock, err := Lock(path)
		if err != nil {
			t.Error(err)
			break
		}
		unlock()
	}
	close(end)
	<-asked
}
