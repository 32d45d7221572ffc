package toolstack

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
)

// TestMain is a toolstack that does nothing but read a console where a test starts it: descriptors 3 and on are what
// takeEnds takes.
func TestMain(m *testing.M) {
	if os.Getenv("TOOLSTACK_TEST_ENDS") == "" {
		os.Exit(m.Run())
	}
	var files []*os.File
	for fd := range 5 {
		files = append(files, os.NewFile(uintptr(3+fd), "end"))
	}
	e, err := takeEnds(files)
	if err != nil {
		panic(err)
	}
	c := newConsole()
	c.attach(e.console, e.spool, nil)
	<-c.done
}

// TestConsoleKilled: of what a guest prints its console's log has every byte once, whenever the toolstacks that
// read it are killed. (It found the bytes that one had read and not yet written.)
func TestConsoleKilled(t *testing.T) {
	near, far, err := ipc.Streams("console")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	channel, _, err := ipc.Streams("channel")
	if err != nil {
		t.Fatal(err)
	}
	defer channel.Close()
	r, w, err := ipc.OneWay()
	if err != nil {
		t.Fatal(err)
	}
	defer ipc.CloseAll([]*os.File{r, w})
	path := filepath.Join(t.TempDir(), "log")
	log, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	ends := []*os.File{far, channel, log, r, w}
	start := func() *exec.Cmd {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{"TOOLSTACK_TEST_ENDS=1"}
		cmd.ExtraFiles, cmd.Stderr = ends, os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	var guest sync.WaitGroup
	stop := make(chan struct{})
	var printed bytes.Buffer
	guest.Go(func() {
		defer near.Close()
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			line := fmt.Appendf(nil, "line %d\n", n)
			for i := range line { // as a serial port does
				if _, err := near.Write(line[i : i+1]); err != nil {
					t.Error(err)
					return
				}
			}
			printed.Write(line)
		}
	})
	for range 40 {
		cmd := start()
		time.Sleep(20*time.Millisecond + rand.N(20*time.Millisecond)) // a moment nobody chose
		if err := cmd.Process.Signal(unix.SIGKILL); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait()
	}
	close(stop)
	last := start() // ends with the console
	guest.Wait()
	if err := last.Wait(); err != nil {
		t.Error(err)
	}
	logged, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := printed.Bytes()
	for i, b := range want {
		if i >= len(logged) || logged[i] != b {
			t.Fatalf("of %d bytes the log has %d; it differs at %d: …%q, printed was …%q", len(want), len(logged), i,
				logged[max(0, i-20):min(len(logged), i+40)], want[max(0, i-20):min(len(want), i+40)])
		}
	}
	if len(logged) != len(want) {
		t.Fatalf("of %d bytes the log has %d", len(want), len(logged))
	}
	t.Logf("%d bytes, each once", len(want))
}

// TestSpoolFull: what the log takes no more of is shown all the same.
func TestSpoolFull(t *testing.T) {
	for name, set := range map[string]func(*spool) error{
		"longest": func(s *spool) (err error) {
			s.logged, err = s.log.Seek(maxLog-3, io.SeekStart)
			return err
		},
		"disk": func(s *spool) error {
			_, err := unix.FcntlInt(uintptr(s.logFD), unix.F_ADD_SEALS, unix.F_SEAL_GROW)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
			if err != nil {
				t.Fatal(err)
			}
			near, far, err := ipc.Streams("console")
			if err != nil {
				t.Fatal(err)
			}
			defer near.Close()
			conn, err := stream(far)
			if err != nil {
				t.Fatal(err)
			}
			far.Close()
			defer conn.Close()
			r, w, err := ipc.OneWay()
			if err != nil {
				t.Fatal(err)
			}
			log := os.NewFile(uintptr(fd), "log")
			s, err := newSpool(conn, log, [2]*os.File{r, w})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := set(s); err != nil {
				t.Fatal(err)
			}
			var shown []byte
			for _, line := range []string{"first\n", "second\n"} {
				if _, err := near.WriteString(line); err != nil {
					t.Fatal(err)
				}
				for buf := make([]byte, 64); !bytes.HasSuffix(shown, []byte(line)); {
					n, err := s.next(buf)
					if err != nil {
						t.Fatalf("after %q: %v", shown, err)
					}
					shown = append(shown, buf[:n]...)
				}
			}
			if string(shown) != "first\nsecond\n" {
				t.Errorf("%q", shown)
			}
			if st, err := log.Stat(); err != nil || st.Size() > maxLog {
				t.Errorf("the log has %d bytes, %v", st.Size(), err)
			}
		})
	}
}
