package backend

import (
	"io"
	"log/slog"
	"slices"
	"testing"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/vtpm/channel"
)

// noted is an empty store that notes what is read.
type noted struct{ reads []string }

func (s *noted) Events() <-chan client.Event  { return nil }
func (s *noted) Watch(string, string) error   { return nil }
func (s *noted) Unwatch(string, string) error { return nil }
func (s *noted) Write(string, string) error   { return nil }
func (s *noted) Read(path string) (string, error) {
	s.reads = append(s.reads, path)
	return "", tree.ENOENT
}

// TestFresh: what cannot be there yet is not looked for, which would cost the store a worker each.
func TestFresh(t *testing.T) {
	for _, c := range []struct {
		fresh bool
		reads []string
	}{{true, nil}, {false, []string{frontState(16), instance(16)}}} {
		a, b, err := ipc.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		var s noted
		h := NewHub(&s, slog.New(slog.NewTextHandler(io.Discard, nil)))
		back, err := h.Attach(t.Context(), Options{Domain: 16, Channel: channel.New(a), Fresh: c.fresh, Report: func(string) {}})
		if err != nil {
			t.Fatal(err)
		}
		back.looks.Wait()
		back.Close()
		if !slices.Equal(s.reads, c.reads) {
			t.Errorf("fresh %t: read %q, want %q", c.fresh, s.reads, c.reads)
		}
	}
}

// TestConcerns: which paths are looked at, and of whom. A guest chooses the names beneath its own
// directory.
func TestConcerns(t *testing.T) {
	for path, want := range map[string]struct {
		d     uint32
		front bool
	}{
		server.FrontPath(16) + "/state":                     {16, true},
		server.BackPath(16) + "/instance":                   {16, false},
		server.BackPath(16) + "/state":                      {},
		server.FrontPath(16):                                {},
		server.FrontPath(16) + "/state/state":               {},
		"/local/domain/16/backend/vtpm/17/0/instance":       {}, // a guest's own idea of a back end
		"/local/domain/16/backend/vtpm/17/device/vtpm/0":    {},
		"/local/domain/016/device/vtpm/0/state":             {},
		"/local/domain/4294967312/device/vtpm/0/state":      {},
		"/local/domain/x/device/vtpm/0/state":               {},
		"/local/domain/0/backend/vtpm/16/1/instance":        {},
		"/local/domain/0/backend/vtpm/16/0/instance/deeper": {},
		"/vTPMready16": {},
		"":             {},
	} {
		d, front, ok := concerns(path)
		if ok != (want.d != 0) || uint32(d) != want.d || front != want.front {
			t.Errorf("%q: domain %d, front %t, %t", path, d, front, ok)
		}
	}
}

func FuzzConcerns(f *testing.F) {
	f.Add("/local/domain/16/device/vtpm/0/state")
	f.Add("/local/domain/0/backend/vtpm/16/0/instance")
	f.Add("/local/domain/16/backend/vtpm/17/0/instance")
	f.Fuzz(func(t *testing.T, path string) {
		d, front, ok := concerns(path)
		if want := map[bool]string{true: frontState(d), false: instance(d)}[front]; ok && path != want {
			t.Fatalf("%q was taken for %q", path, want)
		}
	})
}
