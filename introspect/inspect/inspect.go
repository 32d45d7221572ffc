// Package inspect answers questions about a guest from its memory and its kernel's image: the one place where the readers of
// package introspect's parts are put together, for `redoubt-inspector` and for dumps.
//
// Each fact is told with what was found of it: a list that the guest damaged is told up to the damage, and costs no other
// answer.
package inspect

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	list "redoubt.dev/redoubt/attest/ima"
	"redoubt.dev/redoubt/introspect/ima"
	"redoubt.dev/redoubt/introspect/image"
	"redoubt.dev/redoubt/introspect/integrity"
	"redoubt.dev/redoubt/introspect/kernel"
	"redoubt.dev/redoubt/introspect/layout"
	"redoubt.dev/redoubt/introspect/memory"
	"redoubt.dev/redoubt/introspect/modules"
	"redoubt.dev/redoubt/introspect/paging"
	"redoubt.dev/redoubt/introspect/symbols"
	"redoubt.dev/redoubt/introspect/tasks"
)

// What can be asked.
const (
	Modules = "modules"
	Kernel  = "kernel"
	IMA     = "ima"
	Tasks   = "tasks"
)

// All that can be asked.
var All = []string{Modules, Kernel, IMA, Tasks}

// A Question is about one guest.
type Question struct {
	What  []string `json:"what"`
	After int      `json:"after,omitempty"` // entries of the IMA list that are not wanted
	// Layout is the kernel's, where it is known: then only a question for Kernel needs the image.
	Layout *layout.Layout `json:"layout,omitempty"`
}

// Check refuses what cannot be asked.
func (q *Question) Check() error {
	if len(q.What) == 0 || len(q.What) > len(All) || q.After < 0 {
		return fmt.Errorf("ask for 1 to %d of %s", len(All), strings.Join(All, ", "))
	}
	for _, w := range q.What {
		if !slices.Contains(All, w) {
			return fmt.Errorf("%q cannot be asked: ask for %s", w[:min(len(w), 32)], strings.Join(All, ", "))
		}
	}
	if q.Layout != nil {
		return q.Layout.Check()
	}
	return nil
}

// An Answer has what was asked for, and nothing else.
type Answer struct {
	Modules *ModuleFacts `json:"modules,omitempty"`
	Kernel  *KernelFacts `json:"kernel,omitempty"`
	IMA     *list.List   `json:"ima,omitempty"`
	Tasks   *TaskFacts   `json:"tasks,omitempty"`
}

// ModuleFacts are the modules of the kernel's list, and code that is none of theirs.
type ModuleFacts struct {
	Modules  []modules.Module `json:"modules"`
	Unlisted []modules.Code   `json:"unlisted"` // executable, of no module in the list
	Damage   string           `json:"damage,omitempty"`
}

// TaskFacts are the processes of the kernel's list.
type TaskFacts struct {
	Tasks  []tasks.Task `json:"tasks"`
	Damage string       `json:"damage,omitempty"`
}

// KernelFacts say where the kernel is and whether it is its image's.
type KernelFacts struct {
	Version     string           `json:"version"`
	Physical    uint64           `json:"physical"` // where its text begins, in the guest's physical memory
	Virtual     uint64           `json:"virtual"`  // and where the guest sees it
	Offset      uint64           `json:"offset"`   // of that to where it was linked: KASLR's
	Levels      int              `json:"levels"`   // of its page tables
	SystemCalls *integrity.Table `json:"systemCalls,omitempty"`
	Interrupts  *integrity.Table `json:"interrupts,omitempty"`
	Text        *integrity.Text  `json:"text,omitempty"`
	Damage      []string         `json:"damage,omitempty"` // what could not be read, and why
}

// Sound reports whether nothing was found that should not be.
func (a *Answer) Sound() bool {
	table := func(t *integrity.Table) bool { return t == nil || len(t.Hooks) == 0 }
	k := a.Kernel
	return (a.Modules == nil || a.Modules.Damage == "") && (a.Tasks == nil || a.Tasks.Damage == "") && (a.IMA == nil || a.IMA.Error == "") &&
		(k == nil || len(k.Damage) == 0 && table(k.SystemCalls) && table(k.Interrupts) && (k.Text == nil || len(k.Text.Differences) == 0))
}

// A Guest is what is asked about.
type Guest struct {
	Memory *memory.Physical
	Image  func() ([]byte, error) // its kernel's, as it was booted; called once, if at all
}

// ErrImage says that the kernel's image cannot be read.
var ErrImage = errors.New("the kernel's image cannot be read")

// Ask answers a question, and gives the kernel's layout for the next one. The error says that nothing could be answered: ErrImage,
// or [kernel.ErrNotFound] where the memory holds no such kernel (yet).
func Ask(g Guest, q Question) (*Answer, *layout.Layout, error) {
	if err := q.Check(); err != nil {
		return nil, nil, err
	}
	var img *image.Image
	var table *symbols.Table
	l := q.Layout
	if l == nil || slices.Contains(q.What, Kernel) {
		b, err := g.Image()
		if err == nil {
			img, err = image.Unpack(b)
		}
		if err == nil {
			l, table, err = layout.Read(img)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrImage, err)
		}
	}
	cache := memory.NewCache(g.Memory)
	k, err := kernel.Find(cache, g.Memory.End(), l)
	if err != nil {
		return nil, l, err
	}
	k.Space.Keep()
	k.Anew = func() {
		cache.Forget()
		k.Space.Keep()
	}
	a := &Answer{}
	for _, w := range q.What {
		switch w {
		case Modules:
			a.Modules = moduleFacts(k)
		case Tasks:
			all, err := tasks.List(k)
			a.Tasks = &TaskFacts{all, text(err)}
		case IMA:
			a.IMA = imaList(k, q.After)
		case Kernel:
			a.Kernel = kernelFacts(&integrity.Reader{Kernel: k, Image: img, Symbols: table})
		}
	}
	return a, l, nil
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func moduleFacts(k *kernel.Kernel) *ModuleFacts {
	all, err := modules.List(k)
	f := &ModuleFacts{Modules: all, Damage: text(err), Unlisted: []modules.Code{}}
	if err != nil { // what is behind the damage would be taken for hidden
		return f
	}
	f.Unlisted, err = modules.Unlisted(k, all)
	f.Damage = text(err)
	return f
}

// usualList is how long a list is for which room is made at once, in bytes.
const usualList = 2 << 20

// imaList reads the list. Where the guest has fewer entries than are known it is another list: all of it is read.
func imaList(k *kernel.Kernel, after int) *list.List {
	room := make([]byte, 0, usualList) // of which what is not used is no memory
	b, count, err := ima.Read(k, after, room)
	if err == nil && count < after {
		after = 0
		b, _, err = ima.Read(k, 0, room)
	}
	l := &list.List{After: after, List: b}
	if errors.Is(err, ima.ErrNone) || err != nil && k.NoTypes != "" {
		l.Missing = err.Error()
	} else {
		l.Error = text(err)
	}
	return l
}

func kernelFacts(r *integrity.Reader) *KernelFacts {
	k := r.Kernel
	at, _ := k.Address("_text") // else it would not have been found
	f := &KernelFacts{
		Version: strings.TrimSpace(strings.TrimRight(string(k.Banner), "\x00")), Physical: k.Physical, Virtual: at, Offset: k.Offset, Levels: k.Space.Levels,
	}
	damage := func(what string, err error) {
		if err != nil {
			f.Damage = append(f.Damage, fmt.Sprintf("%s: %v", what, err))
		}
	}
	if t, err := r.SystemCalls(); err == nil {
		f.SystemCalls = &t
	} else {
		damage("system-call table", err)
	}
	if t, err := r.Interrupts(); err == nil {
		f.Interrupts = &t
	} else {
		damage("interrupt descriptor table", err)
	}
	if t, err := r.Text(); err == nil {
		f.Text = &t
	} else {
		damage("text", err)
	}
	return f
}

// Encode writes an answer as JSON, and what JSON would make longer beside it: the IMA list.
func (a *Answer) Encode() (text, list []byte, err error) {
	short := *a
	if a.IMA != nil {
		list = a.IMA.List
		facts := *a.IMA
		facts.List = nil
		short.IMA = &facts
	}
	text, err = json.Marshal(&short)
	return text, list, err
}

// Decode reads what Encode wrote.
func Decode(text, list []byte) (*Answer, error) {
	var a Answer
	if err := json.Unmarshal(text, &a); err != nil {
		return nil, err
	}
	switch {
	case a.IMA != nil:
		a.IMA.List = list
	case len(list) > 0:
		return nil, errors.New("an IMA list that nothing is said of")
	}
	return &a, nil
}

// ReadImage reads a kernel's image of size bytes, for Guest.Image.
func ReadImage(file io.ReaderAt, size int64) ([]byte, error) {
	if size <= 0 || size > image.MaxSize {
		return nil, fmt.Errorf("a kernel's image of %d bytes: 1 to %d are read", size, image.MaxSize)
	}
	b := make([]byte, size)
	return b, paging.Read(file, b, 0)
}
