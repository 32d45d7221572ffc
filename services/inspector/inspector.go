// Package inspector is the inspector service: it answers one question about a guest, and leaves. Either from its memory
// (package introspect/inspect), and then it has the guest's memory and kernel to read; or from its disks as they were at a
// snapshot (packages validation/scan and validation/baseline), and then it has these to read. All of that may be made to
// deceive it. Beside it it has memory that its answer goes into; no other descriptor, no file and no network. The guest runs
// on meanwhile.
package inspector

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"runtime/debug"

	"redoubt.dev/redoubt/introspect/inspect"
	"redoubt.dev/redoubt/introspect/layout"
	"redoubt.dev/redoubt/introspect/memory"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/answer"
	"redoubt.dev/redoubt/services/protocol"
)

// softMemory is what the runtime tries to live on, in bytes: less than the sandbox's limit.
const softMemory = 512 << 20

// readGarbage is by how many percent of what is in use the heap may grow until the runtime collects what is not: of what most
// questions about a guest's memory need nothing is worth collecting before the process is gone.
const readGarbage = 400

// Serve answers one call, whatever the answer is, and returns; it also returns when its control connection or ctx ends.
func Serve(ctx context.Context, _ *slog.Logger, control *ipc.Conn) error {
	debug.SetMemoryLimit(softMemory)
	var peer *rpc.Peer
	var disks validation
	peer = rpc.New(control, func(ctx context.Context, r *rpc.Request) (any, error) {
		if r.Method == protocol.MethodViewDisk { // one after another, by its only caller
			return rpc.Answer(r, func(in protocol.ViewDisk) (any, error) { return struct{}{}, disks.disk(in, r) })
		}
		defer peer.Drain() // the answer still goes out
		defer ipc.CloseAll(r.Files)
		switch r.Method {
		case protocol.MethodRead:
			debug.SetGCPercent(readGarbage)
			return rpc.Answer(r, func(in protocol.Read) (any, error) { return read(in, r) })
		case protocol.MethodScan:
			return rpc.Answer(r, func(in protocol.Scan) (any, error) { return disks.scan(ctx, in, r) })
		}
		return nil, rpc.Errorf(rpc.Refused, "inspector: no call %q", r.Method)
	})
	return errors.Join(peer.Run(ctx), disks.close())
}

func read(in protocol.Read, r *rpc.Request) (any, error) {
	files, err := in.Files.Take(r)
	if err != nil {
		return nil, err
	}
	mem, kernel, into := files[protocol.FileMemory], files[protocol.FileKernel], files[protocol.FileAnswer]
	if len(mem) != 1 || len(kernel) != 1 || len(into) != 1 {
		return nil, rpc.Errorf(rpc.Invalid, "inspector: other descriptors than memory, kernel and answer")
	}
	q := inspect.Question{What: in.Question.What, After: in.Question.After}
	if in.Question.Layout != nil {
		q.Layout = &layout.Layout{}
		if err := json.Unmarshal(in.Question.Layout, q.Layout); err != nil {
			return nil, rpc.Errorf(rpc.Invalid, "inspector: the kernel's layout: %v", err)
		}
	}
	if err := q.Check(); err != nil {
		return nil, rpc.Errorf(rpc.Invalid, "%v", err)
	}
	physical, err := memory.New(mem[0], in.Size, memory.Machine(in.Machine))
	if err != nil {
		return nil, rpc.Errorf(rpc.Invalid, "inspector: %v", err)
	}
	a, l, err := inspect.Ask(inspect.Guest{Memory: physical, Image: func() ([]byte, error) { return whole(kernel[0]) }}, q)
	switch {
	case errors.Is(err, inspect.ErrImage): // the guest has no part in that
		return nil, rpc.Errorf(rpc.Invalid, "%v", err)
	case err != nil:
		return nil, rpc.Errorf(rpc.Unavailable, "%v", err)
	}
	text, list, err := a.Encode()
	if err != nil {
		return nil, err
	}
	out := protocol.ReadOut{}
	if out.Answered, err = answer.Put(into[0], text, list); err != nil {
		return nil, err
	}
	if q.Layout == nil {
		out.Layout, err = json.Marshal(l)
	}
	return out, err
}

func whole(f *os.File) ([]byte, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return inspect.ReadImage(f, st.Size())
}
