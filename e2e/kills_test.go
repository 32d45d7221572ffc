package e2e

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/services"
)

// How long services are killed: for a moment in every run of the tests, and for
// REDOUBT_SOAK_MINUTES in the soak.
const (
	killsFor     = 20 * time.Second
	soakKillsFor = 10 // minutes
)

func TestKillsQEMU(t *testing.T) { kills(t, "qemu", killsFor) }

func TestKillsNative(t *testing.T) {
	lab.NeedsKVM(t)
	kills(t, "native", killsFor)
}

func TestSoakKillsQEMU(t *testing.T) {
	if os.Getenv(lab.InLab) != "" {
		t.Skip("QEMU's guests are for the host, where `make soak` runs this")
	}
	kills(t, "qemu", soakMinutes(t))
}

func TestSoakKillsNative(t *testing.T) {
	lab.NeedsKVM(t)
	kills(t, "native", soakMinutes(t))
}

func soakMinutes(t *testing.T) time.Duration {
	t.Helper()
	if os.Getenv("REDOUBT_SOAK") != "1" {
		t.Skip("takes ten minutes: run it by `make soak`")
	}
	return time.Duration(soakSetting(t, "REDOUBT_SOAK_MINUTES", soakKillsFor)) * time.Minute
}

// soakSetting is a number that the environment may set.
func soakSetting(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// kills kills each service that guests outlive, the Builder too, and has those replaced in good order that can be, at
// random moments under two guests that write to their disks and verify it without end; one of them
// has an overlay and reboots again and again, by itself, by its power button and by force. No guest sees an error,
// nothing that was flushed is lost, trust is kept, and nothing of the dead is left. Each has a NIC and answers datagrams
// from outside all the time: see [talker.judge].
func kills(t *testing.T, emulator string, length time.Duration) {
	seed := soakSetting(t, "REDOUBT_SOAK_SEED", uint64(time.Now().UnixNano()))
	t.Logf("%v of kills; REDOUBT_SOAK_SEED=%d repeats their choice", length, seed)
	uplink, outside := newUplink(t)
	h := newHost(t, "--uplink", uplink+":10", "--reset", "blkback=7s,netback=off")
	// NetBack comes with the first guest that has a NIC, and stays.
	h.start(start{name: "first", emulator: emulator, what: "off", args: []string{"--no-tpm", "--nic", "vlan=10"}})
	h.must("stop", "first", "--grace", "0s")
	h.must("rm", "first")
	before := h.settled()
	// Guests on a machine this busy are told not to judge their timers by it.
	steady := &verifier{host: h, name: "steady", facts: map[string]string{}}
	restless := &verifier{host: h, name: "restless", facts: map[string]string{}}
	for i, v := range []*verifier{steady, restless} {
		v.address = fmt.Sprintf("192.0.2.%d", 11+i)
		disk, cmdline := h.path(v.name+".img"), fmt.Sprintf("no_timer_check net=%d", 11+i)
		h.must("disk", "create", disk, "4MiB")
		if v == restless {
			cmdline += " rounds=6"
			h.must("disk", "create", "--base", disk, disk+".overlay")
			disk = "path=" + disk + ".overlay,base=" + disk
		}
		h.start(start{name: v.name, emulator: emulator, what: "verify", cmdline: cmdline, withGuest: true, args: []string{"--disk", disk, "--nic", "vlan=10,address=" + v.address}})
	}
	for _, v := range []*verifier{steady, restless} {
		h.await(v.name, "ROUND 2\n", 2*bootTime)
	}
	h.must("attest", steady.name, "--save-policy", h.path("good.yaml"))

	for _, v := range []*verifier{steady, restless} {
		v.talker = talk(t, v.name, outside, v.address)
	}
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var both sync.WaitGroup
	var deaths []death // of NetBacks
	rarer := time.Duration(1)
	if length > time.Minute { // In the lab a Builder takes six seconds to come up: there would be none for longer than a guest waits for its TPM.
		rarer = slow
	}
	both.Go(func() { deaths = fire(ctx, h, rand.New(rand.NewPCG(seed, 0)), rarer) })
	both.Go(func() { restless.restarts(ctx, rand.New(rand.NewPCG(seed, 1)), min(length/3, 45*time.Second)) })
	both.Wait()

	if length > killsFor { // else other tests run beside, and a guest's time is short without that
		h.must("attest", steady.name, "--policy", h.path("good.yaml")) // there is a manager again
		h.stall(vtpmProgram, 2*time.Second)
	}
	for _, v := range []*verifier{steady, restless} {
		v.goesOn()
	}
	for _, v := range []*verifier{steady, restless} {
		v.talker.end()
		v.talker.judge(deaths)
	}
	if steady.talker.boots() != 1 {
		t.Errorf("%s answered as %d boots", steady.name, steady.talker.boots())
	}
	h.must("attest", steady.name, "--policy", h.path("good.yaml"))
	h.must("services")
	for _, v := range []*verifier{steady, restless} {
		h.must("stop", v.name, "--grace", "60s")
		v.check()
		g := h.show(v.name)
		if g.State != "stopped" {
			t.Errorf("%s is %s: %s", v.name, g.State, g.Reason)
		}
		// The restless one may just be rebooting by itself: then it is ended before its next start.
		c := h.console(v.name)
		rebooting := v == restless && (strings.Contains(g.Reason, "while it rebooted") ||
			strings.Contains(lastLines(strings.TrimSpace(c), 1), "reboot: Restarting system"))
		if !rebooting && !strings.Contains(c, "PRESSED") {
			t.Errorf("%s did not power off by itself\n%s", v.name, lastLines(c, 10))
		}
		t.Logf("%s: %d boots, last round %d", v.name, v.boots, v.round)
		h.must("rm", v.name)
	}
	h.nothingInStore()
	h.must("audit", "verify")
	h.must("services")
	h.letGo(before)
}

// stall has a program stand still: longer than some of a guest's TPM commands may take where it is the vTPM manager, and nobody
// tells of it.
func (h *host) stall(program string, length time.Duration) {
	h.t.Helper()
	goOn := h.holdStill(program)
	<-time.After(length)
	goOn()
}

// fire kills and resets at random moments until ctx ends, so many times rarer than once a second or so; it returns when it
// killed NetBacks.
func fire(ctx context.Context, h *host, random *rand.Rand, rarer time.Duration) (netbacks []death) {
	type act struct {
		name string
		do   func() int
	}
	var acts []act
	for i := range services.Table {
		// A toolstack's death ends the calls that are under way, which here would be the test's own;
		// see TestTenantsQEMU.
		if s := &services.Table[i]; s.Survived() && s.Name != services.Toolstack {
			acts = append(acts, act{"kill " + s.Name, func() int {
				pids := h.processes(s.Program)
				begin := time.Now()
				if len(pids) == 0 || unix.Kill(pids[random.IntN(len(pids))], unix.SIGKILL) != nil {
					return 0 // it is being replaced
				}
				if s.Name == services.NetBack {
					netbacks = append(netbacks, death{begin, time.Now()})
				}
				return 1
			}})
		}
	}
	// With the Builder all of them die.
	builder := func() bool {
		pids := h.processes("redoubt-builder")
		begin := time.Now()
		if len(pids) != 1 || unix.Kill(pids[0], unix.SIGKILL) != nil {
			return false
		}
		netbacks = append(netbacks, death{begin, begin.Add(time.Second)}) // the next one's comes as soon as it can
		return true
	}
	acts = append(acts, act{"kill builder", func() int {
		if !builder() {
			return 0
		}
		return 1
	}}, act{"kill builder twice", func() int {
		if !builder() {
			return 0
		}
		select {
		case <-ctx.Done():
			return 1
		case <-time.After(time.Duration(random.Int64N(int64(150 * time.Millisecond)))): // a moment nobody chose, while the next one takes over
		}
		if !builder() {
			return 1
		}
		return 2
	}})
	for _, name := range services.Resettable {
		if name == services.Toolstack {
			continue
		}
		acts = append(acts, act{"reset " + name, func() int {
			if name == services.Builder {
				netbacks = append(netbacks, death{time.Now(), time.Now().Add(2 * time.Second)})
			}
			if r := h.run("reset", name); r.status != 0 {
				h.t.Errorf("reset %s: %s", name, r.err)
			}
			return 1
		}})
	}
	done := map[string]int{}
	defer func() { h.t.Logf("done: %v", done) }()
	for {
		// No more than twenty in ten seconds: that is the bound at which the Builder gives up.
		pause := rarer * (550*time.Millisecond + time.Duration(random.Int64N(int64(600*time.Millisecond))))
		select {
		case <-ctx.Done():
			return netbacks
		case <-time.After(pause): // what is tested is a moment nobody chose
		}
		a := acts[random.IntN(len(acts))]
		done[a.name] += a.do()
	}
}

// A verifier is a guest that runs `guest verify`.
type verifier struct {
	*host
	name    string
	address string
	talker  *talker
	facts   map[string]string // what each boot has to tell alike
	read    string            // the console that was read last
	boots   int
	round   uint64
}

// restarts ends the guest at random moments and starts it anew, until ctx ends.
func (v *verifier) restarts(ctx context.Context, random *rand.Rand, most time.Duration) {
	for {
		pause := most/3 + time.Duration(random.Int64N(int64(most)))
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause): // the same
		}
		grace := []string{"0s", "30s"}[random.IntN(2)]
		if r := v.run("stop", v.name, "--grace", grace); r.status != 0 {
			v.t.Errorf("redoubt stop: %s", r.err)
			return
		}
		for {
			v.check() // the next start begins another console
			r := v.run("run", v.name)
			if r.status == 0 {
				break
			}
			// A Builder that dies over a first start takes it along, or it had just succeeded.
			if !strings.Contains(r.err, "were replaced over this") && !strings.Contains(r.err, "runs already") {
				v.t.Errorf("redoubt run: %s", r.err)
				return
			}
			if strings.Contains(v.must("ps"), v.name) {
				break
			}
		}
	}
}

var (
	verifyFact  = regexp.MustCompile(`(?m)^(AGG|PCR [0-9]) (\S+)\n`)
	verifyRound = regexp.MustCompile(`(?m)^(FOUND|ROUND) ([0-9]+)\n`)
)

// check reads a console: no error, every boot measured the same, no round was lost. A start that failed before its guest
// ran leaves the console that was read already.
func (v *verifier) check() {
	v.t.Helper()
	c := v.console(v.name)
	if c == v.read {
		return
	}
	v.read = c
	if regexp.MustCompile(`(DISK|NET|TPM)-ERROR|GUEST FAILED`).MatchString(c) {
		v.t.Errorf("%s:\n%s", v.name, lastLines(c, 20))
	}
	f := readFacts(c)
	if strings.Contains(c, "FOUND") {
		f.keptTrust(v.t)
	}
	for _, m := range verifyFact.FindAllStringSubmatch(c, -1) {
		if first := v.facts[m[1]]; first == "" {
			v.facts[m[1]] = m[2]
		} else if first != m[2] {
			v.t.Errorf("%s: %s is %s, at its first boot %s", v.name, m[1], m[2], first)
		}
	}
	if len(v.facts) != 11 || v.facts["PCR 4"] == strings.Repeat("0", 64) {
		v.t.Errorf("%s told %v", v.name, v.facts)
	}
	for _, m := range verifyRound.FindAllStringSubmatch(c, -1) {
		n, err := strconv.ParseUint(m[2], 10, 64)
		if err != nil {
			v.t.Fatal(err)
		}
		switch {
		case m[1] == "FOUND":
			v.boots++
			// The round's own mark may have come to the disk, and its line not to the console.
			if n != v.round && n != v.round+1 {
				v.t.Errorf("%s found round %d on its disk after round %d", v.name, n, v.round)
			}
		case n != v.round+1:
			v.t.Errorf("%s: round %d after round %d", v.name, n, v.round)
		}
		v.round = n
	}
}

// goesOn waits until the guest has done two rounds more, and its chain has grown.
func (v *verifier) goesOn() {
	v.t.Helper()
	rounds := verifyRound.FindAllStringSubmatch(v.console(v.name), -1)
	last := v.round
	if len(rounds) > 0 {
		last, _ = strconv.ParseUint(rounds[len(rounds)-1][2], 10, 64)
	}
	links := v.links()
	v.await(v.name, fmt.Sprintf("ROUND %d\n", last+2), 3*bootTime)
	for n := last + 3; v.links() == links; n++ {
		if n > last+100 {
			v.t.Errorf("%s: a chain of %s links for %d rounds", v.name, links, n-last)
			return
		}
		v.await(v.name, fmt.Sprintf("ROUND %d\n", n), 3*bootTime)
	}
}

var chainLinks = regexp.MustCompile(`(?m)^LINKS ([0-9]+)\n`)

// links is how many the guest's chain had at the last round.
func (v *verifier) links() string {
	v.t.Helper()
	all := chainLinks.FindAllStringSubmatch(v.console(v.name), -1)
	if len(all) == 0 {
		return "no"
	}
	return all[len(all)-1][1]
}

// holdings are what the processes that outlive all guests have: the Supervisor's descendants by name,
// zombies too, and each lasting one's descriptors by kind.
func (h *host) holdings() map[string]int {
	h.t.Helper()
	out := map[string]int{}
	for _, m := range h.family() {
		out["process "+m.name]++
		switch m.name {
		case "redoubt-supervi", "redoubt-builder", "redoubt-vtpm", "redoubt-toolsta": // as the kernel cuts names
			h.descriptors(out, m)
		}
	}
	return out
}

// A member is the Supervisor or a process that descends from it.
type member struct {
	name string // the kernel's, 15 bytes
	pid  int
}

// family is all of them, zombies too, the Supervisor first.
func (h *host) family() []member {
	h.t.Helper()
	b, err := os.ReadFile(h.path("run", "lock"))
	if err != nil {
		h.t.Fatal(err)
	}
	top, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		h.t.Fatal(err)
	}
	children := map[int][]int{}
	name := map[int]string{}
	all, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, p := range all {
		stat, err := os.ReadFile(p)
		if err != nil {
			continue // it ended meanwhile
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		head, rest, _ := strings.Cut(string(stat), ") ")
		_, name[pid], _ = strings.Cut(head, "(")
		if f := strings.Fields(rest); len(f) > 1 {
			parent, _ := strconv.Atoi(f[1])
			children[parent] = append(children[parent], pid)
		}
	}
	var out []member
	for next := []int{top}; len(next) > 0; next = next[1:] {
		out = append(out, member{name[next[0]], next[0]})
		next = append(next, children[next[0]]...)
	}
	return out
}

var inode = regexp.MustCompile(`\[?[0-9]+\]?|\(deleted\)`)

func (h *host) descriptors(out map[string]int, of member) {
	h.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", of.pid)
	list, err := os.ReadDir(dir)
	if err != nil {
		h.t.Fatal(err)
	}
	for _, e := range list {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil { // else it was closed meanwhile
			out[of.name+" "+inode.ReplaceAllString(to, "")]++
		}
	}
}

// settled waits until what the services start beside their readiness, the store's workers, is there.
func (h *host) settled() map[string]int {
	h.t.Helper()
	was := h.holdings()
	for alike := 0; alike < 20; {
		now := h.holdings()
		if alike++; !maps.Equal(now, was) {
			was, alike = now, 0
		}
	}
	return was
}

// letGo waits until what the guests needed is gone: their processes' ends are still being told.
func (h *host) letGo(before map[string]int) {
	h.t.Helper()
	var now map[string]int
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		if now = h.holdings(); maps.Equal(now, before) {
			return
		}
	}
	for _, what := range slices.Sorted(maps.Keys(now)) {
		if now[what] != before[what] {
			h.t.Errorf("%s: %d, before any guest %d", what, now[what], before[what])
		}
	}
}
