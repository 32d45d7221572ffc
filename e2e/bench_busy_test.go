package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// busySession says that this process is one of BenchmarkBusyHost's.
const busySession = "REDOUBT_E2E_BUSY_SESSION"

// BenchmarkBusyHost: ms-latest is how late a thread runs that had slept for 2 ms, at worst within four seconds and in the middle
// of the sessions, where each of three sessions a processor has one thread that never sleeps, as a guest's vCPU, and this one,
// as QEMU's main loop: with the kernel's autogroup and as `redoubt up` leaves the host.
func BenchmarkBusyHost(b *testing.B) {
	for _, c := range []struct{ name, setting string }{{"autogroup", "1\n"}, {"apart", "0\n"}} {
		b.Run(c.name, func(b *testing.B) {
			was, err := os.ReadFile(autogroup)
			if err != nil {
				b.Fatal(err)
			}
			if err := os.WriteFile(autogroup, []byte(c.setting), 0); err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() {
				if err := os.WriteFile(autogroup, was, 0); err != nil {
					b.Error(err)
				}
			})
			var latest []float64
			for b.Loop() {
				latest = append(latest, busyRound(b)...)
			}
			slices.Sort(latest)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(latest[len(latest)/2], "ms-latest")
		})
	}
}

// busyRound has the sessions run once, all at a time.
func busyRound(b *testing.B) (latest []float64) {
	b.Helper()
	var all []*exec.Cmd
	var said []*strings.Builder
	for range 3 * runtime.NumCPU() {
		c, out := exec.Command(os.Args[0]), &strings.Builder{}
		c.Env, c.Stdout, c.Stderr = append(os.Environ(), busySession+"=1"), out, os.Stderr
		c.SysProcAttr = &unix.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
		if err := c.Start(); err != nil {
			b.Fatal(err)
		}
		all, said = append(all, c), append(said, out)
	}
	for i, c := range all {
		if err := c.Wait(); err != nil {
			b.Fatal(err)
		}
		ms, err := strconv.ParseFloat(said[i].String(), 64)
		if err != nil {
			b.Fatal(err)
		}
		latest = append(latest, ms)
	}
	return latest
}

// busy is a session's process. It prints by how many milliseconds its second thread was late at worst.
func busy() {
	go func() {
		runtime.LockOSThread()
		for { //nolint:staticcheck // it is to be busy
		}
	}()
	runtime.LockOSThread()
	const pause = 2 * time.Millisecond
	var worst time.Duration
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); {
		before := time.Now()
		ts := unix.NsecToTimespec(int64(pause))
		if err := unix.Nanosleep(&ts, nil); err == nil {
			worst = max(worst, time.Since(before)-pause)
		}
	}
	fmt.Printf("%.2f", worst.Seconds()*1000)
}
