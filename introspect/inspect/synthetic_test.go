package inspect

import (
	"encoding/binary"
	"strings"
	"testing"

	list "redoubt.dev/redoubt/attest/ima"
	"redoubt.dev/redoubt/introspect/introspecttest"
	"redoubt.dev/redoubt/introspect/kernel"
	"redoubt.dev/redoubt/introspect/modules"
	"redoubt.dev/redoubt/introspect/tasks"
	"redoubt.dev/redoubt/introspect/types"
)

// Where the heads of lists are in what a test fills.
const (
	modulesHead = 0x00
	packsHead   = 0x10
	imaHead     = 0x20
	sha1Index   = 0x30
	initTask    = 0x40 // 0x40 bytes
	freeFrom    = 0x100
)

func fields(old bool) map[string]types.Field {
	f := map[string]types.Field{
		"module.list.next": {Offset: 8, Size: 8}, "module.name": {Offset: 24, Size: 16}, "module.state": {Size: 4}, "module.sig_ok": {Offset: 40, Size: 1},
		"bpf_prog_pack.list.next": {Size: 8}, "bpf_prog_pack.ptr": {Offset: 16, Size: 8},
		"task_struct.tasks.next": {Size: 8}, "task_struct.tgid": {Offset: 16, Size: 4}, "task_struct.flags": {Offset: 20, Size: 4},
		"task_struct.exit_state": {Offset: 24, Size: 4}, "task_struct.comm": {Offset: 28, Size: 12}, "task_struct.real_parent": {Offset: 40, Size: 8},
		"task_struct.cred": {Offset: 48, Size: 8}, "cred.uid.val": {Size: 4},
		"ima_queue_entry.later.next": {Size: 8}, "ima_queue_entry.entry": {Offset: 16, Size: 8},
		"ima_template_entry.pcr": {Size: 4}, "ima_template_entry.template_data_len": {Offset: 4, Size: 4}, "ima_template_entry.digests": {Offset: 8, Size: 8},
		"ima_template_entry.template_desc": {Offset: 16, Size: 8}, "ima_template_entry.template_data": {Offset: 24},
		"ima_template_desc.name": {Size: 8}, "ima_template_desc.num_fields": {Offset: 8, Size: 4},
		"ima_field_data.data": {Size: 8}, "ima_field_data.len": {Offset: 8, Size: 4}, "ima_field_data": {Size: 16},
		"tpm_digest.digest": {Offset: 2, Size: 64}, "tpm_digest": {Size: 66},
	}
	if old { // before 6.4
		f["module.core_layout.base"], f["module.core_layout.text_size"] = types.Field{Offset: 48, Size: 8}, types.Field{Offset: 56, Size: 4}
		f["module.init_layout.base"], f["module.init_layout.text_size"] = types.Field{Offset: 64, Size: 8}, types.Field{Offset: 72, Size: 4}
	} else {
		f["module.mem"] = types.Field{Offset: 48, Size: 7 * 16}
		f["module_memory"], f["module_memory.base"], f["module_memory.size"] = types.Field{Size: 16}, types.Field{Size: 8}, types.Field{Offset: 8, Size: 4}
	}
	return f
}

func synthetic(t testing.TB, levels int, old bool) *introspecttest.Synthetic {
	return introspecttest.NewSynthetic(t, levels, map[string]uint64{
		"modules": modulesHead, "pack_list": packsHead, "ima_measurements": imaHead, "ima_sha1_idx": sha1Index, "init_task": initTask,
	}, fields(old))
}

// filled is lists of two modules, two processes and two measurements.
func filled(old bool) []byte {
	le := binary.LittleEndian
	b := make([]byte, freeFrom)
	at := func(n int) uint64 { return introspecttest.Data + uint64(n) }
	alloc := func(n int) int { b = append(b, make([]byte, n)...); return len(b) - n }
	put := func(place int, v uint64) { le.PutUint64(b[place:], v) }
	chain := func(head int, links ...int) {
		for _, l := range links {
			put(head, at(l))
			head = l
		}
	}
	var links []int
	for i, name := range []string{"one", "two"} {
		m := alloc(256)
		copy(b[m+24:], name)
		b[m+40] = byte(i) // signed
		put(m+48, 0xffffffffc0000000+uint64(i)<<16)
		le.PutUint32(b[m+56:], 0x1234)
		if init := m + 48 + 4*16; !old && i == 1 { // MOD_INIT_TEXT
			put(init, 0xffffffffc0100000)
			le.PutUint32(b[init+8:], 0x1000)
		}
		links = append(links, m+8)
	}
	chain(modulesHead, links...)
	put(links[1], at(modulesHead))
	put(packsHead, at(packsHead))

	links = nil
	cred := alloc(8)
	b[cred] = 7
	for i, name := range []string{"init", ""} {
		p := alloc(64)
		b[p+16] = byte(i + 1)
		copy(b[p+28:], name)
		put(p+40, at(initTask))
		put(p+48, at(cred))
		links = append(links, p)
	}
	chain(initTask, links...)
	put(links[1], at(initTask))

	links = nil
	name := alloc(8)
	copy(b[name:], "ima-ng")
	desc := alloc(16)
	put(desc, at(name))
	b[desc+8] = 2
	for _, path := range []string{"boot_aggregate\x00", "/bin/sh\x00"} {
		digest := "sha1:\x00" + strings.Repeat("d", 20)
		d, p, sums := alloc(len(digest)), alloc(len(path)), alloc(66)
		copy(b[d:], digest)
		copy(b[p:], path)
		copy(b[sums+2:], strings.Repeat("s", 20))
		e := alloc(24 + 2*16)
		b[e] = list.PCR
		le.PutUint32(b[e+4:], uint32(8+len(digest)+len(path)))
		put(e+8, at(sums))
		put(e+16, at(desc))
		put(e+24, at(d))
		b[e+32] = byte(len(digest))
		put(e+40, at(p))
		b[e+48] = byte(len(path))
		q := alloc(24)
		put(q+16, at(e))
		links = append(links, q)
	}
	chain(imaHead, links...)
	put(links[1], at(imaHead))
	return b
}

// TestSynthetic: both layouts of struct module, and tables of 4 and 5 levels.
func TestSynthetic(t *testing.T) {
	for _, levels := range []int{4, 5} {
		for _, old := range []bool{true, false} {
			k := synthetic(t, levels, old).Kernel(filled(old))
			m, err := modules.List(k)
			if err != nil || len(m) != 2 || m[0].Name != "one" || m[1].Text != 0xffffffffc0010000 || m[1].Size != 0x1234 || *m[0].Signed || !*m[1].Signed {
				t.Errorf("%+v, %v", m, err)
			}
			p, err := tasks.List(k)
			if err != nil || len(p) != 2 || p[0].Name != "init" || p[1].PID != 2 || p[1].UID != 7 || p[1].Name != "" {
				t.Errorf("%+v, %v", p, err)
			}
			l := imaList(k, 0)
			all, err := list.Parse(l.List)
			if err != nil || l.Error != "" || len(all) != 2 {
				t.Fatalf("%+v, %v", l, err)
			}
			if f, err := all[1].File(); err != nil || f.Path != "/bin/sh" || f.Algorithm != "sha1" || all[1].Sound() {
				t.Errorf("%+v, %v", f, err)
			}
		}
	}
	// What a kernel lacks is told apart from what the guest damaged.
	s := synthetic(t, 4, true)
	delete(s.Layout.Symbols, "ima_measurements")
	if l := imaList(s.Kernel(nil), 0); l.Missing == "" || l.Error != "" {
		t.Errorf("%+v", l)
	}
	s.Layout.Fields, s.Layout.NoTypes = nil, "no types"
	if f := moduleFacts(s.Kernel(nil)); !strings.HasPrefix(f.Damage, "no types") {
		t.Errorf("%+v", f)
	}
}

// TestAnew: what the guest puts into a page that was read already is read anew; what is damaged stays so.
func TestAnew(t *testing.T) {
	good := filled(true)
	damaged := append([]byte(nil), good...)
	copy(damaged[freeFrom+256+24:], make([]byte, 16)) // the second module's name
	s := synthetic(t, 4, true)
	k := s.Kernel(damaged)
	times := 0
	k.Anew = func() { times++ }
	if all, err := modules.List(k); err == nil || len(all) != 1 || times != 1 {
		t.Errorf("%+v, %v, read anew %d times", all, err, times)
	}
	k.Anew = func() { s.Kernel(good) }
	if all, err := modules.List(k); err != nil || len(all) != 2 {
		t.Errorf("%+v, %v", all, err)
	}
}

// FuzzLists: whatever the guest's memory holds, every list ends, within its bounds, and what is told of it can be read.
func FuzzLists(f *testing.F) {
	kernels := map[bool]*introspecttest.Synthetic{}
	for _, old := range []bool{true, false} {
		kernels[old] = synthetic(f, 4, old)
		f.Add(old, filled(old))
	}
	f.Fuzz(func(t *testing.T, old bool, b []byte) {
		if len(b) > 1<<16 {
			return
		}
		check(t, kernels[old].Kernel(b))
	})
}

func check(t *testing.T, k *kernel.Kernel) {
	f := moduleFacts(k)
	if len(f.Modules) > modules.Most {
		t.Errorf("%d modules", len(f.Modules))
	}
	if all, err := tasks.List(k); len(all) > tasks.Most {
		t.Errorf("%d processes, %v", len(all), err)
	}
	l := imaList(k, 1)
	if _, err := list.Parse(l.List); err != nil {
		t.Errorf("%v of %+v", err, l)
	}
	a := &Answer{Modules: f, IMA: l}
	if _, _, err := a.Encode(); err != nil {
		t.Error(err)
	}
}
