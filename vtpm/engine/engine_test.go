package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"redoubt.dev/redoubt/lab/debian"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv("REDOUBT_TEST_FAKE_ENGINE"); mode != "" {
		switch mode {
		case "owner":
			owner()
		case "passerby":
			passerby()
		}
		fakeEngine(mode)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// tools points package programs at the unpacked swtpm.
func tools(t testing.TB) {
	t.Helper()
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("REDOUBT_TOOLS", root.Tools())
}

func testKey(b byte) (k [KeySize]byte) {
	for i := range k {
		k[i] = b
	}
	return k
}

// run starts an engine that the test ends.
func run(t testing.TB, cfg Config) *Engine {
	t.Helper()
	e, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Kill)
	return e
}

// tpm is the go-tpm transport of an engine at locality 0.
type tpm struct{ e *Engine }

func (t tpm) Send(cmd []byte) ([]byte, error) { return t.e.Execute(context.Background(), 0, cmd) }

// mark writes a value into NV that later starts look for: it is state that must not be lost.
func mark(t testing.TB, e *Engine) {
	t.Helper()
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: 0x01800001, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true},
		}),
	}.Execute(tpm{e})
	if err != nil {
		t.Fatal(err)
	}
}

func marked(t testing.TB, e *Engine) bool {
	t.Helper()
	_, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(0x01800001)}.Execute(tpm{e})
	return err == nil
}

func startup(t testing.TB, e *Engine) {
	t.Helper()
	if err := e.Startup(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// made is a state directory with marked state in it, and what its file holds.
func made(t testing.TB) (dir string, state []byte) {
	t.Helper()
	dir = t.TempDir()
	e := run(t, Config{Dir: dir, Key: testKey(1)})
	startup(t, e)
	mark(t, e)
	if err := e.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	state, err := os.ReadFile(filepath.Join(dir, StateFile))
	if err != nil {
		t.Fatal(err)
	}
	return dir, state
}

func TestStatePersistsAcrossStarts(t *testing.T) {
	tools(t)
	dir, state := made(t)
	if bytes.Contains(state, []byte{0x01, 0x80, 0x00, 0x01}) {
		t.Error("the state file shows an NV index in clear: it is not encrypted")
	}
	e := run(t, Config{Dir: dir, Key: testKey(1), Existing: true})
	startup(t, e)
	if !marked(t, e) {
		t.Error("the NV index is gone after a restart")
	}
	// A kill loses nothing that was written.
	e.Kill()
	if !errors.Is(e.Err(), ErrDead) {
		t.Errorf("after Kill: %v", e.Err())
	}
	if _, err := e.Execute(t.Context(), 0, shortCommand(ccStartup, tpm2.TPMSUClear)); !errors.Is(err, ErrDead) {
		t.Errorf("command to a killed engine: %v", err)
	}
	e = run(t, Config{Dir: dir, Key: testKey(1), Existing: true})
	startup(t, e)
	if !marked(t, e) {
		t.Error("the NV index is gone after a kill")
	}
}

// No way to fail at opening state may change or replace it.
func TestStateIsNeverReplaced(t *testing.T) {
	tools(t)
	dir, good := made(t)
	file := filepath.Join(dir, StateFile)
	flipped := append([]byte(nil), good...)
	flipped[len(flipped)/2] ^= 1
	header := append([]byte(nil), good...)
	header[0] ^= 0xff
	for _, c := range []struct {
		name     string
		state    []byte // nil: no file
		key      byte
		existing bool
		want     error
	}{
		{"foreign key", good, 2, true, ErrOpen},
		{"flipped bit", flipped, 1, true, ErrOpen},
		{"damaged header", header, 1, true, ErrOpen},
		{"cut short", good[:len(good)/2], 1, true, ErrOpen},
		{"one byte", good[:1], 1, true, ErrOpen},
		{"empty", []byte{}, 1, true, ErrOpen},
		{"garbage", bytes.Repeat([]byte("garbage "), 500), 1, true, ErrOpen},
		{"missing", nil, 1, true, ErrNoState},
		{"present for a new one", good, 1, false, ErrState},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.state == nil {
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
			} else if err := os.WriteFile(file, c.state, 0o600); err != nil {
				t.Fatal(err)
			}
			e, err := Start(t.Context(), Config{Dir: dir, Key: testKey(c.key), Existing: c.existing})
			if err == nil {
				e.Kill()
			}
			if !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			if err != nil && (!strings.Contains(err.Error(), dir) || strings.Contains(err.Error(), "\n")) {
				t.Errorf("error does not name the directory in one line: %v", err)
			}
			got, err := os.ReadFile(file)
			if c.state == nil {
				if !errors.Is(err, os.ErrNotExist) {
					t.Errorf("a state file appeared: %v", err)
				}
			} else if err != nil || !bytes.Equal(got, c.state) {
				t.Errorf("the state file changed (%v)", err)
			}
		})
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	e := run(t, Config{Dir: dir, Key: testKey(1), Existing: true})
	startup(t, e)
	if !marked(t, e) {
		t.Error("the restored state lacks its mark")
	}
}

func TestSecondStartIsRefused(t *testing.T) {
	tools(t)
	dir, _ := made(t)
	e := run(t, Config{Dir: dir, Key: testKey(1), Existing: true})
	startup(t, e)
	if _, err := Start(t.Context(), Config{Dir: dir, Key: testKey(1), Existing: true}); !errors.Is(err, ErrInUse) {
		t.Errorf("second start: %v", err)
	}
	if !marked(t, e) {
		t.Error("the first engine lost its state")
	}
}

func TestDeathIsNoticed(t *testing.T) {
	tools(t)
	e := run(t, Config{Dir: t.TempDir(), Key: testKey(1)})
	startup(t, e)
	if err := syscall.Kill(e.Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-e.Done():
	case <-t.Context().Done():
	}
	if err := e.Err(); !errors.Is(err, ErrDead) || !strings.Contains(err.Error(), "killed") {
		t.Errorf("death was reported as %v", err)
	}
}

// A frozen engine is finished by the time limit, and a caller's own limit comes before.
func TestFrozenEngine(t *testing.T) {
	tools(t)
	e := run(t, Config{Dir: t.TempDir(), Key: testKey(1), commandLimit: 300 * time.Millisecond})
	startup(t, e)
	if err := syscall.Kill(e.Pid(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := e.Execute(ctx, 0, shortCommand(ccStartup, tpm2.TPMSUClear)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("caller's limit: %v", err)
	}
	<-e.Done()
	if err := e.Err(); !errors.Is(err, ErrDead) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("engine's limit: %v", err)
	}
}

func TestResetIsAPowerCycle(t *testing.T) {
	tools(t)
	e := run(t, Config{Dir: t.TempDir(), Key: testKey(1)})
	startup(t, e)
	mark(t, e)
	read := func() []byte {
		rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
			{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(0)},
		}}}.Execute(tpm{e})
		if err != nil {
			t.Fatal(err)
		}
		return rsp.PCRValues.Digests[0].Buffer
	}
	zero := read()
	_, err := tpm2.PCREvent{
		PCRHandle: tpm2.AuthHandle{Handle: 0, Auth: tpm2.PasswordAuth(nil)},
		EventData: tpm2.TPM2BEvent{Buffer: []byte("x")},
	}.Execute(tpm{e})
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(read(), zero) {
		t.Fatal("PCR 0 did not change")
	}
	if err := e.Reset(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(), zero) {
		t.Error("PCR 0 keeps its value over a reset")
	}
	if !marked(t, e) {
		t.Error("NV is lost over a reset")
	}
}

// What a hostile guest may send never reaches the engine's own framing.
func TestMalformedCommands(t *testing.T) {
	tools(t)
	e := run(t, Config{Dir: t.TempDir(), Key: testKey(1)})
	startup(t, e)
	getRandom := []byte{0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x7b, 0, 8}
	// swtpm's own prefix: 00 00 00 08, locality, size; then a command.
	prefixed := append([]byte{0, 0, 0, 8, 4, 0, 0, 0, 12}, getRandom...)
	for _, c := range []struct {
		name     string
		locality uint8
		cmd      []byte
		want     tpm2.TPMRC
	}{
		{"good", 0, getRandom, tpm2.TPMRCSuccess},
		{"good at locality 3", 3, getRandom, tpm2.TPMRCSuccess},
		{"locality 4", 4, getRandom, tpm2.TPMRCLocality},
		{"locality 255", 255, getRandom, tpm2.TPMRCLocality},
		{"swtpm prefix", 0, prefixed, tpm2.TPMRCCommandSize},
		{"swtpm prefix that is a size too", 0, []byte{0, 0, 0, 8, 4, 0, 0, 0, 0, 0, 0, 0}, tpm2.TPMRCCommandSize},
		{"bad tag", 0, []byte{0x80, 0x04, 0, 0, 0, 12, 0, 0, 0x01, 0x7b, 0, 8}, rcBadTag},
		{"too short", 0, getRandom[:9], tpm2.TPMRCCommandSize},
		{"empty", 0, nil, tpm2.TPMRCCommandSize},
		{"size beyond", 0, getRandom[:11], tpm2.TPMRCCommandSize},
		{"size short", 0, append(append([]byte(nil), getRandom...), 0), tpm2.TPMRCCommandSize},
		{"too long", 0, make([]byte, MaxMessage+1), tpm2.TPMRCCommandSize},
		{"largest", 0, append([]byte{0x80, 0x01, 0, 0, 0x10, 0, 0, 0, 0x01, 0x7b}, make([]byte, MaxMessage-10)...), tpm2.TPMRCSize},
	} {
		rsp, err := e.Execute(t.Context(), c.locality, c.cmd)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		rc := ResponseCode(rsp)
		if c.want == tpm2.TPMRCSize {
			rc &^= 0xf40 // which parameter: of no interest
		}
		if rc != c.want {
			t.Errorf("%s: response code %#x, want %#x", c.name, uint32(rc), uint32(c.want))
		}
	}
}

func TestConcurrentCommands(t *testing.T) {
	tools(t)
	e := run(t, Config{Dir: t.TempDir(), Key: testKey(1)})
	startup(t, e)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 16 {
				// Each asks for another length, so that a swapped answer shows.
				want := uint16(i + n + 1)
				rsp, err := tpm2.GetRandom{BytesRequested: want}.Execute(tpm{e})
				if err != nil || len(rsp.RandomBytes.Buffer) != int(want) {
					t.Errorf("%d bytes of %d: %v", len(rsp.RandomBytes.Buffer), want, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// A full disk is an error to the command or the start; what was written before stays.
func TestFullDisk(t *testing.T) {
	tools(t)
	if os.Getuid() != 0 {
		t.Fatal("needs root for a small tmpfs")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=16k,mode=0700"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	e := run(t, Config{Dir: dir, Key: testKey(1)})
	startup(t, e)
	mark(t, e)
	// Fill NV until the state file can no longer be written.
	var failed error
	for i := range uint32(40) {
		_, err := tpm2.NVDefineSpace{
			AuthHandle: tpm2.TPMRHOwner,
			PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
				NVIndex: tpm2.TPMHandle(0x01800100 + i), NameAlg: tpm2.TPMAlgSHA256, DataSize: 1024,
				Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true},
			}),
		}.Execute(tpm{e})
		if err == nil {
			err = func() error {
				h := tpm2.TPMHandle(0x01800100 + i)
				pub, err := tpm2.NVReadPublic{NVIndex: h}.Execute(tpm{e})
				if err != nil {
					return err
				}
				_, err = tpm2.NVWrite{
					AuthHandle: tpm2.TPMRHOwner,
					NVIndex:    tpm2.NamedHandle{Handle: h, Name: pub.NVName},
					Data:       tpm2.TPM2BMaxNVBuffer{Buffer: bytes.Repeat([]byte{0xa5}, 1024)},
				}.Execute(tpm{e})
				return err
			}()
		}
		if err != nil {
			failed = err
			t.Logf("index %d: %v", i, err)
			break
		}
	}
	if failed == nil {
		t.Fatal("the disk never filled")
	}
	shutErr := e.Shutdown(t.Context())
	t.Logf("shutdown: %v", shutErr)
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size=1m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	e = run(t, Config{Dir: dir, Key: testKey(1), Existing: true})
	startup(t, e)
	if !marked(t, e) {
		t.Error("what was written before the disk was full is lost")
	}
}

func BenchmarkStart(b *testing.B) {
	tools(b)
	n := 0
	root := b.TempDir()
	for b.Loop() {
		n++
		dir := filepath.Join(root, fmt.Sprint(n))
		if err := os.Mkdir(dir, 0o700); err != nil {
			b.Fatal(err)
		}
		e, err := Start(b.Context(), Config{Dir: dir, Key: testKey(1)})
		if err != nil {
			b.Fatal(err)
		}
		if err := e.Startup(b.Context()); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		e.Kill()
		b.StartTimer()
	}
}
