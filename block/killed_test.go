package block

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"
)

// writeForever is the process that is killed: it prints what it is about to write and what it has
// written, as block and number, and never returns.
func writeForever(path, base string) {
	o, err := tryOverlay(path, base, false)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for range 3 {
		go func() {
			for {
				b, n := rand.Int64N(size/OverlayBlock), rand.Uint64()
				say(0, b, n)
				if _, err := o.WriteAt(stamp(n), b*OverlayBlock+SectorSize); err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				say(1, b, n)
			}
		}()
	}
	select {}
}

// say writes one line, which a pipe takes whole.
func say(done byte, b int64, n uint64) {
	var line [17]byte
	line[0] = done
	binary.LittleEndian.PutUint64(line[1:], uint64(b))
	binary.LittleEndian.PutUint64(line[9:], n)
	_, _ = os.Stdout.Write(line[:])
}

// written is what is known of a block.
type written struct {
	may  []uint64 // the writes that may be what it holds
	must bool     // one of them is: what it held before is overwritten
	busy []uint64 // those since the last moment when none was under way
	open int      // how many are under way
}

// writeAndKill runs such a process for a moment.
func writeAndKill(t *testing.T, path, base string, round uint64) map[int64]*written {
	t.Helper()
	c := exec.Command("/proc/self/exe", "-test.run=TestOverlayKilled$")
	c.Env = append(os.Environ(), "BLOCK_TEST_OVERLAY="+path, "BLOCK_TEST_BASE="+base)
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	all := map[int64]*written{}
	var line [17]byte
	r := bufio.NewReader(out)
	kill := time.AfterFunc(time.Hour, func() { _ = c.Process.Kill() })
	for n := 0; ; n++ {
		if _, err := io.ReadFull(r, line[:]); err != nil {
			break
		}
		if n == 0 { // it is on its way: what is tested is a moment nobody chose
			kill.Reset(time.Duration(rand.New(rand.NewPCG(round, 7)).Int64N(int64(30 * time.Millisecond))))
		}
		b, id := int64(binary.LittleEndian.Uint64(line[1:])), binary.LittleEndian.Uint64(line[9:])
		w := all[b]
		if w == nil {
			w = &written{}
			all[b] = w
		}
		if line[0] == 0 {
			w.may, w.busy = append(w.may, id), append(w.busy, id)
			w.open++
		} else if w.open--; w.open == 0 {
			w.may, w.busy, w.must = w.busy, nil, true
		}
	}
	kill.Stop()
	_ = c.Wait() // killed
	return all
}
