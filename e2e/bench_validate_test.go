package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/services/blkback"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/validator"
	"redoubt.dev/redoubt/spec"
)

// minValidations is how many validations a median is taken of, however few -benchtime asks for.
const minValidations = 5

// rounds does something as often as -benchtime asks for, and at least so often.
func rounds(b *testing.B, least int, do func()) {
	b.Helper()
	n := 0
	for ; b.Loop(); n++ {
		do()
	}
	for ; n < least; n++ {
		do()
	}
}

// in is the same host for a benchmark within the one that began it.
func (h *host) in(b *testing.B) *host {
	inner := *h
	inner.t = b
	return &inner
}

// BenchmarkGuestPause: how long a validation holds a guest, medians of what its reports say: ms is how long its processors
// stand still, for the snapshot's beginning and all that comes with it (messages to the emulator and to BlkBack and back), and ms-io how long
// changes of its disk wait. The disks are sparse: their sizes are the file systems'. Between two validations the guest
// writes a little and syncs. That of 100GiB-writing writes directly and without end, so that a request is nearly always in flight;
// where no moment is safe --force takes one that is not. safe is the share of those that were.
func BenchmarkGuestPause(b *testing.B) {
	eachEmulator(b, func(b *testing.B, s starter) {
		for i, size := range []string{"1GiB", "10GiB", "100GiB", "100GiB-writing"} {
			b.Run(size, func(b *testing.B) {
				size, writing := strings.CutSuffix(size, "-writing")
				guestPause(b, s.in(b), s.emulator, fmt.Sprintf("pause-%d", i), size, writing)
			})
		}
	})
}

func guestPause(b *testing.B, h *host, emulator, name, size string, writing bool) {
	h.must("run", h.validatedSpec(name, emulator, h.emptyDisk(name, size), "", "validation:\n  scratch: 256MiB\n"))
	h.await(name, "READY", bootTime)
	key := h.path(name + ".key")
	h.must("baseline", "key", key)
	h.must("baseline", "create", name, "--key", key)
	sh := h.shell(name)
	var args []string
	if writing {
		sh.does("(while :; do dd if=/dev/zero of=/disk/load bs=4k count=4096 oflag=direct conv=notrunc 2>/dev/null; done) &")
		args = append(args, "--force")
	}
	var held, io []time.Duration
	safe, tries := 0, 0
	rounds(b, 6*minValidations, func() { // which are short, and their times scatter
		if !writing {
			sh.does("date >>/disk/diary; sync")
		}
		v := h.validate(name, args...)
		if len(v.Findings) > 0 || len(v.Snapshots) != 1 {
			b.Fatalf("%+v", v)
		}
		p := v.Snapshots[0]
		held, io, tries = append(held, p.Held), append(io, p.HeldIO), tries+p.Tries
		if p.Safe {
			safe++
		}
	})
	b.Logf("processors held %v, I/O %v; %d of %d snapshots safe, after %d moments", held, io, safe, len(held), tries)
	b.ReportMetric(milliseconds(median(held)), "ms")
	b.ReportMetric(milliseconds(median(io)), "ms-io")
	b.ReportMetric(milliseconds(slices.Max(held)), "ms-most")
	if writing {
		b.ReportMetric(float64(safe)/float64(len(held)), "safe")
	}
	b.ReportMetric(0, "ns/op")
	h.must("stop", name, "--grace", "0s")
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// emptyDisk makes a sparse disk with an empty file system on it, as large as mke2fs says sizes.
func (h *host) emptyDisk(name, size string) string {
	h.t.Helper()
	disk := h.path(name + ".img")
	c := h.cache.Command(h.t.Context(), "mke2fs", "-q", "-F", "-t", "ext4", "-N", "16384", "-J", "size=64",
		"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", disk, strings.TrimSuffix(size, "iB"))
	if out, err := c.CombinedOutput(); err != nil {
		h.t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	return disk
}

// BenchmarkWriteUnderSnapshot: the ratio of a guest's write bandwidth while a snapshot of its disk is open to that without one, in turns,
// medians: what copying before each first change of a block costs. The guest is one of QEMU's and writes directly to its whole disk;
// the disk is served by BlkBack's code in this process, with the map of changes that it has in the product, and snapshots begin as the
// Builder has them begun. Nobody reads the snapshot meanwhile: an inspector would take processors, not the disk. The image lies
// in memory, so that the host's disk, the same for both, hides nothing. copied is how much of what was written under the snapshot was copied:
// where that is little, blocks were written again and the ratio says little. A snapshot that is lost fails.
func BenchmarkWriteUnderSnapshot(b *testing.B) {
	if os.Getenv(lab.InLab) != "" {
		b.Skip("QEMU's guests are for the host, where `make bench` runs this")
	}
	for _, w := range []string{"seqwrite", "randwrite"} {
		b.Run(w, func(b *testing.B) { writeUnderSnapshot(b, w) })
	}
}

// Of BenchmarkWriteUnderSnapshot: there is a copy's room for all of the disk.
const (
	snapshotDisk    = 1 << 30
	snapshotSeconds = 2 // of the guest's, with the snapshot and without
)

func writeUnderSnapshot(b *testing.B, workload string) {
	d := serveDisk(b, snapshotDisk)
	console := d.underQEMU(b, workload)
	var ratios, copied []float64
	var without, with []float64
	before := throughput(measure(b, console, snapshotSeconds))
	rounds(b, minValidations, func() {
		copies := d.begin(b)
		begun := measure(b, console, 1) // in part of before
		during := measure(b, console, snapshotSeconds)
		n := d.end(b, copies)
		measure(b, console, 1)
		after := throughput(measure(b, console, snapshotSeconds))
		ratios = append(ratios, 2*throughput(during)/(before+after))
		copied = append(copied, float64(n)/(throughput(append(begun, during...))*(1+snapshotSeconds)))
		with, without = append(with, throughput(during)), append(without, before)
		before = after
	})
	b.Logf("with a snapshot %.0f, without %.0f bytes/s; ratios %.3f, copied %.2f", with, without, ratios, copied)
	if middle(copied) < 0.1 {
		b.Errorf("of what was written %.2f was copied: nearly all was written again", middle(copied))
	}
	b.ReportMetric(middle(ratios), "ratio")
	b.ReportMetric(middle(copied), "copied")
	b.ReportMetric(middle(with)/1e6, "MB/s")
	b.ReportMetric(middle(without)/1e6, "MB/s-without")
	b.ReportMetric(0, "ns/op")
}

// A servedDisk is one that BlkBack serves in this process, and this is its Builder.
type servedDisk struct {
	size                   int64
	image, memory, changes *os.File
	front                  *os.File // for the emulator
	builder                *rpc.Peer
}

const servedMemory = 256 << 20

func serveDisk(b *testing.B, size int64) *servedDisk {
	b.Helper()
	d := &servedDisk{size: size}
	for _, f := range []struct {
		into **os.File
		size int64
	}{{&d.image, size}, {&d.memory, servedMemory}, {&d.changes, block.ChangesSize(size)}} {
		var err error
		if *f.into, err = memfd.New("bench", f.size); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = (*f.into).Close() })
	}
	chunk := bytes.Repeat([]byte{0xa5}, 1<<20)
	for at := int64(0); at < size; at += int64(len(chunk)) { // a page that is written first is another's price
		if _, err := d.image.WriteAt(chunk, at); err != nil {
			b.Fatal(err)
		}
	}
	ours, theirs, err := ipc.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	d.builder = rpc.New(ours, nil)
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() { _ = d.builder.Run(ctx) })
	all.Go(func() { _ = blkback.Serve(ctx, slog.New(slog.NewTextHandler(b.Output(), nil)), theirs) })
	b.Cleanup(func() { cancel(); _ = d.builder.Close(); all.Wait() })
	back, front, err := ipc.Streams("disk")
	if err != nil {
		b.Fatal(err)
	}
	d.front = front
	_, err = d.builder.Call(ctx, protocol.MethodAttachDisk, protocol.AttachDisk{
		Files: protocol.Files{protocol.FileDisk, protocol.FileMemory, protocol.FileBlock, protocol.FileChanges},
	}, nil, d.image, d.memory, back, d.changes)
	_ = back.Close()
	if err != nil {
		b.Fatal(err)
	}
	return d
}

// underQEMU starts a guest that has the disk and a workload, and returns its console once that is under way.
func (d *servedDisk) underQEMU(b *testing.B, workload string) *bufio.Scanner {
	b.Helper()
	h := newDownHost(b)
	b.Setenv("REDOUBT_TOOLS", h.cache.Tools())
	vmlinuz, err := h.cache.Vmlinuz(debian.Usual)
	if err != nil {
		b.Fatal(err)
	}
	own, err := ipc.Duplicate(d.memory)
	if err != nil {
		b.Fatal(err)
	}
	files := qemu.Files{RAM: own[0], Disks: []qemu.Disk{{Socket: d.front}}}
	if files.Kernel, err = os.Open(vmlinuz); err != nil {
		b.Fatal(err)
	}
	if files.Initrd, err = os.Open(initrd(b, h.cache, debian.Usual, true)); err != nil {
		b.Fatal(err)
	}
	console, theirs := consolePair(b)
	files.Console = theirs
	accel, _ := qemu.ChooseAccel()
	ctx, cancel := context.WithCancel(context.Background())
	m := qemu.New(qemu.Config{
		Name: "written", Memory: servedMemory, CPUs: 1, Accel: accel, TPM: qemu.NoTPM, CommandLine: "console=ttyS0 quiet e2e=io io=" + workload,
	}, qemu.Hooks{})
	if err := m.Start(ctx, files, nil); err != nil {
		cancel()
		b.Fatal(err)
	}
	late := time.AfterFunc(5*time.Minute, func() { _ = console.Close() })
	b.Cleanup(func() { late.Stop(); cancel(); _, _ = m.Wait() })
	lines := bufio.NewScanner(console)
	measure(b, lines, 3) // while it boots its first second may be short
	return lines
}

// begin begins a snapshot while requests are in flight, and returns the memory of its copies.
func (d *servedDisk) begin(b *testing.B) *os.File {
	b.Helper()
	f, err := memfd.New("snapshot", block.SnapshotSize(d.size))
	if err != nil {
		b.Fatal(err)
	}
	hears, stopped, err := ipc.OneWay()
	if err != nil {
		b.Fatal(err)
	}
	tells, begun, err := ipc.OneWay()
	if err != nil {
		b.Fatal(err)
	}
	defer ipc.CloseAll([]*os.File{hears, stopped, tells, begun})
	if _, err := stopped.Write([]byte{1}); err != nil { // it goes on, and is to be snapshotted all the same
		b.Fatal(err)
	}
	var out protocol.Snapshotted
	_, err = d.builder.Call(b.Context(), protocol.MethodSnapshot, protocol.Snapshot{
		Disks: []int{0}, Scratch: d.size, Validated: true, Force: true,
		Files: protocol.Files{protocol.FileSnapshot, protocol.FileStopped, protocol.FileBegun},
	}, &out, f, hears, begun)
	if err != nil {
		b.Fatal(err)
	}
	return f
}

// end ends it and says how much was copied, in bytes.
func (d *servedDisk) end(b *testing.B, f *os.File) int64 {
	b.Helper()
	defer f.Close()
	if _, err := d.builder.Call(b.Context(), protocol.MethodDropSnapshot, struct{}{}, nil); err != nil {
		b.Fatal(err)
	}
	s, err := block.OpenSnapshot(f, d.size, d.size)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if s.Lost() {
		b.Fatal("the snapshot was lost: what was measured is writing without one")
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		b.Fatal(err)
	}
	return st.Blocks * 512 // sparse: the copies and their table
}

// BenchmarkQuarantine: how long after it was decided a guest is heard last from outside that goes into quarantine. It is asked each
// millisecond. ms is from the time that the audit log has for the verdict, taken before that is written, to the last answer; ms-command from
// before `redoubt quarantine` is started, its process included; medians. ms-gap is the longest time between two answers within the
// second before the last, the resolution of both; ms-in-force bounds ms whatever it is: until the audit log has it that the network is
// what the verdict asks for. Released, the guest must be heard again.
func BenchmarkQuarantine(b *testing.B) {
	emulator := emulators()[0]
	b.Run(emulator, func(b *testing.B) {
		name, outside := newUplink(b)
		h := newHost(b, "--uplink", name+":10", "--reset", "netback=off,blkback=off")
		key := h.path("web.key")
		public := strings.TrimSpace(h.must("baseline", "key", key))
		h.must("run", h.validatedSpec("web", emulator, h.rootDisk("web"), "ip=192.0.2.1", "nics:\n- vlan: 10\n"+
			"validation:\n  signers: ["+public+"]\n  respond:\n    critical: [quarantine]\n"))
		h.await("web", "READY", bootTime)
		h.must("baseline", "create", "web", "--key", key)
		h.shell("web").does("echo backdoor >/disk/usr/bin/login; sync")
		p := askEachMillisecond(b, outside)
		var verdicts, inForce, commands, gaps []time.Duration
		rounds(b, minRounds, func() {
			p.hear(b)
			begin := time.Now()
			v := h.validate("web")
			if !slices.Contains(v.Responses, spec.Quarantine) {
				b.Fatalf("%+v", v)
			}
			last, gap := p.last(b)
			decided, done := h.decided(begin)
			verdicts, inForce, gaps = append(verdicts, max(0, last.Sub(decided))), append(inForce, done.Sub(decided)), append(gaps, gap)
			h.must("release", "web")

			p.hear(b)
			begin = time.Now()
			h.must("quarantine", "web")
			last, gap = p.last(b)
			commands, gaps = append(commands, max(0, last.Sub(begin))), append(gaps, gap)
			h.must("release", "web")
		})
		p.hear(b)
		b.Logf("from the verdict %v, in force %v, from the command %v; gaps %v", verdicts, inForce, commands, gaps)
		b.ReportMetric(milliseconds(median(verdicts)), "ms")
		b.ReportMetric(milliseconds(slices.Max(verdicts)), "ms-most")
		b.ReportMetric(milliseconds(median(inForce)), "ms-in-force")
		b.ReportMetric(milliseconds(median(commands)), "ms-command")
		b.ReportMetric(milliseconds(median(gaps)), "ms-gap")
		b.ReportMetric(0, "ns/op")
	})
}

// decided is when the first verdict since begin was that something follows, and when that was done, as the audit log has it.
func (h *host) decided(begin time.Time) (verdict, done time.Time) {
	h.t.Helper()
	for r, err := range audit.Records(h.path("state", audit.Dir)) {
		switch {
		case err != nil:
			h.t.Fatal(err)
		case r.Time.Before(begin):
		case r.Act == validator.ActValidate && r.Detail["responses"] != "":
			verdict = r.Time
		case r.Act == validator.ActRespond && r.Outcome == audit.Done && !verdict.IsZero():
			return verdict, r.Time
		}
	}
	h.t.Fatal("the audit log has no such verdict, or not that it was followed")
	return verdict, done
}

// An echo asks a guest each millisecond and knows when it answered.
type echo struct {
	mu      sync.Mutex
	answers []time.Time
	more    chan struct{} // has room for one: an answer came
}

func askEachMillisecond(b *testing.B, outside *network.Namespace) *echo {
	b.Helper()
	var c net.PacketConn
	err := outside.Do(func() (err error) { c, err = net.ListenPacket("ip4:icmp", "192.0.2.100"); return err })
	if err != nil {
		b.Fatal(err)
	}
	p := &echo{more: make(chan struct{}, 1)}
	over := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		t := time.NewTicker(time.Millisecond)
		defer t.Stop()
		for seq := uint16(0); ; seq++ {
			request := binary.BigEndian.AppendUint16([]byte{8, 0, 0, 0, 0, 0}, seq)
			binary.BigEndian.PutUint16(request[2:], ^uint16((0x0800+uint32(seq))%0xffff))
			_, _ = c.WriteTo(request, &net.IPAddr{IP: net.IPv4(192, 0, 2, 1)}) // nobody there is silence, too
			select {
			case <-t.C:
			case <-over:
				return
			}
		}
	})
	all.Go(func() {
		buf := make([]byte, 256)
		for {
			n, _, err := c.ReadFrom(buf)
			if err != nil {
				return // it is closed
			}
			if n < 1 || buf[0] != 0 {
				continue
			}
			p.mu.Lock()
			p.answers = append(p.answers, time.Now())
			p.mu.Unlock()
			select {
			case p.more <- struct{}{}:
			default:
			}
		}
	})
	b.Cleanup(func() { close(over); _ = c.Close(); all.Wait() })
	return p
}

// hear waits until the guest has answered for a while, and forgets what was before.
func (p *echo) hear(b *testing.B) {
	b.Helper()
	p.mu.Lock()
	p.answers = nil
	p.mu.Unlock()
	limit := time.NewTimer(bootTime)
	defer limit.Stop()
	for n := 0; n < 50; {
		select {
		case <-p.more:
		case <-limit.C:
			b.Fatalf("the guest is not heard: %d answers in %v", n, bootTime)
		}
		p.mu.Lock()
		n = len(p.answers)
		p.mu.Unlock()
	}
}

// quarantineSilence is how long a guest must not be heard to be in quarantine.
const quarantineSilence = 500 * time.Millisecond

// last waits until the guest is silent and returns when it was heard last, and the longest gap in the second before.
func (p *echo) last(b *testing.B) (last time.Time, gap time.Duration) {
	b.Helper()
	silent := time.NewTimer(quarantineSilence)
	defer silent.Stop()
	limit := time.NewTimer(bootTime)
	defer limit.Stop()
	for over := false; !over; {
		select {
		case <-p.more:
			silent.Reset(quarantineSilence)
		case <-silent.C:
			over = true
		case <-limit.C:
			b.Fatal("the guest in quarantine is still heard")
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	last = p.answers[len(p.answers)-1]
	for i := len(p.answers) - 1; i > 0 && last.Sub(p.answers[i]) < time.Second; i-- {
		gap = max(gap, p.answers[i].Sub(p.answers[i-1]))
	}
	return last, gap
}
