package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/md5" //nolint:gosec // what busybox has, and nobody forges
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/lab"
)

func TestStorageQEMU(t *testing.T) {
	h := newHost(t)
	disk := h.path("disk.img")
	h.must("disk", "create", disk, "8MiB")
	h.churned("qemu", "churn", disk)
}

func TestStorageNative(t *testing.T) {
	lab.NeedsKVM(t)
	h := newHost(t)
	disk := h.path("disk.img")
	h.must("disk", "create", disk, "8MiB")
	h.churned("native", "churn", disk)
}

func TestOverlayQEMU(t *testing.T) { overlay(t, "qemu") }

func TestOverlayNative(t *testing.T) {
	lab.NeedsKVM(t)
	overlay(t, "native")
}

// overlay: a guest finds its base's contents on an overlay and keeps what it writes over kills of
// BlkBack; the rest stays the base's, which is unchanged.
func overlay(t *testing.T, emulator string) {
	h := newHost(t)
	base, disk := h.path("base.img"), h.path("disk.img")
	contents := make([]byte, 8<<20)
	for i := range contents {
		contents[i] = byte(rand.Uint32())
	}
	if err := os.WriteFile(base, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	h.must("disk", "create", "--base", base, disk)
	h.fails(1, "is an overlay itself", "disk", "create", "--base", disk, h.path("other.img"))
	c := h.churned(emulator, "overlay", "path="+disk+",base="+base)
	for word, want := range map[string]string{"BASE": digest(contents), "DISK": digest(overlaid(t, disk, base))} {
		if !strings.Contains(c, word+" "+want) {
			t.Errorf("%s is not %s\n%s", word, want, lastLines(c, 20))
		}
	}
	now, err := os.ReadFile(base)
	if err != nil || digest(now) != digest(contents) {
		t.Errorf("the base was changed (%v)", err)
	}
	// What the guest wrote: 3 MiB from the start, and one sector.
	got := overlaid(t, disk, base)
	copy(contents[:3<<20], got)
	copy(contents[14001*512:][:512], got)
	if !bytes.Equal(got, contents) {
		t.Error("the overlay does not hold what the guest wrote over what its base has")
	}

	h.must("disk", "copy", disk, h.path("copy.img"))
	if !bytes.Equal(overlaid(t, h.path("copy.img"), base), contents) {
		t.Error("a copy of the overlay holds something else")
	}

	h.must("rm", "churn")
	again := func(flag string) start {
		return start{name: "refused", emulator: emulator, what: "off", args: []string{"--disk", flag}}
	}
	h.refused("is not an overlay", again("path="+base+",base="+disk), "not an overlay")
	h.refused("the base's time", again("path="+disk+",base="+base), "was changed since", func() {
		if err := os.Chtimes(base, time.Time{}, time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
	})
}

// refused: such a guest is not started, for a reason that one line tells.
func (h *host) refused(what string, s start, want string, before ...func()) {
	h.t.Helper()
	for _, do := range before {
		do()
	}
	r := h.tryStart(s)
	h.t.Logf("%s: %s", what, strings.TrimSpace(r.err))
	if r.status != 1 && r.status != 2 || !strings.Contains(r.err, want) || strings.Count(r.err, "\n") != 1 {
		h.t.Errorf("%s: exit status %d: %q; want one line with %q", what, r.status, r.err, want)
	}
}

func digest(b []byte) string { return fmt.Sprintf("%x", md5.Sum(b)) }

// overlaid is what a disk holds.
func overlaid(t *testing.T, path, base string) []byte {
	t.Helper()
	var files []*os.File
	for _, p := range []string{path, base} {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	o, err := block.NewOverlay(files[0], files[1], true)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }()
	b := make([]byte, o.Size())
	if _, err := o.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// churned kills BlkBack, and has it replaced in good order, again and again while a guest writes to its disk and reads back. The
// guest sees pauses and nothing else; the timeline tells of each replacement. It returns its console.
func (h *host) churned(emulator, what, disk string) string {
	t := h.t
	h.start(start{name: "churn", emulator: emulator, what: what, args: []string{"--disk", disk}})
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
	h.must("stop", "churn", "--grace", bootTime.String())
	g := h.awaitDown("churn", bootTime)
	c := h.console("churn")
	if g.State != "stopped" || strings.Contains(c, "DISK-ERROR") {
		t.Errorf("guest is %s: %s\n%s", g.State, g.Reason, lastLines(c, 20))
	}
	if n := strings.Count(c, "SAME "); n < 4 || n != strings.Count(c, "ROUND ") || !strings.Contains(c, "E2E-DONE") {
		t.Errorf("%d rounds came out the same\n%s", n, lastLines(c, 20))
	}
	readFacts(c).keptTrust(t)
	return c
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
