package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/network"
)

// How a talker asks, and how long a NIC may be silent.
var (
	talkEvery   = 20 * time.Millisecond * slow // a tap holds 500 frames: all that come in an allowed silence
	talkSilence = 10 * time.Second * slow
	// slow is for the lab, where one emulated processor has it all.
	slow = func() time.Duration {
		if os.Getenv(lab.InLab) != "" {
			return 6
		}
		return 1
	}()
)

// talkMost is the longest datagram in bytes.
const talkMost = 1400

// A talker sends numbered datagrams from outside to a guest that answers each (`guest talk`), and keeps what came
// back when.
type talker struct {
	t    *testing.T
	name string
	conn net.PacketConn
	to   net.Addr
	quit chan struct{}
	all  sync.WaitGroup

	mu      sync.Mutex
	sent    []time.Time // by number
	answers []answer    // in the order of their coming
	wrong   int
	more    chan struct{} // has room for one: an answer came
}

// An answer is one datagram that came back.
type answer struct {
	boot, number uint64
	at           time.Time
}

// A death is a kill of a NetBack: between these moments.
type death struct{ from, to time.Time }

// talk begins; end must be called.
func talk(t *testing.T, name string, outside *network.Namespace, address string) *talker {
	t.Helper()
	k := &talker{t: t, name: name, to: &net.UDPAddr{IP: net.ParseIP(address), Port: 7002}, quit: make(chan struct{}), more: make(chan struct{}, 1)}
	err := outside.Do(func() (err error) { k.conn, err = net.ListenPacket("udp4", "192.0.2.100:0"); return err })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.conn.Close(); k.all.Wait() }) // where the test ends early
	k.all.Go(k.ask)
	k.all.Go(k.hear)
	return k
}

func (k *talker) ask() {
	tick := time.NewTicker(talkEvery)
	defer tick.Stop()
	buf := make([]byte, 2048)
	for number := uint64(0); ; number++ {
		k.mu.Lock()
		k.sent = append(k.sent, time.Now())
		k.mu.Unlock()
		if _, err := k.conn.WriteTo(question(buf, number), k.to); err != nil {
			return // it is closed; what else may be, is silence
		}
		select {
		case <-tick.C:
		case <-k.quit:
			return
		}
	}
}

func (k *talker) hear() {
	buf, want := make([]byte, 2048), make([]byte, 2048)
	for {
		n, _, err := k.conn.ReadFrom(buf)
		if err != nil {
			return // it is closed
		}
		now := time.Now()
		var a answer
		good := n >= 16
		if good {
			a = answer{binary.LittleEndian.Uint64(buf), binary.LittleEndian.Uint64(buf[8:]), now}
			good = a.boot != 0 && bytes.Equal(buf[8:n], question(want, a.number)[8:])
		}
		k.mu.Lock()
		if good = good && a.number < uint64(len(k.sent)); good {
			k.answers = append(k.answers, a)
		} else if k.wrong++; k.wrong <= 10 {
			k.t.Errorf("%s: an answer that is none: %x", k.name, buf[:min(n, 64)])
		}
		k.mu.Unlock()
		select {
		case k.more <- struct{}{}:
		default:
		}
	}
}

// question is what a number says; `guest talk` knows the same.
func question(buf []byte, number uint64) []byte {
	words := 1 + number*7919%((talkMost-16)/8)
	buf = buf[:16+8*words]
	clear(buf[:8])
	binary.LittleEndian.PutUint64(buf[8:], number)
	x := (number + 1) * 0x9e3779b97f4a7c15
	for i := 16; i < len(buf); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(buf[i:], x)
	}
	return buf
}

// end asks no more. The guest, which runs, must be heard once more within the silence that is allowed; then
// what is still on its way has as long.
func (k *talker) end() {
	k.t.Helper()
	now := time.Now()
	limit := time.NewTimer(bootTime) // it may just be booting; judge bounds the silence of one that is up
	defer limit.Stop()
	if !k.until(limit.C, func(last answer) bool { return k.sent[last.number].After(now) }) {
		k.t.Errorf("%s is not heard any more: for %v after all was over", k.name, bootTime)
	}
	close(k.quit)
	limit.Reset(talkSilence)
	k.until(limit.C, func(last answer) bool { return last.number == uint64(len(k.sent))-1 })
	_ = k.conn.Close()
	k.all.Wait()
}

// until waits for an answer of which f is true; f is called under k.mu.
func (k *talker) until(limit <-chan time.Time, f func(last answer) bool) bool {
	for {
		k.mu.Lock()
		n := len(k.answers)
		ok := n > 0 && f(k.answers[n-1])
		k.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-k.more:
		case <-limit:
			return false
		}
	}
}

// boots counts the boots that answered. After end.
func (k *talker) boots() int {
	seen := map[uint64]bool{}
	for _, a := range k.answers {
		seen[a.boot] = true
	}
	return len(seen)
}

// judge: what a boot of the guest was asked between its first answer and its last one, it answered once,
// unchanged. (What was asked before waits in the tap as far as there is room.) Only around a NetBack's death may one be lost or come twice: where it died
// between the sending of the last one that came through before and the coming of the first one after.
// No boot is silent for longer than 10 s. After end.
func (k *talker) judge(deaths []death) {
	k.t.Helper()
	faults, lost, twice, longest := judge(k.sent, k.answers, deaths)
	for _, f := range faults {
		k.t.Errorf("%s: %s", k.name, f)
	}
	k.t.Logf("%s: %d datagrams, %d answers of %d boots, %d lost and %d twice around %d deaths of NetBacks, silent for %v at most",
		k.name, len(k.sent), len(k.answers), k.boots(), lost, twice, len(deaths), longest.Round(time.Millisecond))
}

func judge(sent []time.Time, answers []answer, deaths []death) (faults []string, lost, twice int, longest time.Duration) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	died := func(from, to time.Time) bool {
		return slices.ContainsFunc(deaths, func(d death) bool { return !d.to.Before(from) && !d.from.After(to) })
	}
	first := map[uint64]map[uint64]time.Time{}                 // by boot and number
	up, last := map[uint64]time.Time{}, map[uint64]time.Time{} // by boot
	for _, a := range answers {
		if first[a.boot] == nil {
			first[a.boot], up[a.boot] = map[uint64]time.Time{}, a.at
		} else if silence := a.at.Sub(last[a.boot]); silence > longest {
			longest = silence
		}
		last[a.boot] = a.at
		if _, again := first[a.boot][a.number]; !again {
			first[a.boot][a.number] = a.at
			continue
		}
		twice++
		if !died(sent[a.number], a.at) {
			fault("datagram %d came twice, and no NetBack had died", a.number)
		}
	}
	for boot, at := range first {
		numbers := make([]uint64, 0, len(at))
		for n := range at {
			numbers = append(numbers, n)
		}
		slices.Sort(numbers)
		for i := 1; i < len(numbers); i++ {
			before, after := numbers[i-1], numbers[i]
			for before+1 < after && sent[before+1].Before(up[boot]) {
				before++
			}
			if after == before+1 {
				continue
			}
			lost += int(after - before - 1)
			if !died(sent[before], at[after]) {
				fault("datagrams %d to %d, sent from %v to %v, are lost, and no NetBack had died", before+1, after-1, sent[before+1], sent[after-1])
			}
		}
	}
	if longest > talkSilence {
		fault("silent for %v", longest)
	}
	return faults, lost, twice, longest
}

// TestTalkerJudges: what is lost, comes twice or is silent is found, and allowed where it is.
func TestTalkerJudges(t *testing.T) {
	zero := time.Unix(0, 0)
	at := func(second float64) time.Time { return zero.Add(time.Duration(second * float64(time.Second))) }
	var sent []time.Time // one a second
	for i := range 60 {
		sent = append(sent, at(float64(i)))
	}
	on := func(boot uint64, numbers ...uint64) (all []answer) {
		for _, n := range numbers {
			all = append(all, answer{boot, n, at(float64(n) + 0.1)})
		}
		return all
	}
	kill := func(seconds ...float64) (all []death) {
		for _, s := range seconds {
			all = append(all, death{at(s), at(s)})
		}
		return all
	}
	for name, c := range map[string]struct {
		answers []answer
		deaths  []death
		want    string
	}{
		"whole":                        {on(1, 0, 1, 2, 3), nil, ""},
		"lost":                         {on(1, 0, 1, 4, 5), nil, "datagrams 2 to 3"},
		"lost around a death":          {on(1, 0, 1, 4, 5), kill(2.5), ""},
		"lost after a death":           {on(1, 0, 1, 2, 3, 5), kill(1.5), "datagrams 4 to 4"},
		"lost before a death":          {on(1, 0, 2, 3, 4, 5), kill(3.5), "datagrams 1 to 1"},
		"lost between two of several":  {on(1, 0, 2, 3, 5), kill(1, 4), ""},
		"lost while it was down":       {append(on(1, 0, 1), on(2, 7, 8)...), nil, ""},
		"lost by its second boot":      {append(on(1, 0, 1), on(2, 7, 9)...), nil, "datagrams 8 to 8"},
		"twice":                        {append(on(1, 0, 1), on(1, 1, 2)...), nil, "1 came twice"},
		"twice around a death":         {append(on(1, 0, 1), on(1, 1, 2)...), kill(1.05), ""},
		"silent, though there a death": {on(1, 0, 1, 12, 13), kill(1.5), "silent for 11s"},
		"asked before it was up":       {[]answer{{1, 0, at(7.5)}, {1, 5, at(7.6)}, {1, 8, at(8.1)}, {1, 9, at(9.1)}}, nil, ""},
		"lost when it was up":          {[]answer{{1, 0, at(7.5)}, {1, 5, at(7.6)}, {1, 9, at(9.1)}}, nil, "8 to 8"},
		"down for long":                {append(on(1, 0, 1), on(2, 30, 31)...), nil, ""},
	} {
		faults, _, _, _ := judge(sent, c.answers, c.deaths)
		if all := strings.Join(faults, "; "); (len(faults) == 0) != (c.want == "") || !strings.Contains(all, c.want) {
			t.Errorf("%s: %q, want %q", name, all, c.want)
		}
	}
}
