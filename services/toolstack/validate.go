package toolstack

import (
	"context"
	"os"
	"time"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services/protocol"
)

// Bounds of what the API takes.
const (
	maxReasonText   = 256
	maxAcceptPaths  = 1024
	maxAcceptLength = 4096
	maxSignature    = 1024
	maxVolumeName   = 32
)

// of finds a guest of a call; running says that it must run.
func (t *Toolstack) of(name string, running bool, todo string) (*guest, error) {
	g, err := t.find(name)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	up, removing := g.up(), g.removing
	g.mu.Unlock()
	if removing {
		return nil, errRemoved(name)
	}
	if running && !up {
		return nil, rpc.Errorf(rpc.Unavailable, "guest %q is down: %s (`redoubt run %s`)", name, todo, name)
	}
	return g, nil
}

// control makes a call that says who and why.
func (a *api) control(ctx context.Context, method, name, reason string, running bool, todo string) error {
	g, err := a.t.of(name, running, todo)
	if err != nil {
		return status(err)
	}
	if len(reason) > maxReasonText {
		return status(rpc.Errorf(rpc.Invalid, "a reason of %d characters: the most is %d", len(reason), maxReasonText))
	}
	_, err = a.t.builder.Call(ctx, method, protocol.Control{UUID: g.saved.UUID, Name: name, Reason: reason, Caller: caller(ctx)}, nil)
	return status(err)
}

// Pause implements the API.
func (a *api) Pause(ctx context.Context, r *v1.PauseRequest) (*v1.PauseResponse, error) {
	return &v1.PauseResponse{}, a.control(ctx, protocol.MethodPause, r.Name, "", true, "only one that runs can be paused")
}

// Resume implements the API.
func (a *api) Resume(ctx context.Context, r *v1.ResumeRequest) (*v1.ResumeResponse, error) {
	return &v1.ResumeResponse{}, a.control(ctx, protocol.MethodResume, r.Name, "", true, "only one that runs can go on")
}

// Quarantine implements the API.
func (a *api) Quarantine(ctx context.Context, r *v1.QuarantineRequest) (*v1.QuarantineResponse, error) {
	return &v1.QuarantineResponse{}, a.control(ctx, protocol.MethodQuarantine, r.Name, r.Reason, false, "")
}

// Release implements the API.
func (a *api) Release(ctx context.Context, r *v1.ReleaseRequest) (*v1.ReleaseResponse, error) {
	return &v1.ReleaseResponse{}, a.control(ctx, protocol.MethodReleaseGuest, r.Name, r.Reason, false, "")
}

const validatedRunning = "its disks are validated while it runs"

// Validate implements the API.
func (a *api) Validate(ctx context.Context, r *v1.ValidateRequest) (*v1.ValidateResponse, error) {
	if len(r.Seen) <= maxRequest {
		small(ctx)
	}
	g, err := a.t.of(r.Name, true, validatedRunning)
	if err != nil {
		return nil, status(err)
	}
	in := protocol.Validate{UUID: g.saved.UUID, Name: r.Name, Full: r.Full, Force: r.Force, Caller: caller(ctx)}
	files, err := seen(r, &in)
	defer closeFiles(files)
	if err != nil {
		return nil, status(err)
	}
	b, err := a.t.ask(ctx, protocol.MethodValidate, in, files...)
	return &v1.ValidateResponse{Report: b}, status(err)
}

// seen puts the listing of a call into memory for the Builder.
func seen(r *v1.ValidateRequest, in *protocol.Validate) ([]*os.File, error) {
	switch {
	case len(r.Seen) == 0 && r.SeenAtNs == 0 && r.SeenOf == "":
		return nil, nil
	case len(r.Seen) == 0 || len(r.Seen) > protocol.MaxSeen:
		return nil, rpc.Errorf(rpc.Invalid, "seen: %d bytes: use 1 to %d", len(r.Seen), protocol.MaxSeen)
	case r.SeenAtNs <= 0:
		return nil, rpc.Errorf(rpc.Invalid, "seen: it does not say when it was begun")
	case len(r.SeenOf) > maxVolumeName:
		return nil, rpc.Errorf(rpc.Invalid, "seen: %.40q is no volume: use one such as disk0p1", r.SeenOf)
	}
	f, err := memfd.New("listing", int64(len(r.Seen)))
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(r.Seen, 0); err != nil {
		f.Close()
		return nil, err
	}
	size := len(r.Seen)
	r.Seen = nil // it is there twice
	in.Seen = &protocol.Seen{Size: size, Begun: time.Unix(0, r.SeenAtNs).UTC(), Volume: r.SeenOf}
	in.Files = protocol.Files{protocol.FileSeen}
	return []*os.File{f}, nil
}

// Validation implements the API.
func (a *api) Validation(ctx context.Context, r *v1.ValidationRequest) (*v1.ValidationResponse, error) {
	g, err := a.t.of(r.Name, false, "")
	if err != nil {
		return nil, status(err)
	}
	b, err := a.t.ask(ctx, protocol.MethodValidation, protocol.Control{UUID: g.saved.UUID, Name: r.Name, Caller: caller(ctx)})
	return &v1.ValidationResponse{Status: b}, status(err)
}

// CreateBaseline implements the API.
func (a *api) CreateBaseline(ctx context.Context, r *v1.CreateBaselineRequest) (*v1.CreateBaselineResponse, error) {
	g, err := a.t.of(r.Name, true, "its baseline is made of what its disks hold while it runs")
	if err != nil {
		return nil, status(err)
	}
	if len(r.Rules) > protocol.MaxRules {
		return nil, status(rpc.Errorf(rpc.Invalid, "rules of %d bytes: the most is %d", len(r.Rules), protocol.MaxRules))
	}
	in := protocol.CreateBaseline{UUID: g.saved.UUID, Name: r.Name, Rules: r.Rules, Force: r.Force, Caller: caller(ctx)}
	b, err := a.t.ask(ctx, protocol.MethodCreateBaseline, in)
	return &v1.CreateBaselineResponse{Drafted: b}, status(err)
}

// GetBaseline implements the API.
func (a *api) GetBaseline(ctx context.Context, r *v1.GetBaselineRequest) (*v1.GetBaselineResponse, error) {
	g, err := a.t.of(r.Name, false, "")
	if err != nil {
		return nil, status(err)
	}
	b, err := a.t.ask(ctx, protocol.MethodBaseline, protocol.Baseline{UUID: g.saved.UUID, Name: r.Name, Draft: r.Draft, Caller: caller(ctx)})
	return &v1.GetBaselineResponse{Baseline: b}, status(err)
}

// SignBaseline implements the API.
func (a *api) SignBaseline(ctx context.Context, r *v1.SignBaselineRequest) (*v1.SignBaselineResponse, error) {
	g, err := a.t.of(r.Name, true, "who may sign its baseline says its spec while it runs")
	if err != nil {
		return nil, status(err)
	}
	if len(r.Signature) > maxSignature || len(r.Signer) > maxSignature {
		return nil, status(rpc.Errorf(rpc.Invalid, "a signature of %d bytes: the most is %d", len(r.Signature), maxSignature))
	}
	var out protocol.Signed
	_, err = a.t.builder.Call(ctx, protocol.MethodSignBaseline,
		protocol.SignBaseline{UUID: g.saved.UUID, Name: r.Name, Signature: r.Signature, Signer: r.Signer, Caller: caller(ctx)}, &out)
	return &v1.SignBaselineResponse{Version: out.Version}, status(err)
}

// AcceptBaseline implements the API.
func (a *api) AcceptBaseline(ctx context.Context, r *v1.AcceptBaselineRequest) (*v1.AcceptBaselineResponse, error) {
	g, err := a.t.of(r.Name, true, "what is accepted is what its disks hold while it runs")
	if err != nil {
		return nil, status(err)
	}
	if len(r.Paths) > maxAcceptPaths {
		return nil, status(rpc.Errorf(rpc.Invalid, "%d paths: the most is %d, or none for all", len(r.Paths), maxAcceptPaths))
	}
	total := 0
	for _, p := range r.Paths {
		if total += len(p); len(p) > maxAcceptLength || total > 32<<10 {
			return nil, status(rpc.Errorf(rpc.Invalid, "paths of more than 32 KiB: accept fewer at once, or all"))
		}
	}
	b, err := a.t.ask(ctx, protocol.MethodAcceptBaseline, protocol.AcceptBaseline{UUID: g.saved.UUID, Name: r.Name, Paths: r.Paths, Caller: caller(ctx)})
	return &v1.AcceptBaselineResponse{Drafted: b}, status(err)
}
