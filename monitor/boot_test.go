package monitor

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
)

// Every Debian kernel boots unmodified, with one processor and with several, and sees the
// machine it was given.
func TestBootKernels(t *testing.T) {
	lab.NeedsKVM(t)
	for _, c := range []struct {
		kernel string
		vcpus  int
	}{
		{"6.1", 1}, {"6.1", 2}, {"6.1", 4}, {"6.12", 1}, {"6.12", 2}, {"6.12", 4}, {"6.1-cloud", 2}, {"6.12-cloud", 2},
	} {
		t.Run(fmt.Sprintf("%s-%dvcpu", c.kernel, c.vcpus), func(t *testing.T) {
			g := boot{kernel: c.kernel, vcpus: c.vcpus, what: "facts"}.build(t)
			g.expect(t, PowerOff)
			g.check(t, "CPUS", strconv.Itoa(c.vcpus))
			g.check(t, "CLOCK", "kvm-clock")
			g.check(t, "PCI", "1")
			for _, bad := range []string{"lockup", "stall", "TSC_DEADLINE disabled", "irq"} {
				if strings.Contains(g.console.String(), bad) {
					t.Errorf("the guest complains of %q:\n%s", bad, g.console)
				}
			}
		})
	}
}

// The kernel keeps its address randomisation: of four boots at least two differ, none is at
// the default address.
func TestBootKASLR(t *testing.T) {
	lab.NeedsKVM(t)
	seen := map[string]bool{}
	// There are some hundred places for it in so little memory: two boots may well agree, four do not.
	for n := 0; n < 4 && len(seen) < 2; n++ {
		g := boot{what: "facts"}.build(t)
		g.expect(t, PowerOff)
		seen[g.console.value("TEXT")] = true
	}
	if len(seen) < 2 || seen["01000000"] {
		t.Errorf("kernel text at %v", seen)
	}
}

func TestBootMemory(t *testing.T) {
	lab.NeedsKVM(t)
	for _, c := range []struct {
		mib     uint64
		minimum int // KiB that the guest must see
		high    string
	}{
		{128, 70 << 10, "0"},
		{3584, 3300 << 10, "1"}, // 512 MiB of it above 4 GiB
	} {
		t.Run(fmt.Sprintf("%dMiB", c.mib), func(t *testing.T) {
			g := boot{memory: c.mib << 20, what: "facts"}.build(t)
			g.expect(t, PowerOff)
			if n, err := strconv.Atoi(g.console.value("MEM")); err != nil || n < c.minimum {
				t.Errorf("the guest sees %q KiB, want at least %d", g.console.value("MEM"), c.minimum)
			}
			g.check(t, "HIGH", c.high)
		})
	}
}

// Each way a guest can end is told apart.
func TestEndings(t *testing.T) {
	lab.NeedsKVM(t)
	for _, c := range []struct {
		name, what, extra string
		want              Kind
	}{
		{"reboot by ACPI", "reboot", "", Reboot},
		{"reboot by keyboard controller", "reboot", "reboot=k", Reboot},
		{"reboot by triple fault", "reboot", "reboot=t", TripleFault},
		{"reboot by chipset", "reboot", "reboot=p", Reboot},
		{"sysrq", "sysrq", "", Reboot},
		{"panic", "panic", "", Reboot},
	} {
		t.Run(c.name, func(t *testing.T) {
			boot{vcpus: 2, what: c.what, extra: c.extra}.build(t).expect(t, c.want)
		})
	}
}

// The context's end stops a guest that would run for ever, and its input goroutine.
func TestStop(t *testing.T) {
	lab.NeedsKVM(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	input := make(chan []byte)
	g := boot{vcpus: 2, what: "wait", change: func(c *Config) { c.ConsoleIn = input }}.build(t)
	ready := g.console.saw("READY")
	done := make(chan Outcome)
	go func() {
		o, err := g.Run(ctx)
		if err != nil {
			t.Error(err)
		}
		done <- o
	}()
	<-ready
	why := errors.New("told to")
	cancel(why)
	if o := <-done; o != (Outcome{Stopped, "told to"}) {
		t.Errorf("outcome %v", o)
	}
	if err := g.PowerButton(); err == nil {
		t.Error("the power button of an ended machine works")
	}
	if _, err := g.Run(t.Context()); err == nil {
		t.Error("a machine runs twice")
	}
}

func TestPowerButton(t *testing.T) {
	lab.NeedsKVM(t)
	for _, kernel := range []string{debian.Usual, "6.12-cloud"} {
		t.Run(kernel, func(t *testing.T) {
			g := boot{kernel: kernel, what: "button", modules: []string{"button", "evdev"}}.build(t)
			ready := g.console.saw("READY")
			go func() {
				<-ready
				if err := g.PowerButton(); err != nil {
					t.Error(err)
				}
			}()
			g.expect(t, PowerOff)
			if !strings.Contains(g.console.String(), "PRESSED") {
				t.Errorf("the guest did not feel the button:\n%s", g.console)
			}
		})
	}
}

func TestConsoleInput(t *testing.T) {
	lab.NeedsKVM(t)
	input := make(chan []byte)
	g := boot{what: "echo", change: func(c *Config) { c.ConsoleIn = input }}.build(t)
	ready := g.console.saw("READY")
	go func() {
		<-ready
		input <- []byte("a line of input, longer than the FIFO is deep\n")
		close(input)
	}()
	g.expect(t, PowerOff)
	g.check(t, "GOT", "a line of input, longer than the FIFO is deep")
}

// A paused guest runs nothing, and afterwards its clocks have not moved.
func TestPause(t *testing.T) {
	lab.NeedsKVM(t)
	const pause = 4 * time.Second
	g := boot{vcpus: 2, what: "clock"}.build(t)
	ticking := g.console.saw("T ")
	go func() {
		<-ticking
		if err := g.Pause(); err != nil {
			t.Error(err)
		}
		before, exits := len(g.console.String()), g.Stats().Exits["io"]
		<-time.After(pause)
		if n := len(g.console.String()); n != before || g.Stats().Exits["io"] != exits {
			t.Errorf("a paused guest printed %d bytes", n-before)
		}
		if err := g.Resume(); err != nil {
			t.Error(err)
		}
	}()
	g.expect(t, PowerOff)
	var last, lastDate float64
	ticks := 0
	for _, l := range strings.Split(g.console.String(), "\n") {
		var up, date float64
		if n, _ := fmt.Sscanf(strings.TrimSpace(l), "T %f %f", &up, &date); n != 2 {
			continue
		}
		if ticks++; ticks > 1 && (up-last > pause.Seconds()/2 || up < last || date-lastDate > pause.Seconds()/2 || date < lastDate) {
			t.Errorf("clock went from %.2f to %.2f, date from %.0f to %.0f", last, up, lastDate, date)
		}
		last, lastDate = up, date
	}
	if ticks < 90 {
		t.Errorf("%d ticks; console:\n%s", ticks, g.console)
	}
}

// check compares what the guest printed after key.
func (g *guest) check(t *testing.T, key, want string) {
	t.Helper()
	if got := g.console.value(key); got != want {
		t.Errorf("%s is %q, want %q; console:\n%s", key, got, want, g.console)
	}
}
