// Package asked is the Builder's side of inspectors: it has a question about a guest answered by an inspector of its own. What
// an inspector says was made from what a hostile guest holds; it goes to its own guest's tenant only, and is not read here.
package asked

import (
	"context"
	"encoding/json"
	"os"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/answer"
	"redoubt.dev/redoubt/services/job"
	"redoubt.dev/redoubt/services/protocol"
)

// most inspectors run at once: each may use much memory. Who asks meanwhile waits.
const most = 2

// maxLayout bounds what is kept of a guest's kernel, in bytes.
const maxLayout = 16 << 10

// An Asker asks inspectors.
type Asker struct {
	job.Runner
	slots chan struct{}
}

// spare is how long an inspector waits for the next question about the guest of the last one: whoever asks again and again
// does so within it.
const spare = time.Minute

// Limit is what an inspector may take to answer, most of it for unpacking a kernel, then to leave.
const Limit = time.Minute

// New makes one, to be closed.
func New(j *audit.Journal, start func(guest string) (*process.Process, error)) *Asker {
	return &Asker{
		job.Runner{Service: services.Inspector, Journal: j, Start: start, Limit: Limit, Detail: []string{"memory", "read-only"}, Spare: spare},
		make(chan struct{}, most),
	}
}

// A Guest is one that can be asked about, as long as its kernel is the same. The zero value is ready.
type Guest struct {
	mu     sync.Mutex
	layout json.RawMessage // of its kernel, as an inspector said: it is only ever given to another of this guest's
}

func (g *Guest) known() json.RawMessage {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.layout
}

func (g *Guest) learn(l json.RawMessage) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(l) > 0 && len(l) <= maxLayout {
		g.layout = l
	}
}

// A Machine is a guest's memory and kernel, and how the first is laid out.
type Machine struct {
	Layout string   // of package memory
	Size   uint64   // of the memory, in bytes
	Memory *os.File // nil while the guest is being started
	Kernel *os.File // nil of a guest that boots firmware
}

// An Opened is what an inspector gets of a machine: descriptors by which neither memory nor kernel can be changed.
type Opened struct {
	layout string
	size   uint64
	files  []*os.File
}

// Open makes those descriptors; Ask closes them.
func (m Machine) Open() (Opened, error) {
	o := Opened{layout: m.Layout, size: m.Size}
	switch {
	case m.Kernel == nil:
		return o, rpc.Errorf(rpc.Unavailable, "the guest boots firmware: its kernel is known here only if it boots by boot.kernel")
	case m.Memory == nil:
		return o, rpc.Errorf(rpc.Unavailable, "the guest is being started: ask again")
	}
	for _, f := range []*os.File{m.Memory, m.Kernel} {
		ro, err := memfd.ReadOnly(f)
		if err != nil {
			ipc.CloseAll(o.files)
			return o, err
		}
		o.files = append(o.files, ro)
	}
	return o, nil
}

// Ask has a question answered about the guest of a name, as protocol.MethodInspect is answered.
func (a *Asker) Ask(ctx context.Context, name string, g *Guest, m Opened, q protocol.Question) (any, error) {
	defer ipc.CloseAll(m.files)
	select {
	case a.slots <- struct{}{}:
		defer func() { <-a.slots }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	q.Layout = g.known()
	in := protocol.Read{
		Machine: m.layout, Size: m.size, Question: q,
		Files: protocol.Files{protocol.FileMemory, protocol.FileKernel, protocol.FileAnswer},
	}
	return answer.Get(services.Inspector, func(into *os.File) (is protocol.Answered, err error) {
		err = a.Run(ctx, name, func(ctx context.Context, peer *rpc.Peer) error {
			var out protocol.ReadOut
			if _, err := peer.Call(ctx, protocol.MethodRead, in, &out, append(m.files, into)...); err != nil {
				return err
			}
			is = out.Answered
			g.learn(out.Layout)
			return nil
		})
		return is, err
	})
}
