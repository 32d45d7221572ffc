package asked

import (
	"context"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/answer"
	"redoubt.dev/redoubt/services/protocol"
)

// ask has an emulator asked that is this handler.
func ask(t *testing.T, emulator rpc.Handler) ([]byte, error) {
	t.Helper()
	ours, its, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	builder, other := rpc.New(ours, nil), rpc.New(its, emulator)
	var wg sync.WaitGroup
	wg.Go(func() { _ = builder.Run(context.Background()) })
	wg.Go(func() { _ = other.Run(context.Background()) })
	defer func() {
		builder.Close()
		other.Close()
		wg.Wait()
	}()
	v, err := Modules(t.Context(), builder)
	if err != nil {
		return nil, err
	}
	w, ok := v.(rpc.WithFiles)
	if !ok {
		t.Fatalf("%T", v)
	}
	defer ipc.CloseAll(w.Files)
	a, _ := w.Value.(protocol.Answered)
	text, _, err := answer.Read(w.Files, a)
	return text, err
}

// TestModules: an emulator's answer comes as it is; one that dies, hangs, lies or talks costs its own answer, within bounds.
func TestModules(t *testing.T) {
	give := func(f func(into *os.File) (any, error)) rpc.Handler {
		return func(_ context.Context, r *rpc.Request) (any, error) {
			defer ipc.CloseAll(r.Files)
			return rpc.Answer(r, func(in protocol.Report) (any, error) {
				files, err := in.Files.Take(r)
				if err != nil || r.Method != protocol.MethodReport || len(files[protocol.FileAnswer]) != 1 {
					t.Errorf("%s: %v, %v", r.Method, in, err)
				}
				return f(files[protocol.FileAnswer][0])
			})
		}
	}
	b, err := ask(t, give(func(into *os.File) (any, error) { return answer.Put(into, []byte(`{"modules":{}}`), nil) }))
	if err != nil || string(b) != `{"modules":{}}` {
		t.Errorf("%q, %v", b, err)
	}
	was := limit
	defer func() { limit = was }()
	limit = 200 * time.Millisecond
	for name, c := range map[string]struct {
		emulator rpc.Handler
		want     string
	}{
		"lies":   {give(func(*os.File) (any, error) { return protocol.Answered{Size: 1 << 40}, nil }), "an answer of 1099511627776 bytes"},
		"fails":  {give(func(*os.File) (any, error) { return nil, rpc.Errorf(rpc.Refused, "not isolated") }), "not isolated"},
		"talks":  {give(func(*os.File) (any, error) { return nil, rpc.Errorf(rpc.Exists, "%s", strings.Repeat("x", 4096)) }), "xxx"},
		"serves": {nil, "not served here"},
		"hangs": {func(ctx context.Context, r *rpc.Request) (any, error) {
			ipc.CloseAll(r.Files)
			<-ctx.Done()
			return nil, ctx.Err()
		}, "does not answer"},
	} {
		_, err := ask(t, c.emulator)
		if err == nil || !strings.Contains(err.Error(), c.want) || len(err.Error()) > maxReason {
			t.Errorf("%s: %v", name, err)
		}
		if name != "lies" && rpc.KindOf(err) != rpc.Unavailable {
			t.Errorf("%s: %s", name, rpc.KindOf(err))
		}
	}
	if _, err := Modules(t.Context(), rpc.Gone()); rpc.KindOf(err) != rpc.Unavailable || !strings.Contains(err.Error(), "has ended") {
		t.Error(err)
	}
}
