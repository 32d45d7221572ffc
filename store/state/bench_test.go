package state_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/disk"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// built is the directory logicProgram has built in.
var built string

// logicProgram builds the worker, once.
var logicProgram = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "store")
	if err != nil {
		return "", err
	}
	built = dir
	path := filepath.Join(dir, "redoubt-store-logic")
	out, err := exec.Command("go", "build", "-o", path, "redoubt.dev/redoubt/cmd/redoubt-store-logic").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

// running starts a store as it is in use: contents in a file, workers programs of their own.
func running(b *testing.B, reset state.Reset) *store {
	b.Helper()
	path, err := logicProgram()
	must(b, err)
	dir, err := os.Open(b.TempDir())
	must(b, err)
	defer dir.Close()
	t := tree.New(server.ReservedNames()...)
	db, err := disk.Open(dir, t)
	must(b, err)
	b.Cleanup(func() { must(b, db.Close()) })
	return start(b, state.Options{
		Tree: t, Persist: db.Keep, Reset: reset,
		Workers: programs(b, path, func(*os.Process) {}),
	})
}

// each runs a benchmark at each reset policy, with one client; op is one operation of it.
func each(b *testing.B, unit string, op func(c *client.Client, i int) error) {
	for _, p := range []struct {
		name  string
		reset state.Reset
	}{{"off", state.ResetOff}, {"100", 100}, {"1", state.ResetEach}} {
		b.Run(p.name, func(b *testing.B) {
			c := running(b, p.reset).dial(builder)
			must(b, c.Write("/bench/node", "value"))
			for i := range 20 {
				must(b, c.Write("/bench/"+strconv.Itoa(i), "value"))
			}
			b.ResetTimer()
			for i := range b.N {
				if err := op(c, i); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), unit)
		})
	}
}

// BenchmarkStoreRead: reads per second, by when workers are replaced.
func BenchmarkStoreRead(b *testing.B) {
	each(b, "reads/s", func(c *client.Client, _ int) error { _, err := c.Read("/bench/node"); return err })
	b.Run("off-8clients", func(b *testing.B) {
		s := running(b, state.ResetOff)
		must(b, s.dial(builder).Write("/bench/node", "value"))
		var clients []*client.Client
		for range 8 {
			clients = append(clients, s.dial(builder))
		}
		b.ResetTimer()
		var wg sync.WaitGroup
		for i, c := range clients {
			wg.Go(func() {
				for range (b.N + i) / len(clients) {
					if _, err := c.Read("/bench/node"); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "reads/s")
	})
}

// BenchmarkStoreWrite: acknowledged, and so kept, writes per second.
func BenchmarkStoreWrite(b *testing.B) {
	each(b, "writes/s", func(c *client.Client, i int) error { return c.Write("/bench/"+strconv.Itoa(i%20), strconv.Itoa(i)) })
}

// BenchmarkStoreTransaction: transactions of a read and a write per second (four requests).
func BenchmarkStoreTransaction(b *testing.B) {
	each(b, "transactions/s", func(c *client.Client, i int) error {
		return c.Transaction(func(x *client.Tx) error {
			if _, err := x.Read("/bench/node"); err != nil {
				return err
			}
			return x.Write("/bench/node", strconv.Itoa(i))
		})
	})
}

// BenchmarkStoreWatchLatency: from the start of a write to its event at another client, the
// median.
func BenchmarkStoreWatchLatency(b *testing.B) {
	for _, p := range []struct {
		name  string
		reset state.Reset
	}{{"off", state.ResetOff}, {"1", state.ResetEach}} {
		b.Run(p.name, func(b *testing.B) {
			s := running(b, p.reset)
			c, w := s.dial(builder), s.dial(server.VTPM)
			must(b, w.Watch("/bench", "t"))
			next(b, w)
			times := make([]time.Duration, 0, b.N)
			b.ResetTimer()
			for i := range b.N {
				start := time.Now()
				if err := c.Write("/bench", strconv.Itoa(i)); err != nil {
					b.Fatal(err)
				}
				next(b, w)
				times = append(times, time.Since(start))
			}
			slices.Sort(times)
			b.ReportMetric(float64(times[len(times)/2].Nanoseconds())/1e3, "us")
		})
	}
}

// BenchmarkSocketEcho is the peer of the others: messages of the same size to and fro over a
// Unix socket with nothing done between, two hand-overs where a read of the store takes four.
func BenchmarkSocketEcho(b *testing.B) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(b, err)
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "echo")
		ends[i], err = net.FileConn(f)
		must(b, err)
		f.Close()
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			m, err := wire.ReadMessage(ends[1])
			if err != nil {
				return
			}
			if _, err := ends[1].Write(m.Append(nil)); err != nil {
				return
			}
		}
	})
	c := client.New(ends[0])
	b.ResetTimer()
	for range b.N {
		if _, err := c.Read("/bench/node"); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "reads/s")
	c.Close()
	wg.Wait()
	ends[1].Close()
}

// BenchmarkHandOvers is the floor of a read: three processes, client, state and worker, hand a message of
// its size on as a read of the store does, by bare system calls, and do nothing with it.
func BenchmarkHandOvers(b *testing.B) {
	pair := func(kind int) [2]*os.File {
		fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
		must(b, err)
		return [2]*os.File{os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")}
	}
	client, worker := pair(unix.SOCK_STREAM), pair(unix.SOCK_SEQPACKET)
	for role, files := range map[string][]*os.File{"relay": {client[1], worker[0]}, "echo": {worker[1]}} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{"STORE_TEST_ROLE=" + role}
		cmd.ExtraFiles = files
		must(b, cmd.Start())
		defer func() { must(b, cmd.Wait()) }() // they end with their sockets
	}
	for _, f := range []*os.File{client[1], worker[0], worker[1]} {
		must(b, f.Close())
	}
	defer client[0].Close()
	fd := int(client[0].Fd())
	m := wire.Message{Type: wire.Read, Payload: wire.Join("/bench/node")}.Append(nil)
	buf := make([]byte, len(m))
	b.ResetTimer()
	for range b.N {
		_, err := unix.Write(fd, m)
		must(b, err)
		_, err = unix.Read(fd, buf)
		must(b, err)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "reads/s")
}

// relay hands on what comes from one socket to the next and back, or back at once, until the end.
func relay(from, to int) {
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(from, buf)
		if err != nil || n == 0 {
			return
		}
		if to >= 0 {
			if _, err = unix.Write(to, buf[:n]); err == nil {
				n, err = unix.Read(to, buf)
			}
		}
		if err == nil {
			_, err = unix.Write(from, buf[:n])
		}
		if err != nil || n == 0 {
			return
		}
	}
}

// BenchmarkWorkerStart: from nothing to a worker's first answer, what a replacement costs; and
// the same of the smallest C program there is on every host, for comparison.
func BenchmarkWorkerStart(b *testing.B) {
	b.Run("logic", func(b *testing.B) {
		path, err := logicProgram()
		must(b, err)
		for range b.N {
			c, f, err := ipc.Pair()
			must(b, err)
			cmd := exec.Command(path)
			cmd.Env = []string{}
			cmd.ExtraFiles = []*os.File{f}
			cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
			must(b, cmd.Start())
			f.Close()
			must(b, c.Send(make([]byte, 16))) // sequence 0, CONTROL without a command
			if _, _, err := c.Receive(); err != nil {
				b.Fatal(err)
			}
			c.Close()
			must(b, cmd.Wait())
		}
	})
	b.Run("true", func(b *testing.B) {
		for range b.N {
			cmd := exec.CommandContext(context.Background(), "/bin/true")
			must(b, cmd.Run())
		}
	})
}
