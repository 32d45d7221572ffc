package manager

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/vtpm/engine"
)

// TestSelfTest: what was left to test is tested before the guest asks, and after its reboot again.
func TestSelfTest(t *testing.T) {
	m := newManager(t, stateDir(t))
	d := start(t, m, guestA, "")
	defer stop(t, d)
	made(t, d)
	untested := func() uint32 {
		t.Helper()
		// TPM2_IncrementalSelfTest of no algorithm answers with those that were not tested (Part 3 §10.3).
		rsp, err := guest{d}.Send([]byte{0x80, 1, 0, 0, 0, 14, 0, 0, 1, byte(tpm2.TPMCCIncrementalSelfTest & 0xff), 0, 0, 0, 0})
		if err != nil || engine.ResponseCode(rsp) != tpm2.TPMRCSuccess || len(rsp) < 14 {
			t.Fatalf("%x, %v", rsp, err)
		}
		return binary.BigEndian.Uint32(rsp[10:])
	}
	for range 2 {
		if untested() == 0 {
			t.Fatal("nothing is left to test")
		}
		if err := d.SelfTest(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := untested(); n != 0 {
			t.Errorf("%d algorithms were not tested", n)
		}
		if err := d.Reset(t.Context(), Fixed(boot(t, ""))); err != nil {
			t.Fatal(err)
		}
	}
}
