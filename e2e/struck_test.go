package e2e

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab"
)

func TestValidateStruckQEMU(t *testing.T) { validateStruck(t, "qemu") }

func TestValidateStruckNative(t *testing.T) {
	lab.NeedsKVM(t)
	validateStruck(t, "native")
}

// validateStruck: while a guest is being held for a snapshot, those that hold it are lost. It goes on, nothing of its disk is lost
// to the next validation, and a BlkBack that was lost costs a moment, not the verdict.
func validateStruck(t *testing.T, emulator string) {
	const name = "struck"
	h := newHost(t)
	h.must("run", h.validatedSpec(name, emulator, h.emptyDisk(name, "1GiB"), "", "validation:\n  scratch: 64MiB\n"))
	h.await(name, "READY", bootTime)
	key := h.path(name + ".key")
	h.must("baseline", "key", key)
	h.must("baseline", "create", name, "--key", key)
	sh := h.shell(name)
	// strike has a validation begun that cannot hold the guest before what then happens: its disk does not answer.
	strike := func(then ...func(blkback int)) result {
		t.Helper()
		blkback := h.only("BlkBack", "redoubt-blkback")
		h.holdStill("redoubt-blkback")
		done := make(chan struct{})
		go func() {
			defer close(done)
			<-time.After(500 * time.Millisecond) // whenever it comes, what is asked of all of them holds
			for _, do := range then {
				do(blkback)
			}
		}()
		r := h.run("validate", name)
		<-done
		return r
	}
	goesOn := func() {
		t.Helper()
		sh.does("date >>/disk/diary; sync")
	}
	kill := func(pid int) { _ = unix.Kill(pid, unix.SIGKILL) }
	if r := strike(kill); r.status != 0 {
		t.Errorf("a BlkBack was lost: exit status %d: %s", r.status, r.err)
	}
	goesOn()
	builder := h.processes("redoubt-builder")
	if len(builder) != 1 {
		t.Fatalf("Builders %v", builder)
	}
	// The verdict is the next Builder's, or there is none.
	strike(func(int) { kill(builder[0]) }, func(blkback int) { _ = unix.Kill(blkback, unix.SIGCONT) })
	done := sh.done
	sh = h.shell(name) // the last one's console went with the toolstack
	sh.done = done
	goesOn()
	sh.does("mkdir -p /disk/usr/bin; echo found >/disk/usr/bin/added; sync")
	if v := h.validate(name); len(v.Findings) == 0 {
		t.Errorf("what was added is not found: %+v", v)
	}
	h.must("stop", name, "--grace", "0s")
	h.must("audit", "verify")
}
