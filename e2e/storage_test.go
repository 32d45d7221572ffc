package e2e

import (
	"bufio"
	"context"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab"
)

func TestStorageQEMU(t *testing.T) { storage(t, "qemu") }

func TestStorageNative(t *testing.T) {
	lab.NeedsKVM(t)
	storage(t, "native")
}

// storage kills BlkBack, and has it replaced in good order, again and again while a guest writes to its disk and reads back. The
// guest sees pauses and nothing else; the timeline tells of each replacement.
func storage(t *testing.T, emulator string) {
	h := newHost(t)
	disk := h.path("disk.img")
	h.must("disk", "create", disk, "8MiB")
	h.start(start{name: "churn", emulator: emulator, what: "churn", args: []string{"--disk", disk}})
	next := h.followEvents("churn")
	for _, round := range []string{"ROUND 1", "ROUND 2", "ROUND 3", "ROUND 4"} {
		h.await("churn", round, bootTime)
		h.kill("BlkBack", "redoubt-blkback")
		next("storage", 30*time.Second)
		h.must("reset", "blkback", "churn")
		next("storage", 30*time.Second)
		h.kill("BlkBack", "redoubt-blkback")
		next("storage", 30*time.Second)
	}
	g := h.awaitDown("churn", bootTime)
	c := h.console("churn")
	if g.State != "stopped" || strings.Contains(c, "DISK-ERROR") {
		t.Errorf("guest is %s: %s\n%s", g.State, g.Reason, lastLines(c, 20))
	}
	for _, want := range []string{"SAME 1", "SAME 2", "SAME 3", "SAME 4", "E2E-DONE"} {
		if !strings.Contains(c, want) {
			t.Errorf("no %q on the console\n%s", want, lastLines(c, 20))
		}
	}
	readFacts(c).keptTrust(t)
}

// followEvents runs `redoubt events --follow` and returns a function that waits for the next event
// of a kind.
func (h *host) followEvents(name string) (next func(kind string, limit time.Duration)) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out, end := h.stream(ctx, "events", name, "--follow", "--json")
	h.t.Cleanup(func() { cancel(); end() })
	lines := bufio.NewScanner(out)
	return func(kind string, limit time.Duration) {
		h.t.Helper()
		late := time.AfterFunc(limit, cancel)
		defer late.Stop()
		for lines.Scan() {
			if strings.Contains(lines.Text(), `"kind":"`+kind+`"`) {
				return
			}
		}
		g := h.show(name)
		h.t.Fatalf("%s: no event %q within %v; guest is %s: %s", name, kind, limit, g.State, g.Reason)
	}
}
