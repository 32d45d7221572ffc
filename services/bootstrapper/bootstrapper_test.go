package bootstrapper

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"redoubt.dev/redoubt/services/protocol"
)

func list(pairs map[string][]string) (out []protocol.Bootable) {
	for name, needs := range pairs {
		out = append(out, protocol.Bootable{Name: name, Needs: needs})
	}
	return out
}

var diamond = map[string][]string{"a": nil, "b": {"a"}, "c": {"a"}, "d": {"b", "c"}, "e": nil}

// In every order in which services become ready, each is asked for once, when all that it needs is
// ready and not later.
func TestEveryOrder(t *testing.T) {
	runs := 0
	var walk func(o *order, asked, ready []string)
	walk = func(o *order, asked, ready []string) {
		for name, needs := range diamond {
			can := true
			for _, n := range needs {
				can = can && slices.Contains(ready, n)
			}
			if can != slices.Contains(asked, name) {
				t.Fatalf("ready %v: %s asked for: %v", ready, name, !can)
			}
		}
		if o.done() {
			if runs++; len(asked) != len(diamond) {
				t.Fatalf("done with %v", asked)
			}
			return
		}
		for _, name := range asked {
			if slices.Contains(ready, name) {
				continue
			}
			again, err := newOrder(list(diamond))
			if err != nil {
				t.Fatal(err)
			}
			got := again.next()
			for _, r := range append(slices.Clone(ready), name) {
				got = append(got, again.ready(r)...)
			}
			walk(again, got, append(slices.Clone(ready), name))
		}
	}
	o, err := newOrder(list(diamond))
	if err != nil {
		t.Fatal(err)
	}
	walk(o, o.next(), nil)
	if runs < 10 {
		t.Errorf("%d orders", runs)
	}
}

func TestNoOrder(t *testing.T) {
	for name, l := range map[string][]protocol.Bootable{
		"circle":  list(map[string][]string{"a": {"b"}, "b": {"a"}}),
		"itself":  list(map[string][]string{"a": {"a"}}),
		"missing": list(map[string][]string{"a": {"b"}}),
		"twice":   {{Name: "a"}, {Name: "a"}},
	} {
		if _, err := newOrder(l); !errors.Is(err, errOrder) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A failure is told after all that was asked for has come, and nothing more is asked for.
func TestFailure(t *testing.T) {
	broken := errors.New("b is broken")
	var mu sync.Mutex
	var asked []string
	err := boot(t.Context(), list(diamond), func(_ context.Context, name string) error {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, name)
		if name == "b" {
			return broken
		}
		return nil
	})
	if !errors.Is(err, broken) || slices.Contains(asked, "d") {
		t.Errorf("%v after %v", err, asked)
	}
	asked = nil
	err = boot(t.Context(), list(diamond), func(_ context.Context, name string) error {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, name)
		return nil
	})
	if err != nil || len(asked) != len(diamond) {
		t.Errorf("%v after %v", err, asked)
	}
}
