package qemu

import (
	"errors"
	"slices"
	"testing"
)

// TestRein: what stops and continues the guest is asked for once for each, and what was refused is asked for again.
func TestRein(t *testing.T) {
	var asked []string // by the goroutine of one fake, while the others wait
	refuse := map[string]bool{}
	obeys := func(f *fakeQEMU) {
		for {
			name, id := f.next()
			if id == 0 {
				return
			}
			asked = append(asked, name)
			if refuse[name] {
				f.send(`{"error": {"class": "GenericError", "desc": "no"}, "id": %d}`, id)
				continue
			}
			if name == "human-monitor-command" {
				f.send(`{"return": "CPU#0", "id": %d}`, id)
				continue
			}
			f.send(`{"return": {}, "id": %d}`, id)
		}
	}
	r := reinOf([reinConns]*Client{dial(t, nil, obeys), dial(t, nil, obeys), dial(t, nil, obeys)})
	if err := r.prime(); err != nil {
		t.Fatal(err)
	}
	wants := func(want ...string) {
		t.Helper()
		if !slices.Equal(asked, want) {
			t.Errorf("asked %q, want %q", asked, want)
		}
		asked = nil
	}
	turn := func(stop bool) {
		t.Helper()
		if err := r.turn(t.Context(), stop); err != nil {
			t.Fatal(err)
		}
	}
	look := func() {
		t.Helper()
		if text, err := r.tellRegisters(t.Context()); text != "CPU#0" || err != nil {
			t.Fatalf("%q, %v", text, err)
		}
	}
	const registers = "human-monitor-command"
	turn(false)
	wants()
	turn(true)
	turn(true)
	wants("stop")
	look()
	look()
	wants(registers, registers)
	turn(false)
	turn(true)
	look()
	turn(false)
	wants("cont", "stop", registers, "cont")

	var refused *CommandError
	refuse["stop"] = true
	if err := r.turn(t.Context(), true); !errors.As(err, &refused) {
		t.Fatalf("%v", err)
	}
	wants("stop")
	refuse["stop"], refuse[registers] = false, true
	turn(true)
	if _, err := r.tellRegisters(t.Context()); !errors.As(err, &refused) {
		t.Fatalf("%v", err)
	}
	turn(false)
	wants("stop", registers, "cont")
}
