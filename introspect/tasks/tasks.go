// Package tasks lists the processes of a running Linux kernel, from its memory.
//
// The list is the guest's, which may have made it wrong or taken a process out of it: it is followed at most so far as a
// kernel could have processes, and a pointer that leads nowhere, or back, is an error with its address.
package tasks

import (
	"errors"
	"fmt"

	"redoubt.dev/redoubt/introspect/kernel"
	"redoubt.dev/redoubt/introspect/types"
)

// A Task is a process, told by its first thread.
type Task struct {
	PID     int32  `json:"pid"`
	Parent  int32  `json:"parent"` // its process's number
	UID     uint32 `json:"uid"`
	Name    string `json:"name"`    // comm: 15 bytes at most
	Kernel  bool   `json:"kernel"`  // a thread of the kernel's own
	Ended   bool   `json:"ended"`   // it waits for its parent, or is going
	Address uint64 `json:"address"` // of its struct task_struct
}

// Most is how many processes a kernel may have here.
const Most = 1 << 16

// ErrList is a list that no kernel has.
var ErrList = errors.New("the guest's list of processes is damaged")

const (
	pointer = 8
	maxComm = 64

	kernelThread = 0x0020_0000 // PF_KTHREAD
)

type layout struct{ tasks, tgid, comm, flags, parent, cred, exit, uid types.Field }

func layoutOf(k *kernel.Kernel) (l layout, err error) {
	err = errors.Join(
		k.Places("task_struct", map[string]*types.Field{
			"tasks.next": &l.tasks, "tgid": &l.tgid, "comm": &l.comm, "flags": &l.flags,
			"real_parent": &l.parent, "cred": &l.cred, "exit_state": &l.exit,
		}),
		k.Places("cred", map[string]*types.Field{"uid.val": &l.uid}))
	if err == nil && (l.tasks.Size != pointer || l.parent.Size != pointer || l.cred.Size != pointer || l.comm.Size > maxComm ||
		l.tgid.Size != 4 || l.flags.Size != 4 || l.exit.Size != 4 || l.uid.Size != 4) {
		err = fmt.Errorf("struct task_struct: %+v", l)
	}
	return l, err
}

// List lists the processes, the first begun first. The idle task, which /proc does not show, is not among them. After an error it
// is those before it.
func List(k *kernel.Kernel) ([]Task, error) {
	l, err := layoutOf(k)
	if err != nil {
		return nil, err
	}
	first, err := k.Address("init_task")
	if err != nil {
		return nil, err
	}
	all := []Task{}
	err = k.Items(first+l.tasks.Offset, Most, func(link uint64) error {
		t, err := l.read(k, link-l.tasks.Offset)
		if err == nil {
			all = append(all, t)
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrList, err)
	}
	return all, err
}

func (l *layout) read(k *kernel.Kernel, at uint64) (t Task, err error) {
	t.Address = at
	if t.Name, err = k.Text(at+l.comm.Offset, l.comm.Size); err != nil {
		return t, fmt.Errorf("its name: %w", err)
	}
	half := func(base uint64, f types.Field) uint32 {
		v, herr := k.Half(base + f.Offset)
		err = errors.Join(err, herr)
		return v
	}
	word := func(f types.Field) uint64 {
		v, werr := k.Word(at + f.Offset)
		err = errors.Join(err, werr)
		return v
	}
	t.PID = int32(half(at, l.tgid))
	t.Kernel = half(at, l.flags)&kernelThread != 0
	t.Ended = half(at, l.exit) != 0
	parent, cred := word(l.parent), word(l.cred)
	if err != nil {
		return t, err
	}
	t.Parent = int32(half(parent, l.tgid))
	t.UID = half(cred, l.uid)
	return t, err
}
