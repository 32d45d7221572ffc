package validator

import (
	"strings"
	"testing"

	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

// TestStatus: while the guest itself says that it writes the moment is not safe, and the report says so.
func TestStatus(t *testing.T) {
	f := newFake(t, &spec.Validation{Tries: 3, Status: 0x1000})
	f.status = []uint32{1, 0}
	r, err := f.validate(protocol.Validate{})
	if err != nil || r.Snapshots[0].Tries != 2 || !r.Snapshots[0].Safe || !strings.HasSuffix(r.Snapshots[0].Why, "none in progress by the guest's own status") {
		t.Fatal(r, err)
	}
	f.want(noMomentLog(false) + ", hold validation, snapshot false, let go validation, scan false, drop")
	f.status = []uint32{1, 2, 3}
	if _, err = f.validate(protocol.Validate{}); err == nil || !strings.Contains(err.Error(), "no safe moment in 3; at the last, a write is in progress by the guest's own status (0x3)") {
		t.Fatal(err)
	}
	f.want(noMomentLog(true) + ", " + noMomentLog(false) + ", " + noMomentLog(false))
	f.status = []uint32{1, 1, 1, 1}
	r, err = f.validate(protocol.Validate{Force: true})
	if err != nil || r.Snapshots[0].Safe || r.Snapshots[0].Why != "forced: a write is in progress by the guest's own status (0x1)" {
		t.Fatal(r, err)
	}
}

// TestUnsafe: all that keeps a moment from being safe is told.
func TestUnsafe(t *testing.T) {
	for want, held := range map[string]protocol.Held{
		"": {},
		"interrupts are off on processors 0 2; a write is in progress by the guest's own status (0x5)": {Masked: []int{0, 2}, Status: 5},
	} {
		if got := unsafe(held, protocol.Snapshotted{}); got != want {
			t.Errorf("%+v: %q", held, got)
		}
	}
}
