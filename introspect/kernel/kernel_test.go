package kernel_test

import (
	"bytes"
	"errors"
	"io"
	"strconv"
	"strings"
	"testing"

	"redoubt.dev/redoubt/introspect/introspecttest"
	"redoubt.dev/redoubt/introspect/kernel"
)

// TestFind: a real guest's kernel is found where the guest itself says that it is, and is not where nothing is.
func TestFind(t *testing.T) {
	g := introspecttest.Boot(t, "cat /proc/version; grep -w -e _text -e init_task -e sys_call_table /proc/kallsyms")
	if len(g.Said) != 4 {
		t.Fatalf("the guest said %q", g.Said)
	}
	k := g.Find(t)
	t.Logf("the kernel lies at %#x and is seen %#x above where it was linked for", k.Physical, k.Offset)
	for _, l := range g.Said[1:] {
		f := strings.Fields(l)
		want, err := strconv.ParseUint(f[0], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := k.Address(f[2]); err != nil || got != want {
			t.Errorf("%s at %#x, %v, the guest says %#x", f[2], got, err, want)
		}
	}
	at, err := k.Address("linux_banner")
	if err != nil {
		t.Fatal(err)
	}
	banner := g.Said[0]
	got := make([]byte, len(banner))
	if _, err := k.ReadAt(got, int64(at)); err != nil || string(got) != banner {
		t.Errorf("%q, %v, the guest says %q", got, err, banner)
	}
	if _, err := k.Address("no such symbol"); err == nil {
		t.Error("a symbol that is not there has an address")
	}
	if _, err := kernel.Find(io.NewSectionReader(g.Memory, 0, introspecttest.Memory), k.Physical, g.Image, g.Table); !errors.Is(err, kernel.ErrNotFound) {
		t.Errorf("below it: %v", err)
	}
	// Who has the words alone imitates the kernel in vain.
	fake := make([]byte, 64<<20)
	words := 32<<20 + at - k.Offset
	if text, ok := g.Table.Lookup("_text"); ok {
		words -= text.Address
	}
	copy(fake[words:], banner+"\n\x00")
	if _, err := kernel.Find(bytes.NewReader(fake), uint64(len(fake)), g.Image, g.Table); !errors.Is(err, kernel.ErrNotFound) {
		t.Errorf("an imitation: %v", err)
	}
}
