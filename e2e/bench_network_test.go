package e2e

import (
	"context"
	"encoding/binary"
	"net"
	"sync"
	"testing"
	"time"

	"redoubt.dev/redoubt/network"
)

// BenchmarkResetNetBack: how long a guest is not heard from outside when NetBack is replaced in good
// order, and when it is killed: the longest time between two of its answers, of which one is asked
// for each millisecond.
func BenchmarkResetNetBack(b *testing.B) {
	for _, how := range []string{"reset", "killed"} {
		b.Run(how, func(b *testing.B) {
			name, outside := newUplink(b)
			h := newHost(b, "--uplink", name+":10", "--reset", "netback=off")
			h.start(start{name: "server", emulator: "qemu", what: "net", cmdline: "net=server", args: []string{"--no-tpm", "--nic", "vlan=10,address=192.0.2.1"}})
			h.await("server", "READY", 2*bootTime)
			next := h.followEvents("server")
			ping(b, outside)
			var quiet, with []time.Duration
			for range 5 {
				quiet = append(quiet, longestSilence(b, outside, func() {
					h.must("services")
				}))
			}
			for b.Loop() {
				with = append(with, longestSilence(b, outside, func() {
					if how == "reset" {
						h.must("reset", "netback")
					} else {
						h.kill("NetBack", "redoubt-netback")
					}
					next("network", time.Minute)
				}))
			}
			b.Logf("longest silence %v, without replacement %v", with, quiet)
			b.ReportMetric(float64(median(with).Microseconds())/1000, "ms-downtime")
			b.ReportMetric(float64(median(quiet).Microseconds())/1000, "ms-quiet")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// longestSilence is the longest time between two answers of the guest while f runs.
func longestSilence(b *testing.B, outside *network.Namespace, f func()) time.Duration {
	b.Helper()
	var c net.PacketConn
	err := outside.Do(func() (err error) { c, err = net.ListenPacket("ip4:icmp", "192.0.2.100"); return err })
	if err != nil {
		b.Fatal(err)
	}
	late := time.AfterFunc(2*time.Minute, func() { _ = c.Close() })
	defer late.Stop()
	ctx, cancel := context.WithCancel(b.Context())
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	asking.Go(func() {
		defer func() { _ = c.Close() }()
		t := time.NewTicker(time.Millisecond)
		defer t.Stop()
		for seq := uint16(0); ; seq++ {
			request := binary.BigEndian.AppendUint16([]byte{8, 0, 0, 0, 0, 0}, seq)
			binary.BigEndian.PutUint16(request[2:], ^uint16((0x0800+uint32(seq))%0xffff))
			if _, err := c.WriteTo(request, &net.IPAddr{IP: net.IPv4(192, 0, 2, 1)}); err != nil {
				return
			}
			select {
			case <-t.C:
			case <-ctx.Done():
				return
			}
		}
	})
	over := make(chan struct{})
	var longest time.Duration
	buf := make([]byte, 256)
	for last := (time.Time{}); ; {
		n, _, err := c.ReadFrom(buf)
		if err != nil {
			b.Fatal(err)
		}
		if n < 1 || buf[0] != 0 {
			continue
		}
		now := time.Now()
		if last.IsZero() { // the guest is heard: now
			go func() { // ends with f
				defer close(over)
				f()
			}()
		} else {
			longest = max(longest, now.Sub(last))
		}
		last = now
		select {
		case <-over: // one answer after f's end: the guest is heard again
			return longest
		default:
		}
	}
}
