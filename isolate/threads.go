package isolate

import (
	"errors"
	"fmt"
	"slices"

	"redoubt.dev/redoubt/introspect/types"
)

// threads finds the stacks of the kernel's threads.
type threads struct {
	first                    uint64      // init_task
	tasks, stack, node, sigs types.Field // of struct task_struct
	head                     types.Field // of struct signal_struct
}

// maxThreads bounds what is looked through for one write.
const maxThreads = 1 << 15

func (t *threads) find(all *types.Types, symbol func(string) uint64) error {
	t.first = symbol("init_task")
	var err error
	for _, f := range []struct {
		to                *types.Field
		structure, member string
	}{
		{&t.tasks, "task_struct", "tasks.next"},
		{&t.stack, "task_struct", "stack"},
		{&t.node, "task_struct", "thread_node.next"},
		{&t.sigs, "task_struct", "signal"},
		{&t.head, "signal_struct", "thread_head.next"},
	} {
		var ferr error
		if *f.to, ferr = all.Field(f.structure, f.member); ferr != nil {
			err = errors.Join(err, fmt.Errorf("struct %s: %s: %w", f.structure, f.member, ferr))
		}
	}
	return err
}

// ofThread says whether a page is of a thread's stack. Only what the kernel has in no cache of objects can be.
func (i *Isolation) ofThread(gpa uint64) bool {
	t := &i.kernel.threads
	left := maxThreads
	has := func(task uint64) bool {
		if left--; left < 0 { // more than a kernel has: fail closed
			return true
		}
		return slices.Contains(i.threadPages(i.wordAt(task+t.stack.Offset)), gpa)
	}
	for task := t.first; ; {
		if has(task) {
			return true
		}
		head := i.wordAt(task+t.sigs.Offset) + t.head.Offset
		for link := i.wordAt(head); link != head && link != 0; link = i.wordAt(link) {
			if has(link - t.node.Offset) { // the first one once more
				return true
			}
		}
		link := i.wordAt(task + t.tasks.Offset)
		if task = link - t.tasks.Offset; link == 0 || task == t.first {
			return link == 0
		}
	}
}

// threadPages are the pages of a stack. They are those as long as the kernel does not unmap them.
func (i *Isolation) threadPages(stack uint64) []uint64 {
	if all, ok := i.threads[stack]; ok {
		return all
	}
	var all []uint64
	for at := stack; at < stack+threadStack; at += pageSize {
		if m, ok := i.mapped(at); ok {
			all = append(all, page(m.Physical+at-m.Virtual))
		}
	}
	if len(i.threads) >= maxThreads {
		clear(i.threads)
	}
	i.threads[stack] = all
	return all
}

// threadStack is the size of a thread's stack (THREAD_SIZE without KASAN).
const threadStack = 16 << 10
