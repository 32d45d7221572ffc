package manager

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestRevoked: a vTPM that was revoked is not started, by no later manager either, and not by editing its record; taken back it is
// what it was.
func TestRevoked(t *testing.T) {
	tools(t)
	dir := stateDir(t)
	open := func() *Manager {
		t.Helper()
		m, err := Open(Options{Dir: dir, HostID: "test-host"})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	shut := func(m *Manager) {
		t.Helper()
		if err := m.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(m *Manager, want error) {
		t.Helper()
		if d, err := m.Start(t.Context(), guestA, nil); !errors.Is(err, want) {
			t.Errorf("%v, not %v", err, want)
			stop(t, d)
		}
	}
	m := open()
	stop(t, start(t, m, guestA, ""))
	instance := m.Inventory()[0].Instance
	if err := m.Revoke(guestB, true); !errors.Is(err, ErrUnknown) {
		t.Error(err)
	}
	for range 2 {
		if err := m.Revoke(guestA, true); err != nil {
			t.Fatal(err)
		}
	}
	refused(m, ErrRevoked)
	shut(m)
	m = open()
	refused(m, ErrRevoked)
	shut(m)

	file := filepath.Join(dir, guestsDir, guestA, recordFile)
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	edited := bytes.Replace(whole, []byte(`"revoked": true`), []byte(`"revoked": false`), 1)
	if bytes.Equal(edited, whole) {
		t.Fatalf("it is not in the record:\n%s", whole)
	}
	if err := os.WriteFile(file, edited, 0o600); err != nil {
		t.Fatal(err)
	}
	m = open()
	refused(m, ErrState)
	shut(m)
	if err := os.WriteFile(file, whole, 0o600); err != nil {
		t.Fatal(err)
	}

	m = open()
	if err := m.Revoke(guestA, false); err != nil {
		t.Fatal(err)
	}
	stop(t, start(t, m, guestA, ""))
	if got := m.Inventory()[0].Instance; got != instance {
		t.Errorf("instance %d, it was %d", got, instance)
	}
	shut(m)
}
