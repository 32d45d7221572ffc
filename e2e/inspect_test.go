package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/introspect/inspect"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/services"
)

// inspected: what is read from a running guest's memory is what the guest said of itself (what=wait, measured), its
// IMA list is held against PCR 10 and an allowlist, and a dump of it says the same without Redoubt.
func inspected(h *host, console, policy string) {
	h.t.Helper()
	var modules []string
	tasks := map[int]string{}
	var measured []byte
	for l := range strings.Lines(console) {
		word, rest, _ := strings.Cut(strings.TrimSpace(l), " ")
		f := strings.Fields(rest)
		switch {
		case word == "MODULE" && len(f) >= 6:
			modules = append(modules, f[0]+" "+f[5])
		case word == "TASK" && len(f) > 6:
			pid, _ := strconv.Atoi(f[0])
			tasks[pid] = strings.Trim(f[1], "()")
		case word == "IMA":
			measured, _ = base64.StdEncoding.DecodeString(rest)
		}
	}
	if len(modules) < 3 || len(tasks) < 20 || len(measured) < 500 {
		h.t.Fatalf("the guest says too little: %d modules, %d processes, %d bytes measured", len(modules), len(tasks), len(measured))
	}
	ask := func(args ...string) (a inspect.Answer) {
		h.t.Helper()
		if err := json.Unmarshal([]byte(h.must(append([]string{"inspect", "--json"}, args...)...)), &a); err != nil {
			h.t.Fatal(err)
		}
		return a
	}
	list := h.path("measurements")
	a := ask("guest", "modules", "kernel", "tasks", "ima", "--out", list)
	same := func(what string, a inspect.Answer) {
		h.t.Helper()
		var got []string
		for _, m := range a.Modules.Modules {
			got = append(got, fmt.Sprintf("%s %#016x", m.Name, m.Text))
		}
		if strings.Join(got, "\n") != strings.Join(modules, "\n") {
			h.t.Errorf("%s: modules\n%s\nthe guest says\n%s", what, strings.Join(got, "\n"), strings.Join(modules, "\n"))
		}
	}
	same("running", a)
	found := 0
	for _, p := range a.Tasks.Tasks {
		if name, ok := tasks[int(p.PID)]; ok && strings.HasPrefix(name, p.Name) {
			found++
		}
	}
	if found < len(tasks)*9/10 {
		h.t.Errorf("%d of the guest's %d processes are found", found, len(tasks))
	}
	if k := a.Kernel; k.Text == nil || k.SystemCalls == nil || k.Interrupts == nil || k.Text.Image != k.Text.Memory || k.Text.Compared < 8<<20 {
		h.t.Errorf("%+v", k)
	}
	if b, err := os.ReadFile(list); err != nil || !bytes.HasPrefix(b, measured) || !bytes.Equal(b, a.IMA.List) {
		h.t.Errorf("the IMA list, %d bytes, does not begin with the guest's %d: %v", len(b), len(measured), err)
	}
	h.fails(2, "cannot be asked", "inspect", "guest", "secrets")
	h.fails(2, "--memory and --kernel together", "inspect", "--memory", list, "ima")
	h.fails(1, `"nobody": no such guest`, "inspect", "nobody", "ima")
	for r, err := range audit.Records(h.path("state", audit.Dir)) {
		if err != nil {
			h.t.Fatal(err)
		}
		if r.Act == "inspect" && r.Object == "guest" && r.Outcome == audit.Done {
			found = -1
		}
	}
	if found != -1 || h.instances("guest", services.Inspector) == 0 {
		h.t.Error("that the guest was inspected is not in the audit log")
	}

	// What was measured so far is allowed; then one of it is not.
	allow, known := h.path("allow"), h.path("known")
	h.must("attest", "guest", "--save-ima-allow", allow)
	out := h.must("attest", "guest", "--policy", policy, "--ima-allow", allow, "--ima-known", known)
	if !strings.Contains(out, "all are allowed") || strings.Contains(out, "new") || !strings.HasSuffix(out, "trusted\n") {
		h.t.Errorf("%s", out)
	}
	out = h.must("attest", "guest", "--policy", policy, "--ima-allow", allow, "--ima-known", known)
	if !strings.Contains(out, "of them new") {
		h.t.Errorf("the second time not only what is new was read: %s", out)
	}
	b, err := os.ReadFile(allow)
	if err != nil {
		h.t.Fatal(err)
	}
	var rest []string
	for l := range strings.Lines(string(b)) {
		if !strings.HasSuffix(l, "/bin/tool3\n") {
			rest = append(rest, l)
		}
	}
	if err := os.WriteFile(allow, []byte(strings.Join(rest, "")), 0o600); err != nil {
		h.t.Fatal(err)
	}
	r := h.run("attest", "guest", "--ima-allow", allow, "--ima-known", known)
	if r.status != 1 || !strings.Contains(r.out, "IMA list: entry ") || !strings.Contains(r.out, `"/bin/tool3", sha256:`) {
		h.t.Errorf("a program that is not allowed: exit status %d\n%s%s", r.status, r.out, r.err)
	}

	if os.Getenv(lab.InLab) != "" { // a dump is read without KVM, and there it takes long
		return
	}
	kernel, err := h.cache.Vmlinuz(debian.Usual)
	if err != nil {
		h.t.Fatal(err)
	}
	same("dump", ask("--memory", h.dump(), "--kernel", kernel, "--machine", h.show("guest").Emulator, "modules", "ima"))
}

// dump copies the memory of the guest that runs out of its emulator.
func (h *host) dump() string {
	h.t.Helper()
	for _, m := range h.family() {
		links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", m.pid))
		for _, l := range links {
			to, err := os.Readlink(l)
			if err != nil || m.name != "redoubt-emulato" || !strings.HasPrefix(to, "/memfd:redoubt-guest memory") {
				continue
			}
			b, err := os.ReadFile(l)
			path := h.path("ram")
			if err == nil {
				err = os.WriteFile(path, b, 0o600)
			}
			if err != nil {
				h.t.Fatal(err)
			}
			return path
		}
	}
	h.t.Fatal("no emulator has a guest's memory")
	return ""
}
