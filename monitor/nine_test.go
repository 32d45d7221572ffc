package monitor

import (
	"strings"
	"testing"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/attack"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
)

// A module with 34,672 bytes of code gets its nine pages, which the kernel's view no longer has; and is called and calls.
func TestFenceNinePages(t *testing.T) {
	lab.NeedsKVM(t)
	built, err := attack.Build(t.Context(), cache(t), debian.Usual)
	if err != nil {
		t.Fatal(err)
	}
	m := isolate.Modules{Default: isolate.Isolate, Mode: policy.Learn}
	said, r := scripts{
		modules: &m, files: map[string]string{"mod/nine.ko": built["nine"]},
		script: "insmod /mod/nine.ko; echo \"CHECK nine $(dmesg | grep -c 'NINE 9$')\"; sleep 1; echo LIVES\n", // its first function's page goes later
	}.run(t)
	a := r.Modules["nine"]
	if a == nil || said["nine"] != "1" || a.Entries["init_module"] != 1 || a.Calls["_printk"] != 1 {
		t.Fatalf("%v, %+v", said, a)
	}
	want := map[string]isolate.Permission{
		"module code": {Kernel: "---", Module: "r-x", Pages: 9},
		"kernel code": {Kernel: "r-x", Module: "---", Judged: true},
	}
	seen := 0
	for _, p := range a.Permissions {
		t.Logf("%-12s %3d pages: kernel %s, module %s", p.What, p.Pages, p.Kernel, p.Module)
		if w, ok := want[p.What]; ok {
			if seen++; p.Kernel != w.Kernel || p.Module != w.Module || p.Pages != w.Pages {
				t.Errorf("%+v, want %+v", p, w)
			}
		}
		if p.What == "kernel data" && strings.ContainsAny(p.Module, "wx") || p.What == "module data" && strings.Contains(p.Module, "x") {
			t.Errorf("%+v", p)
		}
	}
	if seen != len(want) {
		t.Errorf("%d rows of %d", seen, len(want))
	}
}
