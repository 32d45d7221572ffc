package toolstack

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"

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
	lines, stop := make(chan struct{}), make(chan struct{})
	var printed bytes.Buffer
	guest.Go(func() {
		defer near.Close()
		for n := 0; ; n++ {
			line := fmt.Appendf(nil, "line %d\n", n)
			for i := range line { // as a serial port does
				if _, err := near.Write(line[i : i+1]); err != nil {
					t.Error(err)
					return
				}
			}
			printed.Write(line)
			select {
			case lines <- struct{}{}:
			case <-stop:
				return
			}
		}
	})
	for range 40 {
		cmd := start()
		for range 200 + rand.N(200) { // more than the socket holds: it reads, and is killed over what nobody chose
			<-lines
		}
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

// spooled is a spool over a log with the contents, and the guest's end of its console.
func spooled(t *testing.T, contents []byte, offset int64) (*spool, *os.File) {
	t.Helper()
	fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	log := os.NewFile(uintptr(fd), "log")
	if _, err := log.WriteAt(contents, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := log.Seek(offset, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	near, far, err := ipc.Streams("console")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := ipc.Socket(far)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := ipc.OneWay()
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSpool(conn, log, [2]*os.File{r, w})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); _ = conn.Close(); _ = s.Close() })
	return s, near
}

// shows has the guest print and returns what the spool says of it.
func shows(t *testing.T, s *spool, guest *os.File, text string) (shown string) {
	t.Helper()
	if _, err := guest.WriteString(text); err != nil {
		t.Fatal(err)
	}
	for buf := make([]byte, 64); len(shown) < len(text); {
		n, err := s.next(buf)
		if err != nil {
			t.Fatalf("after %q: %v", shown, err)
		}
		shown += string(buf[:n])
	}
	return shown
}

// TestSpoolFull: what a full disk takes no more of is shown all the same.
func TestSpoolFull(t *testing.T) {
	s, guest := spooled(t, nil, 0)
	if _, err := unix.FcntlInt(uintptr(s.logFD), unix.F_ADD_SEALS, unix.F_SEAL_GROW); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"first\n", "second\n"} {
		if got := shows(t, s, guest, line); got != line {
			t.Errorf("%q, not %q", got, line)
		}
	}
	if len(s.tail()) != 0 {
		t.Errorf("the log has %q", s.tail())
	}
}

// TestSpoolHalves: of a log that is full the newer half stays, wherever a toolstack was killed that made room in it.
func TestSpoolHalves(t *testing.T) {
	full := make([]byte, maxLog)
	for i := range full {
		full[i] = byte('a' + i/4096%26)
	}
	half := full[maxLog/2:]
	copied := append(bytes.Clone(half[:maxLog/4]), full[maxLog/4:]...)
	for name, c := range map[string]struct {
		log    []byte
		offset int64
		print  string
		want   []byte
	}{
		"not full":    {full[:maxLog-3], maxLog - 3, "xy", append(full[:maxLog-3:maxLog-3], "xy"...)},
		"full":        {full[:maxLog-3], maxLog - 3, "xyz12", slices.Concat(full[maxLog/2:maxLog-3], []byte("xyz12"))},
		"not begun":   {full, maxLog, "12", slices.Concat(half, []byte("12"))},
		"half copied": {copied, maxLog, "12", slices.Concat(half, []byte("12"))},
		"cut":         {half, maxLog, "12", slices.Concat(half, []byte("12"))},
	} {
		t.Run(name, func(t *testing.T) {
			s, guest := spooled(t, c.log, c.offset)
			if got := shows(t, s, guest, c.print); got != c.print {
				t.Errorf("%q, not %q", got, c.print)
			}
			got, err := io.ReadAll(io.NewSectionReader(s.log, 0, 2*maxLog))
			if err != nil || !bytes.Equal(got, c.want) {
				t.Errorf("the log has %d bytes, not %d, or others, %v", len(got), len(c.want), err)
			}
			if !bytes.HasSuffix(s.tail(), []byte(c.print)) {
				t.Errorf("its tail is not %q", c.print)
			}
		})
	}
}
