package backend

import (
	"testing"

	"redoubt.dev/redoubt/store/server"
)

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
