package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

// The soak's settings: REDOUBT_SOAK=1 runs it, REDOUBT_SOAK_SEED repeats one, and
// REDOUBT_SOAK_STARTS changes how many starts it makes.
const (
	soakStarts  = 200
	soakDelay   = 8 * time.Second // the latest a vTPM comes
	soakAtATime = 2
)

// TestSoakStarts starts guests whose vTPMs are late by random delays, two at a time, under every
// emulator and kernel in turn. Every one keeps its trust.
func TestSoakStarts(t *testing.T) {
	if os.Getenv("REDOUBT_SOAK") != "1" {
		t.Skip("takes an hour: run it by `make soak`")
	}
	starts := soakSetting(t, "REDOUBT_SOAK_STARTS", soakStarts)
	seed := soakSetting(t, "REDOUBT_SOAK_SEED", uint64(time.Now().UnixNano()))
	t.Logf("%d starts; REDOUBT_SOAK_SEED=%d repeats their delays", starts, seed)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("REDOUBT_SOAK_SEED=%d", seed) // after the failures, where it is looked for
		}
	})
	random := rand.New(rand.NewPCG(seed, 0))
	h := newHost(t)
	running := make(chan struct{}, soakAtATime)
	// A group, so that the host outlives all parallel starts.
	t.Run("starts", func(t *testing.T) {
		all := emulators()
		for i := range int(starts) {
			emulator := all[i%len(all)]
			kernel := []string{"6.1", "6.12"}[i/len(all)%2]
			delay := time.Duration(random.Int64N(int64(soakDelay))).Round(time.Millisecond)
			t.Run(fmt.Sprintf("%d/%s/%s/%v", i, emulator, kernel, delay), func(t *testing.T) {
				t.Parallel()
				running <- struct{}{}
				defer func() { <-running }()
				h := &host{t, h.dir, h.cache}
				name := fmt.Sprintf("soak-%d", i)
				h.late(name, emulator, kernel, delay, []int{1, 2, 4}[i/len(all)%3])
				h.gated(name, delay)
				h.must("rm", name)
			})
		}
	})
}
