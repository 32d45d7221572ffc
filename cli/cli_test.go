package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/supervisor"
)

// asCommand has the test binary be the command line.
const asCommand = "REDOUBT_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		os.Exit(Main(os.Args[1:]))
	}
	os.Exit(m.Run())
}

// TestExplain: a call over which a toolstack ended is told as that, in whatever words the end reached it.
func TestExplain(t *testing.T) {
	a := &app{runDir: t.TempDir()}
	for err, want := range map[error]string{
		connect.NewWireError(connect.CodeCanceled, errors.New("context canceled")):         "were replaced over this",
		connect.NewWireError(connect.CodeAborted, errors.New("the Builder is replaced")):   "were replaced over this",
		connect.NewError(connect.CodeUnavailable, errors.New("unexpected EOF")):            "were replaced over this",
		connect.NewWireError(connect.CodeNotFound, errors.New(`guest "x": no such guest`)): `guest "x": no such guest`,
		connect.NewError(connect.CodeInternal, io.ErrUnexpectedEOF):                        "were replaced over this",
		connect.NewWireError(connect.CodeInternal, io.ErrUnexpectedEOF):                    "unexpected EOF",
		errors.New("local"): "local",
	} {
		if got := a.explain(err); !strings.Contains(got, want) {
			t.Errorf("%v: %q", err, got)
		}
	}
}

// TestExplainTenant: a tenant that is not there is told from a Redoubt that is not, as far as the caller may know.
func TestExplainTenant(t *testing.T) {
	a := &app{runDir: t.TempDir(), tenant: "acme"}
	nobody := connect.NewError(connect.CodeUnavailable, unix.ENOENT)
	says := func(want string) {
		t.Helper()
		if got := a.explain(nobody); !strings.Contains(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	}
	says("Redoubt does not run")
	path := filepath.Join(a.runDir, services.LockFile)
	unlock, err := supervisor.Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	says(`there is no tenant "acme": make it`)
	asNobody(t, a.runDir, func() {
		says(`there is no tenant "acme", or Redoubt does not run`)
		if _, err := a.running(); err == nil || !strings.Contains(err.Error(), "use sudo") {
			t.Errorf("%v", err)
		}
	})
	unlock()
	says("Redoubt does not run")
}

// asNobody does something with another user's rights on files.
func asNobody(t *testing.T, dir string, do func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: run as root, as `make unit` is")
	}
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	runtime.LockOSThread() // the rights are a thread's
	defer runtime.UnlockOSThread()
	if _, err := unix.SetfsuidRetUid(65534); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := unix.SetfsuidRetUid(0); err != nil {
			t.Error(err)
		}
	}()
	do()
}

// hostile is a toolstack that was taken over by what it serves.
type hostile struct {
	redoubtv1connect.UnimplementedGuestServiceHandler
}

const evil = "gone\x1b[2J\nguest web is running"

func (hostile) guest() *v1.Guest {
	return &v1.Guest{Name: "web", State: v1.State_STATE_FAILED, Reason: evil, SpecJson: "{}"}
}

func (h hostile) List(context.Context, *v1.ListRequest) (*v1.ListResponse, error) {
	return &v1.ListResponse{Guests: []*v1.Guest{h.guest()}}, nil
}

func (h hostile) Get(context.Context, *v1.GetRequest) (*v1.GetResponse, error) {
	return &v1.GetResponse{Guest: h.guest()}, nil
}

func (h hostile) Stop(context.Context, *v1.StopRequest) (*v1.StopResponse, error) {
	return &v1.StopResponse{Guest: h.guest()}, nil
}

func (h hostile) Remove(context.Context, *v1.RemoveRequest) (*v1.RemoveResponse, error) {
	return nil, connect.NewError(connect.CodeInternal, errors.New(evil))
}

// TestHostileWords: what an emulator says reaches no terminal as a command, nor as a line of its own; JSON has it as it is.
func TestHostileWords(t *testing.T) {
	for _, line := range []string{"ps --all", "show web", "stop web"} {
		out, err := command(t, hostile{}, strings.Fields(line)...)
		if err != nil || strings.ContainsRune(out, '\x1b') || !strings.Contains(out, "gone\ufffd[2J\ufffdguest") {
			t.Errorf("%s: %q, %v", line, out, err)
		}
		out, err = command(t, hostile{}, append(strings.Fields(line), "--json")...)
		if want, _ := json.Marshal(evil); err != nil || !strings.Contains(out, string(want)) {
			t.Errorf("%s --json: %q, %v", line, out, err)
		}
	}
	_, err := command(t, hostile{}, "rm", "web")
	var errs bytes.Buffer
	a := &app{err: &errs}
	if status := a.end(t.Context(), err); status != 1 || errs.String() != "redoubt: gone\ufffd[2J guest web is running\n" {
		t.Errorf("rm: exit status %d, %q", status, errs.String())
	}
}

// builderOf answers as a Builder does, and returns what it is asked.
func builderOf(t *testing.T, dir string, answer any) (asked chan *rpc.Request) {
	t.Helper()
	socket, err := ipc.ListenMessages(filepath.Join(dir, services.AdminSocket), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	asked = make(chan *rpc.Request, 8)
	serve, err := rpc.Serve(socket, 8, func(_ context.Context, r *rpc.Request) (any, error) {
		asked <- r
		return answer, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		serve(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return asked
}

// TestResetGuest: --tenant says whose guest it is, unless the guest's name does.
func TestResetGuest(t *testing.T) {
	dir := t.TempDir()
	asked := builderOf(t, dir, protocol.ResetDone{Replaced: 1})
	for args, want := range map[string]string{
		"reset blkback web":                    "web",
		"--tenant acme reset blkback web":      "acme.web",
		"reset blkback acme.web":               "acme.web",
		"--tenant evil reset netback acme.web": "acme.web",
		"--tenant acme reset netback":          "",
	} {
		a := &app{out: io.Discard, err: io.Discard}
		if status := a.main(t.Context(), append([]string{"--run-dir", dir}, strings.Fields(args)...)); status != 0 {
			t.Errorf("%s: exit status %d", args, status)
			continue
		}
		var in protocol.Reset
		if err := (<-asked).Decode(&in); err != nil || in.Guest != want {
			t.Errorf("%s: of guest %q, want %q: %v", args, in.Guest, want, err)
		}
	}
}

// TestTenantRemoved: success has a word, in JSON, too.
func TestTenantRemoved(t *testing.T) {
	dir := t.TempDir()
	builderOf(t, dir, struct{}{})
	for flag, want := range map[string]string{"--json=false": "tenant acme is removed\n", "--json": "{\n  \"removed\": \"acme\"\n}\n"} {
		var out bytes.Buffer
		a := &app{out: &out, err: io.Discard}
		if status := a.main(t.Context(), []string{"--run-dir", dir, "tenant", "rm", "acme", flag}); status != 0 || out.String() != want {
			t.Errorf("%s: exit status %d, %q", flag, status, out.String())
		}
	}
}

// TestRulesJSON: the default rules are the same in JSON.
func TestRulesJSON(t *testing.T) {
	var out bytes.Buffer
	a := &app{out: &out, err: io.Discard}
	var rules map[string]any
	if status := a.main(t.Context(), []string{"baseline", "rules", "--json"}); status != 0 || json.Unmarshal(out.Bytes(), &rules) != nil || len(rules) == 0 {
		t.Errorf("exit status %d: %s", status, out.String())
	}
}

// A silent input says when it is waited for, and has nothing to say.
type silent struct{ asked, end chan struct{} }

func (s silent) Read([]byte) (int, error) {
	close(s.asked)
	<-s.end
	return 0, io.EOF
}

// TestInterrupted: a command that waits for its standard input ends with its context.
func TestInterrupted(t *testing.T) {
	for _, args := range []string{"run -", "validate web --seen -"} {
		ctx, cancel := context.WithCancel(t.Context())
		s := silent{make(chan struct{}), make(chan struct{})}
		defer close(s.end)
		go func() {
			<-s.asked
			cancel()
		}()
		var errs bytes.Buffer
		a := &app{in: s, out: io.Discard, err: &errs}
		if status := a.main(ctx, append([]string{"--run-dir", t.TempDir()}, strings.Fields(args)...)); status != 130 || errs.Len() > 0 {
			t.Errorf("%s: exit status %d: %s", args, status, errs.String())
		}
	}
}

// TestInput: what is read is what is there.
func TestInput(t *testing.T) {
	want := bytes.Repeat([]byte("0123456789"), 20_000)
	if got, err := io.ReadAll(input{t.Context(), bytes.NewReader(want)}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%d bytes of %d: %v", len(got), len(want), err)
	}
}

// TestSecondSignal: a command that waits for something that is told nothing of the first signal ends with another one.
func TestSecondSignal(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "log")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), "/proc/self/exe", "attest", "replay", "--event-log", fifo)
	c.Env = append(os.Environ(), asCommand+"=1")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(fifo, os.O_WRONLY, 0) // waits until the command reads
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for n := range 500 {
		select {
		case err := <-ended:
			if s, ok := c.ProcessState.Sys().(interface{ Signal() unix.Signal }); !ok || s.Signal() != unix.SIGINT || n < 2 {
				t.Errorf("after %d signals: %v", n, err)
			}
			return
		case <-again.C:
			_ = c.Process.Signal(os.Interrupt)
		}
	}
	t.Error("it goes on for all signals")
	_ = c.Process.Kill()
	t.Log(<-ended)
}
