package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// startsUnderFireFor is how long TestStartsUnderFireQEMU starts guests.
const startsUnderFireFor = 20 * time.Second

// TestStartsUnderFireQEMU: a guest starts although a BlkBack and the NetBack are killed at whatever
// moment of its start: also when one has been made ready for it and its emulator has not come yet.
func TestStartsUnderFireQEMU(t *testing.T) {
	h := newHost(t, "--reset", "blkback=off,netback=off")
	disk := h.path("disk.img")
	h.must("disk", "create", disk, "8MiB")
	ctx, cancel := context.WithTimeout(t.Context(), startsUnderFireFor)
	defer cancel()
	kills := map[string]int{}
	var firing sync.WaitGroup
	firing.Go(func() {
		for turn := 0; ; turn++ {
			// No more than twenty NetBacks in ten seconds: that is the bound at which the Builder gives up.
			pause := 270*time.Millisecond + time.Duration(rand.Int64N(int64(100*time.Millisecond)))
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause): // what is tested is a moment nobody chose
			}
			program := []string{"redoubt-blkback", "redoubt-netback"}[turn%2]
			for _, pid := range h.processes(program) {
				if unix.Kill(pid, unix.SIGKILL) == nil {
					kills[program]++
				}
			}
		}
	})
	starts := 0
	for ; ctx.Err() == nil; starts++ {
		name := fmt.Sprintf("guest-%d", starts)
		r := h.tryStart(start{name: name, emulator: "qemu", what: "deaf", args: []string{"--no-tpm", "--disk", disk, "--nic", "vlan=10"}})
		if r.status != 0 {
			t.Errorf("start %d: %s", starts+1, r.err)
			continue
		}
		h.must("stop", name, "--grace", "0s")
		h.must("rm", name)
	}
	firing.Wait()
	t.Logf("%d starts, killed %v", starts, kills)
}
