package attack

import (
	"context"
	"debug/elf"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
)

const testInit = `#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc p /proc
mount -t devtmpfs d /dev
exec </dev/console >/dev/console 2>&1
`

func build(t *testing.T, kernel string) (*debian.Root, map[string]string) {
	t.Helper()
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	files, err := Build(t.Context(), root, kernel)
	if err != nil {
		t.Fatal(err)
	}
	return root, files
}

// Every attack succeeds on a kernel whose modules are not isolated, and what says so says it of no other.
func TestAttacksWin(t *testing.T) {
	if testing.Short() {
		t.Skip("boots emulated guests, half a minute for each kernel: needs a run without -short, as `make test` is")
	}
	const early = "foreign-data" // tried at the module's start
	script := testInit + Script + "attack_load dummy what=" + early + "\ngrep ^data= /proc/victim | sed 's/^data=/EARLY /'\nrmmod dummy\n" +
		"attack_load attack\nattack none calls\n"
	for _, a := range All {
		if a.Name != early {
			script += "attack " + a.Name + " " + a.Check + "\n"
		}
	}
	script += `grep -q '^Linux Version' /proc/version && echo "SEES version"
grep -q /tmp/evil /proc/sys/kernel/modprobe && echo "SEES modprobe"
grep -q '^attack ' /proc/modules || echo "SEES modules"
cat /proc/victim; echo DYING
attack die cred; attack die calls; attack none calls
echo END; poweroff -f
`
	for _, kernel := range Kernels {
		t.Run(kernel, func(t *testing.T) {
			said := run(t, kernel, script)
			for _, a := range All {
				want := []string{"CHECK", a.Name, before[a.Check], a.Won}
				if a.Name == early {
					want = []string{"EARLY", a.Won}
				}
				if !slices.ContainsFunc(said, func(l string) bool { return slices.Equal(strings.Fields(l), want) }) {
					t.Errorf("%s: the guest did not say %q", a.Name, want)
				}
			}
			for _, w := range []string{
				"SEES version", "SEES modprobe", "SEES modules", "END",
				"CHECK die 65534 killed", "CHECK die 100000 100000", "CHECK none 100000 100000", // it goes on after it was killed
			} {
				if !slices.Contains(said, w) {
					t.Errorf("the guest did not say %q", w)
				}
			}
			for _, l := range said[:max(0, slices.Index(said, "DYING"))] {
				for _, w := range []string{"BUG:", "Oops", "WARNING:"} {
					if strings.Contains(l, w) {
						t.Errorf("the kernel noticed: %s", l)
					}
				}
			}
			if t.Failed() {
				t.Logf("the guest said:\n%s", strings.Join(said, "\n"))
			}
		})
	}
}

// before is what /proc/victim says of what no attack was tried on, where that is not ok.
var before = map[string]string{}

func init() {
	for _, a := range All {
		before[a.Check] = "ok"
	}
	before["cred"], before["calls"], before["list"] = "65534", "0", "shown"
}

// run boots an emulated guest and returns what it said, by line.
func run(t *testing.T, kernel, script string) []string {
	t.Helper()
	root, files := build(t, kernel)
	image := initramfs.New(root.Path("bin/busybox"), script)
	for n, f := range files {
		image.HostFile(f, "mod/"+n+".ko")
	}
	initrd := filepath.Join(t.TempDir(), "initrd")
	if err := image.WriteFile(initrd); err != nil {
		t.Fatal(err)
	}
	vmlinuz, err := root.Vmlinuz(kernel)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	// All that is emulated, but for five levels of page tables, and for cmpxchg16b: it leaves garbage in the flags (lab/machine.go).
	out, err := root.Command(ctx, "qemu-system-x86_64",
		"-L", root.Path("usr/share/seabios"), "-L", root.Path("usr/share/qemu"),
		"-accel", "tcg", "-cpu", "max,la57=off,cx16=off", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", vmlinuz, "-initrd", initrd, "-append", debian.Cmdline+" panic=-1").CombinedOutput()
	if err != nil {
		t.Errorf("qemu: %v", err)
	}
	lines := strings.Split(string(out), "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return lines
}

// The lists of functions are those that the modules have undefined.
func TestCalls(t *testing.T) {
	data := []string{ // and variables, and what the kernel's loader resolves to nothing
		"BUG_func", "__preempt_count", "const_pcpu_hot", "current_task", "init_task", "init_user_ns", "page_offset_base", "phys_base", "param_ops_charp", "param_ops_ulong",
		"jiffies", "pcpu_hot", "pv_ops", "victim_came_back", "victim_ground", "victim_ops", "victim_page",
	}
	for _, kernel := range Kernels {
		_, files := build(t, kernel)
		for name, calls := range map[string][]string{"attack": Calls, "dummy": Calls, "victim": VictimCalls} {
			f, err := elf.Open(files[name])
			if err != nil {
				t.Fatal(err)
			}
			all, err := f.Symbols()
			_ = f.Close()
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range all {
				n := s.Name
				if s.Section != elf.SHN_UNDEF || n == "" || slices.Contains(calls, n) || slices.Contains(data, n) || policy.Always(n) || policy.Never(n) {
					continue
				}
				t.Errorf("%s for %s calls %s", name, kernel, n)
			}
			info, err := os.ReadFile(files[name])
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(info), "\x00name="+name+"\x00") {
				t.Errorf("%s for %s is not called so", name, kernel)
			}
		}
	}
}
