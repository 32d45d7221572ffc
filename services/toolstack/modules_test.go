package toolstack

import (
	"context"
	"log/slog"
	"os"
	"slices"
	"sync"
	"testing"

	"connectrpc.com/connect"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/answer"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

// withBuilder is a toolstack whose Builder this handler is.
func withBuilder(t *testing.T, builder rpc.Handler) *Toolstack {
	t.Helper()
	ours, its, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ts := &Toolstack{
		log: slog.New(slog.DiscardHandler), dir: t.TempDir(), guests: map[string]*guest{}, byUUID: map[string]*guest{},
		events: newBroadcast[moment](), builder: rpc.New(ours, nil),
	}
	b := rpc.New(its, builder)
	var wg sync.WaitGroup
	wg.Go(func() { _ = ts.builder.Run(context.Background()) })
	wg.Go(func() { _ = b.Run(context.Background()) })
	t.Cleanup(func() {
		ts.builder.Close()
		b.Close()
		wg.Wait()
	})
	return ts
}

// TestModules: a guest that runs and whose modules are isolated is asked about, as who asks; no other.
func TestModules(t *testing.T) {
	ts := withBuilder(t, func(_ context.Context, r *rpc.Request) (any, error) {
		return rpc.Answer(r, func(in protocol.Modules) (any, error) {
			if r.Method != protocol.MethodModules || in.UUID != "id of web" || in.Name != "web" || in.Caller != nobody {
				t.Errorf("%s: %+v", r.Method, in)
			}
			return answer.Text("emulator", []byte("a report"))
		})
	})
	for name, modules := range map[string]*spec.Modules{"web": {Default: spec.Isolate}, "plain": nil} {
		g := newGuest(saved{UUID: "id of " + name, Spec: spec.Guest{Name: name, Modules: modules}}, "")
		ts.add(g)
	}
	ask := func(name string) (*v1.ModulesResponse, error) {
		return (&api{ts}).Modules(t.Context(), &v1.ModulesRequest{Name: name})
	}
	if _, err := ask("web"); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("down: %v", err)
	}
	for _, g := range ts.guests {
		g.state = Running
	}
	if out, err := ask("web"); err != nil || string(out.Report) != "a report" {
		t.Errorf("%v, %v", out, err)
	}
	if _, err := ask("plain"); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("not isolated: %v", err)
	}
	if _, err := ask("other"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("other: %v", err)
	}
	if slices.Contains(looks, "Modules") {
		t.Error("viewers are told")
	}
}

// TestProfile: the file that a spec names is opened as its kernel is, and goes to the Builder by its name.
func TestProfile(t *testing.T) {
	var mu sync.Mutex // over both
	var opened []protocol.Open
	var build protocol.Build
	ts := withBuilder(t, func(_ context.Context, r *rpc.Request) (any, error) {
		defer ipc.CloseAll(r.Files)
		mu.Lock()
		defer mu.Unlock()
		if r.Method == protocol.MethodBuild {
			if err := r.Decode(&build); err != nil || len(r.Files) != len(build.Files) {
				t.Errorf("%d descriptors, %v, %v", len(r.Files), build.Files, err)
			}
			return nil, rpc.Errorf(rpc.Invalid, "enough")
		}
		return rpc.Answer(r, func(in protocol.Open) (any, error) {
			opened = append(opened, in)
			f, err := os.Open(os.DevNull)
			return rpc.WithFiles{Value: struct{}{}, Files: []*os.File{f}}, err
		})
	})
	s := &spec.Guest{Name: "web", Boot: spec.Boot{Kernel: "/k"}, Modules: &spec.Modules{Profile: "/p"}}
	if err := s.Complete(); err != nil {
		t.Fatal(err)
	}
	if _, err := ts.run(t.Context(), s, "", protocol.Options{}); rpc.KindOf(err) != rpc.Invalid {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if want := []protocol.Open{{Field: "boot.kernel", Path: "/k"}, {Field: "modules.profile", Path: "/p"}}; !slices.Equal(opened, want) {
		t.Errorf("opened %+v", opened)
	}
	if !slices.Equal(build.Files, protocol.Files{protocol.FileKernel, protocol.FileProfile}) || build.Spec.Modules == nil || build.Spec.Modules.Mode != spec.Enforce {
		t.Errorf("%+v", build)
	}
}
