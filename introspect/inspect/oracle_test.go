package inspect

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"testing"

	list "redoubt.dev/redoubt/attest/ima"
	"redoubt.dev/redoubt/introspect/integrity"
	"redoubt.dev/redoubt/introspect/introspecttest"
	"redoubt.dev/redoubt/introspect/kernel"
	"redoubt.dev/redoubt/introspect/memory"
	"redoubt.dev/redoubt/introspect/modules"
	"redoubt.dev/redoubt/introspect/symbols"
	"redoubt.dev/redoubt/introspect/tasks"
)

// script has the guest say of itself what is to be found.
const script = `
echo u:x:7:7::/:/bin/sh >/etc/passwd
start-stop-daemon -S -b -c 7 -x /bin/sleep -- 99999
echo "measure func=BPRM_CHECK
measure func=FILE_CHECK mask=MAY_READ fowner=7" >/sys/kernel/security/ima/policy
echo x >/open; chown 7 /open; exec 8>>/open; cat /open >/dev/null; exec 8>&-
for n in 1 2 3 4 5 6 7 8; do echo "#!/bin/sh
echo $n" >/tool$n; chmod +x /tool$n; /tool$n >/dev/null; done
echo "== kernel"; cat /proc/version; grep -w -e _text -e init_task -e sys_call_table /proc/kallsyms
echo "== modules"; cat /proc/modules
echo "== ima"; base64 -w0 /sys/kernel/security/ima/binary_runtime_measurements; echo
echo "== tasks"
for p in /proc/[0-9]*; do
  read -r stat <$p/stat || continue
  while read -r a b c; do if [ $a = Uid: ]; then uid=$b; fi; done <$p/status
  echo "$uid $stat"
done
echo "== end"`

// TestOracle: of a running guest is found what it says of itself, with the kernels before and after 6.4; then its memory is
// changed as the guest could.
func TestOracle(t *testing.T) {
	for _, name := range []string{"6.1-cloud", "6.12-cloud"} {
		t.Run(name, func(t *testing.T) {
			g := introspecttest.Boot(t, name, "", script, "dummy", "virtio_blk")
			k := g.Find(t)
			t.Logf("the kernel lies at %#x and is seen %#x above where it was linked for", k.Physical, k.Offset)
			w := world{g, k}
			for _, part := range []struct {
				name string
				run  func(*testing.T, world)
			}{
				{"kernel", findsKernel},
				{"modules", findsModules},
				{"tasks", findsTasks},
				{"ima", findsIMA},
				{"integrity", findsIntegrity},
				{"hidden module", findsHidden},
				{"damaged lists", survivesDamage},
				{"dump", readsDump},
			} {
				t.Run(part.name, func(t *testing.T) { part.run(t, w) })
			}
		})
	}
}

// A world is a guest and its kernel.
type world struct {
	g *introspecttest.Guest
	k *kernel.Kernel
}

// ask asks as the inspector does, with a cache and reading the image anew.
func (w world) ask(t *testing.T, what ...string) *Answer {
	t.Helper()
	p, err := memory.New(w.g.Memory, introspecttest.Memory, memory.QEMU)
	if err != nil {
		t.Fatal(err)
	}
	a, _, err := Ask(Guest{p, func() ([]byte, error) { return w.g.Packed, nil }}, Question{What: what, Layout: w.g.Layout})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// write changes memory at an address of the guest's, and gives what was there back when the test ends.
func (w world) write(t *testing.T, at uint64, b []byte) {
	t.Helper()
	page, err := w.k.Space.Walk(at)
	if err != nil {
		t.Fatal(err)
	}
	place, was := int64(page.Physical+at-page.Virtual), make([]byte, len(b))
	if _, err := w.g.Memory.ReadAt(was, place); err != nil {
		t.Fatal(err)
	}
	if _, err := w.g.Memory.WriteAt(b, place); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := w.g.Memory.WriteAt(was, place); err != nil {
			t.Error(err)
		}
	})
}

func (w world) word(t *testing.T, at uint64) uint64 {
	t.Helper()
	v, err := w.k.Word(at)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func (w world) address(t *testing.T, symbol string) uint64 {
	t.Helper()
	s, ok := w.g.Table.Lookup(symbol)
	if !ok {
		t.Fatal("no " + symbol)
	}
	return s.Address + w.k.Offset
}

func (w world) offset(t *testing.T, structure, member string) uint64 {
	t.Helper()
	f, err := w.k.Field(structure, member)
	if err != nil {
		t.Fatal(err)
	}
	return f.Offset
}

func le64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// findsKernel: it is where the guest itself says that it is, and is not where nothing is.
func findsKernel(t *testing.T, w world) {
	g, k := w.g, w.k
	said := g.Said["kernel"]
	if len(said) != 4 {
		t.Fatalf("the guest said %q", said)
	}
	for _, l := range said[1:] {
		f := strings.Fields(l)
		want, err := strconv.ParseUint(f[0], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := k.Address(f[2]); err != nil || got != want {
			t.Errorf("%s at %#x, %v, the guest says %#x", f[2], got, err, want)
		}
	}
	at, banner := w.address(t, "linux_banner"), said[0]
	got := make([]byte, len(banner))
	if _, err := k.ReadAt(got, int64(at)); err != nil || string(got) != banner {
		t.Errorf("%q, %v, the guest says %q", got, err, banner)
	}
	if _, err := k.Address("no such symbol"); err == nil {
		t.Error("a symbol that is not there has an address")
	}
	if _, err := kernel.Find(io.NewSectionReader(g.Memory, 0, introspecttest.Memory), k.Physical, g.Layout); !errors.Is(err, kernel.ErrNotFound) {
		t.Errorf("below it: %v", err)
	}
	// Who has the words alone imitates the kernel in vain.
	fake := make([]byte, 64<<20)
	copy(fake[32<<20+at-w.address(t, "_text"):], banner+"\n\x00")
	if _, err := kernel.Find(bytes.NewReader(fake), uint64(len(fake)), g.Layout); !errors.Is(err, kernel.ErrNotFound) {
		t.Errorf("an imitation: %v", err)
	}
	// Its symbols are in its memory, too, moved with it.
	end, ok := g.Table.Lookup("__end_rodata")
	text := w.address(t, "_text")
	if !ok {
		t.Fatal("no __end_rodata")
	}
	inside := make([]byte, end.Address+k.Offset-text)
	if _, err := k.ReadAt(inside, int64(text)); err != nil {
		t.Fatal(err)
	}
	table, err := symbols.Find(inside)
	if err != nil {
		t.Fatal(err)
	}
	if s, ok := table.Lookup("init_task"); !ok || s.Address != w.address(t, "init_task") || table.Len() != g.Table.Len() {
		t.Errorf("in memory: %+v, %v, %d symbols, the image has %d", s, ok, table.Len(), g.Table.Len())
	}
}

// findsModules: they are those that the guest lists, at their places, and nothing else is executable.
func findsModules(t *testing.T, w world) {
	f := w.ask(t, Modules).Modules
	var got, want []string
	for _, m := range f.Modules {
		got = append(got, fmt.Sprintf("%s %#016x", m.Name, m.Text))
		if p, err := w.k.Space.Walk(m.Text); err != nil || !p.Executable || m.Size == 0 {
			t.Errorf("%+v: its code is at %+v, %v", m, p, err)
		}
		if m.State != "live" || m.Signed == nil || !*m.Signed {
			t.Errorf("%+v", m)
		}
	}
	for _, l := range w.g.Said["modules"] { // name, size, users, who they are, state, address
		f := strings.Fields(l)
		want = append(want, f[0]+" "+f[5])
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") || len(got) < 2 || f.Damage != "" {
		t.Errorf("found\n%s\n%s\nthe guest says\n%s", strings.Join(got, "\n"), f.Damage, strings.Join(want, "\n"))
	}
	for _, c := range f.Unlisted {
		if c.Holds != modules.BPF {
			t.Errorf("executable and of no module: %+v", c)
		}
	}
}

// findsTasks: every program's process is found as /proc shows it; threads of the kernel come and go.
func findsTasks(t *testing.T, w world) {
	f := w.ask(t, Tasks).Tasks
	if f.Damage != "" {
		t.Fatal(f.Damage)
	}
	got := map[int]tasks.Task{}
	programs := 0
	for _, p := range f.Tasks {
		got[int(p.PID)] = p
		if !p.Kernel {
			programs++
		}
	}
	found, said, users := 0, 0, 0
	for _, l := range w.g.Said["tasks"] { // uid, pid (comm) state ppid …
		head, rest, ok := strings.Cut(l, ")")
		ids, name, named := strings.Cut(head, " (")
		f, first := strings.Fields(rest), strings.Fields(ids)
		if !ok || !named || len(f) < 7 || len(first) != 2 {
			t.Fatalf("the guest said %q", l)
		}
		uid, _ := strconv.Atoi(first[0])
		pid, _ := strconv.Atoi(first[1])
		parent, _ := strconv.Atoi(f[1])
		flags, _ := strconv.Atoi(f[6])
		p, ok := got[pid]
		inKernel := flags&0x200000 != 0
		if inKernel {
			said++
			if ok && strings.HasPrefix(name, p.Name) && p.Kernel && int(p.Parent) == parent && p.UID == 0 {
				found++
			}
			continue
		}
		programs--
		if uid != 0 {
			users++
		}
		if !ok || p.Name != name || int(p.Parent) != parent || int(p.UID) != uid || p.Kernel {
			t.Errorf("%+v, the guest says %q", p, l)
		}
	}
	if said < 20 || found < said*9/10 || users != 1 {
		t.Errorf("%d of %d threads of the kernel, %d processes of users", found, said, users)
	}
	if programs != 1 { // that which it sleeps in by now
		t.Errorf("%d processes more than the guest says", programs)
	}
}

// findsIMA: the list is byte for byte the kernel's own.
func findsIMA(t *testing.T, w world) {
	want, err := base64.StdEncoding.DecodeString(w.g.Said["ima"][0])
	if err != nil {
		t.Fatal(err)
	}
	l := w.ask(t, IMA).IMA
	if l.Error != "" || l.Missing != "" || !bytes.HasPrefix(l.List, want) || len(want) < 1000 {
		t.Fatalf("%d bytes, the guest says %d: %s%s", len(l.List), len(want), l.Error, l.Missing)
	}
	all, err := list.Parse(l.List)
	if err != nil || len(all) < 10 {
		t.Fatal(len(all), err)
	}
	tools, violations := 0, 0
	for i := range all {
		f, err := all[i].File()
		if err != nil || !all[i].Sound() {
			t.Errorf("entry %d: %+v, %v", i, f, err)
		}
		if all[i].Violation() != (f.Path == "/open" && violations == 0) {
			t.Errorf("entry %d, %v: a violation: %v", i, f, all[i].Violation())
		}
		if all[i].Violation() {
			violations++
		}
		if strings.HasPrefix(f.Path, "/tool") {
			tools++
		}
	}
	if first, _ := all[0].File(); !first.Aggregate() || tools != 8 || violations != 1 {
		t.Errorf("the first is %v; %d programs, %d violations", first, tools, violations)
	}
	// Only what is new.
	p, err := memory.New(w.g.Memory, introspecttest.Memory, memory.QEMU)
	if err != nil {
		t.Fatal(err)
	}
	for after, wantAfter := range map[int]int{5: 5, len(all): len(all), len(all) + 1: 0} {
		a, _, err := Ask(Guest{p, nil}, Question{What: []string{IMA}, After: after, Layout: w.g.Layout})
		if err != nil || a.IMA.After != wantAfter {
			t.Fatalf("after %d: %+v, %v", after, a.IMA, err)
		}
		part, err := list.Parse(a.IMA.List)
		if err != nil || len(part) != len(all)-wantAfter || len(part) > 0 && part[0].SHA1 != all[wantAfter].SHA1 {
			t.Errorf("after %d: %d entries, %v", after, len(part), err)
		}
	}
}

// findsIntegrity: a kernel that nobody changed is its image's; each change is found at its place.
func findsIntegrity(t *testing.T, w world) {
	ask := func() *KernelFacts { return w.ask(t, Kernel).Kernel }
	f := ask()
	if len(f.Damage) > 0 || f.SystemCalls == nil || f.Interrupts == nil || f.Text == nil {
		t.Fatalf("%+v", f)
	}
	t.Logf("system calls %d, gates %d; text: %d bytes, %d compared, %d checked, %d skipped, sites %v", f.SystemCalls.Entries, f.Interrupts.Entries,
		f.Text.Bytes, f.Text.Compared, f.Text.Checked, f.Text.Skipped, f.Text.Sites)
	if len(f.SystemCalls.Hooks) > 0 || f.SystemCalls.Entries < 300 || len(f.Interrupts.Hooks) > 0 || f.Interrupts.Entries < 20 {
		t.Errorf("%+v, %+v", f.SystemCalls, f.Interrupts)
	}
	x := f.Text
	if len(x.Differences) > 0 || x.Image != x.Memory || x.Compared+x.Checked+x.Skipped != x.Bytes || x.Skipped > x.Bytes/20 {
		t.Errorf("%+v", x)
	}
	if f.Virtual != w.address(t, "_text") || f.Version != w.g.Said["kernel"][0] {
		t.Errorf("%+v", f)
	}
	evil := w.address(t, "commit_creds") + 0x10
	t.Run("system call", func(t *testing.T) {
		w.write(t, w.address(t, "sys_call_table")+8*59, le64(evil))
		h := ask().SystemCalls.Hooks
		if len(h) != 1 || h[0].Entry != 59 || h[0].Target != evil || h[0].Symbol != "commit_creds+0x10" || !strings.Contains(h[0].Want, "execve") {
			t.Errorf("%+v", h)
		}
	})
	t.Run("gate", func(t *testing.T) {
		b := make([]byte, 8)
		at := w.address(t, "idt_table") + 16*14
		if _, err := w.k.ReadAt(b, int64(at)); err != nil {
			t.Fatal(err)
		}
		binary.LittleEndian.PutUint16(b, uint16(evil))
		binary.LittleEndian.PutUint16(b[6:], uint16(evil>>16))
		w.write(t, at, b)
		h := ask().Interrupts.Hooks
		if len(h) != 1 || h[0].Entry != 14 || h[0].Target != evil {
			t.Errorf("%+v", h)
		}
	})
	// What is compared, and each kind of place that is checked: a byte between them, a call where ftrace has a no-op.
	t.Run("text", func(t *testing.T) {
		at := w.address(t, "commit_creds")
		site := uint64(0)
		code := make([]byte, 64)
		if _, err := w.k.ReadAt(code, int64(at)); err != nil {
			t.Fatal(err)
		}
		if i := bytes.Index(code, []byte{0x0f, 0x1f, 0x44, 0, 0}); i >= 0 {
			site = at + uint64(i)
		} else {
			t.Fatalf("no site of ftrace in % x", code)
		}
		w.write(t, site, []byte{0xe8, 1, 2, 3, 4})
		w.write(t, site+5, []byte{code[site-at+5] ^ 0xff})
		x := ask().Text
		if len(x.Differences) != 2 || x.Differences[0].Kind != integrity.Tracing || x.Differences[1].Kind != "" || x.Differences[1].Length != 1 ||
			x.Image == x.Memory || !strings.HasPrefix(x.Differences[0].Symbol, "commit_creds") {
			t.Errorf("%+v", x)
		}
	})
}

// findsHidden: a module that takes itself out of the list is not in it, and its code is found where nobody's is.
func findsHidden(t *testing.T, w world) {
	all, err := modules.List(w.k)
	if err != nil {
		t.Fatal(err)
	}
	m := all[0]
	link := m.Address + w.offset(t, "module", "list.next")
	next, prev := w.word(t, link), w.word(t, link+8)
	w.write(t, prev, le64(next))
	w.write(t, next+8, le64(prev))
	f := w.ask(t, Modules).Modules
	if f.Damage != "" || slices.ContainsFunc(f.Modules, func(x modules.Module) bool { return x.Name == m.Name }) {
		t.Errorf("%+v", f)
	}
	hidden := slices.DeleteFunc(f.Unlisted, func(c modules.Code) bool { return c.Holds != "" })
	if len(hidden) != 1 || m.Text < hidden[0].Address || m.Text+m.Size > hidden[0].Address+hidden[0].Size {
		t.Errorf("%+v is not in %+v", m, hidden)
	}
}

// survivesDamage: a list that the guest damages costs its own answer: what is before the damage is told, and all other questions
// are answered.
func survivesDamage(t *testing.T, w world) {
	all, err := modules.List(w.k)
	if err != nil {
		t.Fatal(err)
	}
	module := all[0].Address + w.offset(t, "module", "list.next")
	task := w.word(t, w.address(t, "init_task")+w.offset(t, "task_struct", "tasks.next"))
	measured := w.word(t, w.address(t, "ima_measurements"))
	entry := w.word(t, measured-w.offset(t, "ima_queue_entry", "later.next")+w.offset(t, "ima_queue_entry", "entry"))
	data := entry + w.offset(t, "ima_template_entry", "template_data")
	desc := w.word(t, entry+w.offset(t, "ima_template_entry", "template_desc"))
	damage := func(t *testing.T, what string) {
		t.Helper()
		a := w.ask(t, Modules, Tasks, IMA)
		got := map[string]string{Modules: a.Modules.Damage, Tasks: a.Tasks.Damage, IMA: a.IMA.Error}
		for question, d := range got {
			if (d != "") != (question == what) {
				t.Errorf("%s: %q", question, d)
			}
		}
		if a.Sound() {
			t.Error("sound")
		}
		t.Logf("%.160s", got[what])
	}
	for what, link := range map[string]uint64{Modules: module, Tasks: task, IMA: measured} {
		for name, to := range map[string]uint64{
			"to itself": link, "to nothing": 0, "beyond the addresses": 1 << 60, "to what is not mapped": 1<<64 - 1<<46,
		} {
			t.Run(what+" "+name, func(t *testing.T) {
				w.write(t, link, le64(to))
				damage(t, what)
			})
		}
	}
	huge := []byte{0xff, 0xff, 0xff, 0xff}
	for name, at := range map[string]uint64{
		"a field's length":        data + w.offset(t, "ima_field_data", "len"),
		"a template's fields":     desc + w.offset(t, "ima_template_desc", "num_fields"),
		"the number of SHA-1":     w.address(t, "ima_sha1_idx"),
		"the length of all":       entry + w.offset(t, "ima_template_entry", "template_data_len"),
		"the place of a field":    data + w.offset(t, "ima_field_data", "data") + 4,
		"the place of a template": entry + w.offset(t, "ima_template_entry", "template_desc") + 3,
	} {
		t.Run(name, func(t *testing.T) {
			if strings.HasPrefix(name, "the place") {
				w.write(t, at, []byte{0x12, 0x34, 0x56, 0x78})
			} else {
				w.write(t, at, huge)
			}
			damage(t, IMA)
		})
	}
}
