package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/pidfd"
)

// fake runs this test binary as the engine.
func fake(t *testing.T, mode string) Config {
	t.Helper()
	cfg := Config{Dir: t.TempDir(), Starter: fakeStarter(mode)}
	switch mode { // only where nothing else ends the wait
	case "mute":
		cfg.controlLimit = 100 * time.Millisecond
	case "data-mute":
		cfg.commandLimit = 100 * time.Millisecond
	}
	return cfg
}

func TestEnginesThatMisbehaveAtStart(t *testing.T) {
	for mode, want := range map[string]string{
		"die":        "exit status 7",
		"mute":       "timeout",
		"garbage":    "TPM_RESULT 0x67617262",
		"init-fails": "INIT answered TPM_RESULT 0x9",
		"short":      "reply ends at offset 2",
		"old":        "newer swtpm",
	} {
		t.Run(mode, func(t *testing.T) {
			e, err := Start(t.Context(), fake(t, mode))
			if err == nil {
				e.Kill()
				t.Fatal("started")
			}
			if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q, want it to say %q", err, want)
			}
		})
	}
}

func TestEnginesThatMisbehaveLater(t *testing.T) {
	for mode, want := range map[string]string{
		"data-split": "",
		"data-tag":   "tag 0x6761 at offset 0",
		"data-size":  "response of 65535 bytes at offset 2",
		"data-small": "response of 9 bytes at offset 2",
		"data-short": "ends at offset 11",
		"data-eof":   "ends at offset 3 of its header",
		"data-mute":  "timeout",
		"data-die":   "exit status 9",
	} {
		t.Run(mode, func(t *testing.T) {
			e, err := Start(t.Context(), fake(t, mode))
			if err != nil {
				t.Fatal(err)
			}
			defer e.Kill()
			rsp, err := e.Execute(t.Context(), 0, shortCommand(ccStartup, tpm2.TPMSUClear))
			if want == "" {
				if err != nil || !bytes.Equal(rsp, ErrorResponse(tpm2.TPMRCSuccess)) {
					t.Fatalf("response %x, %v", rsp, err)
				}
				if err := e.Reset(t.Context()); err != nil {
					t.Error(err)
				}
				if err := e.Shutdown(t.Context()); err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error %v, want it to say %q", err, want)
			}
			<-e.Done()
			if _, err := e.Execute(t.Context(), 0, shortCommand(ccStartup, tpm2.TPMSUClear)); !errors.Is(err, ErrDead) {
				t.Errorf("the engine is used on: %v", err)
			}
		})
	}
}

// owner starts an engine, says its process number and waits to be killed.
func owner() {
	e, err := Start(context.Background(), Config{Dir: os.Args[1], Key: testKey(1)})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(e.Pid())
	select {}
}

// An engine does not outlive the program that runs it, even if that is killed.
func TestEndsWithItsOwner(t *testing.T) {
	tools(t)
	// The orphan becomes this process's child, which can reap it.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], t.TempDir())
	cmd.Env = append(os.Environ(), "REDOUBT_TEST_FAKE_ENGINE=owner")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	_, scanErr := fmt.Fscan(out, &pid)
	var engine *os.File
	if scanErr == nil {
		engine, err = pidfd.Open(pid)
	}
	if kerr := cmd.Process.Kill(); kerr != nil {
		t.Error(kerr)
	}
	_ = cmd.Wait() // killed: its status says nothing
	if scanErr != nil || err != nil {
		t.Fatalf("engine process %d: %v, %v", pid, scanErr, err)
	}
	defer engine.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := pidfd.Await(ctx, engine); err != nil {
		t.Errorf("swtpm %d lives on 5 s after its owner's end: %v", pid, err)
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	if _, err := unix.Wait4(pid, nil, 0, nil); err != nil {
		t.Error(err)
	}
}

// A start that is cancelled leaves no process.
func TestCancelledStart(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	cfg := fake(t, "mute")
	cfg.controlLimit = time.Minute
	if _, err := Start(ctx, cfg); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled start: %v", err)
	}
}
