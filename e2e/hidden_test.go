package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"redoubt.dev/redoubt/lab"
)

func TestHiddenQEMU(t *testing.T) { hidden(t, "qemu") }

func TestHiddenNative(t *testing.T) {
	lab.NeedsKVM(t)
	hidden(t, "native")
}

// hidden: what a running guest does not show of its disk is found. Its kernel leaves a file out of what it says of a directory,
// as a rootkit's does (by an overlay with a whiteout), and something is mounted over another directory.
func hidden(t *testing.T, emulator string) {
	h := newHost(t)
	key := h.path("web.key")
	h.must("baseline", "key", key)
	h.must("run", h.validatedSpec("web", emulator, h.rootDisk("web"), "", ""))
	h.await("web", "READY", bootTime)
	h.must("baseline", "create", "web", "--key", key)
	sh := h.shell("web")
	sh.does("mkdir /disk/tmp; echo old >/disk/tmp/old; sync; sleep 2")
	// seen lists the guest's disk inside it and validates it.
	seen := func(then string) map[string]bool {
		t.Helper()
		out := sh.does(`cd /disk; echo AT @$(date +%s); find . | sed 's,^[.],,;s,^$,/,'; cd /; ` + then)
		_, out, ok := strings.Cut(strings.ReplaceAll(out, "\r", ""), "AT ")
		at, names, _ := strings.Cut(out, "\n")
		names, _, done := strings.Cut(names, "DID ")
		if !ok || !done {
			t.Fatalf("the listing is\n%s", out)
		}
		path := h.path("seen")
		if err := os.WriteFile(path, []byte(names), 0o600); err != nil {
			t.Fatal(err)
		}
		v := h.validate("web", "--seen", path, "--seen-at", at)
		if v.Seen == nil || v.Seen.Listed < 200 || v.Seen.Names < 200 {
			t.Errorf("of the listing it says %+v", v.Seen)
		}
		all := map[string]bool{}
		for _, f := range v.Findings {
			all[fmt.Sprintf("%s %s %v", f.Severity, f.Kind, f.Name)] = true
		}
		return all
	}
	if all := seen("echo new >/disk/home/new; mv /disk/home/a/notes /disk/home/a/moved; sync"); len(all) != 0 {
		t.Errorf("the guest hides nothing, and found is %v", all)
	}
	sh.does("mkdir /o; mount -t tmpfs o /o; mkdir /o/u /o/w; mknod /o/u/login c 0 0")
	out := sh.does("mount -t overlay -o lowerdir=/disk/usr/bin,upperdir=/o/u,workdir=/o/w o /disk/usr/bin && mount -t tmpfs t /disk/tmp && echo COVERED")
	if !strings.Contains(out, "COVERED") {
		t.Fatal(out)
	}
	all := seen(":")
	if want := map[string]bool{"critical hidden disk0:/usr/bin/login": true, "warning hidden disk0:/tmp": true}; fmt.Sprint(all) != fmt.Sprint(want) {
		t.Errorf("the guest hides two things, and found is %v", all)
	}
	sh.does("umount /disk/usr/bin; umount /disk/tmp")
	if all := seen(":"); len(all) != 0 {
		t.Errorf("it hides nothing any more, and found is %v", all)
	}
	h.must("stop", "web", "--grace", "0s")
}
