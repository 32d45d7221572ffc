package validator

import (
	"path/filepath"
	"strings"
	"testing"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/response"
	"redoubt.dev/redoubt/spec"
)

// TestRevoked: a guest whose vTPM is revoked is ended, and not started before it is released.
func TestRevoked(t *testing.T) {
	f := newFake(t, &spec.Validation{Respond: spec.Respond{Critical: []spec.Response{spec.Revoke, spec.Pause}}})
	f.scans = append(f.scans, finds("/a"), finds("/a"))
	if _, err := f.validate(protocol.Validate{}); err != nil {
		t.Fatal(err)
	}
	if did := f.did(); !strings.HasSuffix(did, "drop, revoke true") || !strings.Contains(f.failed, "its vTPM is revoked") {
		t.Errorf("%s; %q", did, f.failed)
	}
	if err := f.m.MayStart("default", uuid, "web"); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Error(err)
	}
	if err := f.m.Release(t.Context(), protocol.Control{UUID: uuid}, nil); err != nil {
		t.Fatal(err)
	}
	if err := f.m.MayStart("default", uuid, "web"); err != nil || f.did() != "revoke false" {
		t.Error(err)
	}
}

// TestRestricted: while a guest's deviation restricts its tenant none of that tenant's guests is started, and all others are.
func TestRestricted(t *testing.T) {
	f := newFake(t, &spec.Validation{Respond: spec.Respond{Critical: []spec.Response{spec.Restrict}}})
	f.scans = append(f.scans, finds("/a"), finds("/a"))
	if _, err := f.validate(protocol.Validate{}); err != nil {
		t.Fatal(err)
	}
	if err := f.m.MayStart("default", "another", "other"); rpc.KindOf(err) != rpc.Refused || !strings.Contains(err.Error(), "redoubt release web") {
		t.Error(err)
	}
	if err := f.m.MayStart("acme", "another", "other"); err != nil {
		t.Error(err)
	}
	if err := f.m.Release(t.Context(), protocol.Control{UUID: uuid}, f); err != nil {
		t.Fatal(err)
	}
	if err := f.m.MayStart("default", "another", "other"); err != nil {
		t.Error(err)
	}
}

// TestUnrecorded: a response that cannot be recorded ends the guest: without it it must not go on.
func TestUnrecorded(t *testing.T) {
	f := newFake(t, &spec.Validation{Respond: spec.Respond{Critical: []spec.Response{spec.Quarantine}}})
	l, err := response.Open(filepath.Join(t.TempDir(), "gone", response.LedgerFile)) // where nothing can be written
	if err != nil {
		t.Fatal(err)
	}
	f.m.Ledger = l
	f.scans = append(f.scans, finds("/a"), finds("/a"))
	if _, err := f.validate(protocol.Validate{}); err == nil {
		t.Error("a verdict without its response is no error")
	}
	if !strings.Contains(f.failed, "quarantine could not be recorded") {
		t.Errorf("the guest goes on: %q", f.failed)
	}
}

// TestVerdictUnrecorded: the same where the audit log takes nothing, for each response that keeps a guest from anything.
func TestVerdictUnrecorded(t *testing.T) {
	for _, what := range spec.Responses {
		f := newFake(t, &spec.Validation{Respond: spec.Respond{Critical: []spec.Response{what}}})
		f.scans = append(f.scans, finds("/a"), finds("/a"))
		f.m.Journal.Close()
		if _, err := f.validate(protocol.Validate{}); err == nil {
			t.Errorf("%s: a verdict that is not recorded is no error", what)
		}
		if ended := strings.Contains(f.failed, "could not be recorded"); ended != (what != spec.Log) {
			t.Errorf("%s: %q", what, f.failed)
		}
	}
}
