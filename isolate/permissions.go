package isolate

import (
	layout "redoubt.dev/redoubt/isolate/view"
	"redoubt.dev/redoubt/kvm"
)

// A Permission is what the two views of a guest allow on one kind of memory: as rwx, with - for what no page of it is allowed, and
// none at all for pages that a view does not have.
type Permission struct {
	What   string `json:"what"`             // kernel code, kernel data, module code, module data
	From   uint64 `json:"from,omitempty"`   // of the module's: where it begins, and ends
	To     uint64 `json:"to,omitempty"`     //
	Pages  int    `json:"pages"`            // of the kernel's: how many of them the module's view has; of the module's: all
	Kernel string `json:"kernel"`           // the view in which the kernel runs
	Module string `json:"module"`           // the view in which the module runs; of several vCPUs' what any of them allows
	Judged bool   `json:"judged,omitempty"` // writes are judged, one by one
}

// rights are what a view allows on pages.
type rights struct{ read, write, execute bool }

func (r rights) String() string {
	out := []byte("---")
	for n, on := range []bool{r.read, r.write, r.execute} {
		if on {
			out[n] = "rwx"[n]
		}
	}
	return string(out)
}

func (r *rights) add(o rights) {
	r.read, r.write, r.execute = r.read || o.read, r.write || o.write, r.execute || o.execute
}

// permissions are read from the slots and the tables of both views, as they are now.
func (i *Isolation) permissions(m *module) []Permission {
	var all []Permission
	for _, r := range m.regions {
		if r.code.to > r.code.from {
			all = append(all, i.permission(m, "module code", span{page(r.code.from), page(r.code.to + pageSize - 1)}))
		}
		if data := (span{page(max(r.from, r.code.to) + pageSize - 1), page(r.to + pageSize - 1)}); data.from < data.to {
			all = append(all, i.permission(m, "module data", data))
		}
	}
	code, data := Permission{What: "kernel code", Judged: true}, Permission{What: "kernel data", Judged: true}
	var codeK, codeM, dataK, dataM rights
	for _, v := range m.views {
		if v == nil {
			continue
		}
		for gpa, at := range v.seen {
			if at>>63 == 0 { // of a process
				continue
			}
			at = i.home(at)
			if _, has := v.slots[gpa]; !has || m.has(at) || i.foreign(v, at) != nil || m.objects.whole(page(at)) {
				continue
			}
			if i.kernel.text.has(at) {
				code.Pages++
				codeK.add(i.inKernel(at))
				codeM.add(v.inView(gpa))
			} else {
				data.Pages++
				dataK.add(i.inKernel(at))
				dataM.add(v.inView(gpa))
			}
		}
	}
	if code.Pages == 0 { // the kernel's own rights are told nevertheless
		codeK = i.inKernel(i.kernel.text.from)
	}
	code.Kernel, code.Module, data.Kernel, data.Module = codeK.String(), codeM.String(), dataK.String(), dataM.String()
	return append(all, code, data)
}

// permission is that of a part of the module.
func (i *Isolation) permission(m *module, what string, s span) Permission {
	p := Permission{What: what, From: s.from, To: s.to}
	var k, own rights
	for at := s.from; at < s.to; at += pageSize {
		p.Pages++
		k.add(i.inKernel(at))
		g, ok := i.mapped(at)
		for _, v := range m.views {
			if v != nil && ok {
				own.add(v.inView(page(g.Physical + at - g.Virtual)))
			}
		}
	}
	p.Kernel, p.Module = k.String(), own.String()
	return p
}

// inKernel is what the kernel's own view allows: nothing of what is in none of its slots.
func (i *Isolation) inKernel(at uint64) rights {
	m, ok := i.mapped(at)
	if !ok || i.text[page(at)] != nil {
		return rights{}
	}
	return rights{true, m.Writable, m.Executable}
}

// inView is what a module's view allows on a page that it has.
func (v *view) inView(gpa uint64) rights {
	g, has := v.slots[gpa]
	at, seen := v.seen[gpa]
	if !has || !seen {
		return rights{}
	}
	r, ok := v.layout.Rights(at)
	return rights{ok, ok && r&layout.Write != 0 && g.flags&kvm.ReadOnly == 0, ok && r&layout.Execute != 0}
}
