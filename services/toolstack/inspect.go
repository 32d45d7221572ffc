package toolstack

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/attest/ima"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/answer"
	"redoubt.dev/redoubt/services/protocol"
)

// maxAsked bounds what one question may ask, and how long each word of it is.
const maxAsked = 16

// Inspect has an inspector read the guest's memory.
func (a *api) Inspect(ctx context.Context, r *v1.InspectRequest) (*v1.InspectResponse, error) {
	g, err := a.t.find(r.Name)
	if err != nil {
		return nil, status(err)
	}
	if len(r.What) == 0 || len(r.What) > maxAsked {
		return nil, status(rpc.Errorf(rpc.Invalid, "inspect: %d things are asked: ask for 1 to %d of modules, kernel, ima, tasks", len(r.What), maxAsked))
	}
	for _, w := range r.What {
		if len(w) > maxAsked {
			return nil, status(rpc.Errorf(rpc.Invalid, "inspect: %q cannot be asked", w[:maxAsked]))
		}
	}
	text, list, err := a.t.inspect(ctx, g, protocol.Question{What: r.What})
	return &v1.InspectResponse{Answer: text, ImaList: list}, status(err)
}

// inspect asks the Builder and reads the answer, which is an inspector's, of a guest's memory: it is passed on.
func (t *Toolstack) inspect(ctx context.Context, g *guest, q protocol.Question) (text, list []byte, err error) {
	g.mu.Lock()
	up := g.up()
	g.mu.Unlock()
	if !up {
		return nil, nil, rpc.Errorf(rpc.Unavailable, "guest %q is down: only one that runs can be inspected (`redoubt run %s`), or a dump (`redoubt inspect --memory`)", g.saved.Spec.Name, g.saved.Spec.Name)
	}
	in := protocol.Inspect{UUID: g.saved.UUID, Name: g.saved.Spec.Name, Question: q, Caller: caller(ctx)}
	return t.askRaw(ctx, protocol.MethodInspect, in)
}

// ask asks the Builder what has a long answer, of which it gives the JSON. What is given stays the caller's.
func (t *Toolstack) ask(ctx context.Context, method string, in any, give ...*os.File) ([]byte, error) {
	text, _, err := t.askRaw(ctx, method, in, give...)
	return text, err
}

func (t *Toolstack) askRaw(ctx context.Context, method string, in any, give ...*os.File) (text, raw []byte, err error) {
	var out protocol.Answered
	files, err := t.builder.Call(ctx, method, in, &out, give...)
	defer closeFiles(files)
	if err != nil {
		return nil, nil, err
	}
	if text, raw, err = answer.Read(files, out); err != nil {
		err = fmt.Errorf("%s: %w", method, err)
	}
	return text, raw, err
}

// measured is what the guest's kernel has measured, for evidence. That it cannot be had is part of the evidence.
func (t *Toolstack) measured(ctx context.Context, g *guest, after uint32) *ima.List {
	if g.saved.Spec.Boot.Kernel == "" {
		return &ima.List{Missing: "the guest boots firmware: its kernel is not known to the host, so that its IMA list is not read"}
	}
	b, raw, err := t.inspect(ctx, g, protocol.Question{What: []string{"ima"}, After: int(min(after, 1<<30))})
	var answer struct {
		IMA *ima.List `json:"ima"`
	}
	if err == nil {
		err = json.Unmarshal(b, &answer)
	}
	switch {
	case err != nil && rpc.KindOf(err) == rpc.Invalid: // what the operator gave it to boot
		return &ima.List{Missing: err.Error()}
	case err != nil:
		return &ima.List{Error: err.Error()}
	case answer.IMA == nil:
		return &ima.List{Error: "the inspector did not say"}
	}
	answer.IMA.List = raw
	return answer.IMA
}
