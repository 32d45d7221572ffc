package manager

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/vtpm/engine"
)

// Saved data that is not whole, or not this host's, is refused with the file's name; nothing
// changes.
func TestForeignManagerState(t *testing.T) {
	tools(t)
	whole := func(t *testing.T) string {
		dir := stateDir(t)
		m, err := Open(Options{Dir: dir, HostID: "test-host"})
		if err != nil {
			t.Fatal(err)
		}
		stop(t, start(t, m, guestA, ""))
		if err := m.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		return dir
	}

	for name, c := range map[string]struct {
		spoil func(t *testing.T, dir string)
		want  string
	}{
		"no manager.json": {func(t *testing.T, d string) { must(t, os.Remove(filepath.Join(d, managerFile))) }, managerFile},
		"no root.key":     {func(t *testing.T, d string) { must(t, os.Remove(filepath.Join(d, rootFile))) }, rootFile},
		"no guests":       {func(t *testing.T, d string) { must(t, os.RemoveAll(filepath.Join(d, guestsDir))) }, guestsDir},
		"only a lost file": {func(t *testing.T, d string) {
			must(t, os.RemoveAll(d))
			must(t, os.Mkdir(d, 0o700))
			must(t, os.WriteFile(filepath.Join(d, "x"), nil, 0o600))
		}, "not empty"},
		"cut":            {func(t *testing.T, d string) { must(t, os.Truncate(filepath.Join(d, managerFile), 40)) }, "offset"},
		"empty":          {func(t *testing.T, d string) { must(t, os.Truncate(filepath.Join(d, managerFile), 0)) }, managerFile},
		"readable":       {func(t *testing.T, d string) { must(t, os.Chmod(filepath.Join(d, managerFile), 0o644)) }, "mode is 0644"},
		"open directory": {func(t *testing.T, d string) { must(t, os.Chmod(d, 0o755)) }, "0700"},
		"other host's root": {func(t *testing.T, d string) {
			must(t, os.Rename(filepath.Join(whole(t), rootFile), filepath.Join(d, rootFile)))
		}, "of another host"},
		"other host's id": {func(t *testing.T, d string) { edit(t, filepath.Join(d, managerFile), "host", "evil") }, "CA key"},
		"other version":   {func(t *testing.T, d string) { edit(t, filepath.Join(d, managerFile), "version", 2) }, "version 2"},
		"unknown field":   {func(t *testing.T, d string) { edit(t, filepath.Join(d, managerFile), "extra", 2) }, "extra"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := whole(t)
			c.spoil(t, dir)
			before := tree(t, dir)
			m, err := Open(Options{Dir: dir})
			if err == nil {
				_ = m.Close(t.Context())
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), dir) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q, want %q", err, c.want)
			}
			if after := tree(t, dir); after != before {
				t.Errorf("the refused state changed:\n%s\n%s", before, after)
			}
		})
	}
	dir := whole(t)
	if _, err := Open(Options{Dir: dir, HostID: "other"}); !errors.Is(err, ErrState) {
		t.Errorf("other host: %v", err)
	}
	m := newManager(t, dir)
	if _, err := Open(Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "another vTPM manager") {
		t.Errorf("second manager: %v", err)
	}
	stop(t, start(t, m, guestA, ""))
}

// edit sets a field of a JSON file.
func edit(t *testing.T, file, field string, v any) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	m[field] = v
	if b, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// tree is a fingerprint of a directory's contents.
func tree(t *testing.T, dir string) string {
	t.Helper()
	h := sha256.New()
	var names []string
	err := filepath.Walk(dir, func(p string, st os.FileInfo, err error) error {
		if err != nil || st.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		names = append(names, p)
		fmt.Fprintf(h, "%s %x\n", p, sha256.Sum256(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%v %x", names, h.Sum(nil))
}

// A guest's saved data that was altered or swapped is refused; the other guests run.
func TestForeignGuestState(t *testing.T) {
	tools(t)
	for name, c := range map[string]struct {
		spoil func(t *testing.T, a, b string) // directories of guests A and B
		want  error
	}{
		"record altered": {func(t *testing.T, a, _ string) { edit(t, filepath.Join(a, recordFile), "instance", 7) }, ErrState},
		"AK altered":     {func(t *testing.T, a, _ string) { edit(t, filepath.Join(a, recordFile), "ak_name", "AAAA") }, ErrState},
		"record missing": {func(t *testing.T, a, _ string) { _ = os.Remove(filepath.Join(a, recordFile)) }, ErrState},
		"other's record": {func(t *testing.T, a, b string) {
			_ = os.Rename(filepath.Join(b, recordFile), filepath.Join(a, recordFile))
		}, ErrState},
		"other's TPM": {func(t *testing.T, a, b string) {
			_ = os.RemoveAll(filepath.Join(a, tpmDir))
			_ = os.Rename(filepath.Join(b, tpmDir), filepath.Join(a, tpmDir))
		}, engine.ErrOpen},
		"TPM missing": {func(t *testing.T, a, _ string) { _ = os.Remove(filepath.Join(a, tpmDir, engine.StateFile)) }, engine.ErrNoState},
		"TPM damaged": {func(t *testing.T, a, _ string) {
			_ = os.Truncate(filepath.Join(a, tpmDir, engine.StateFile), 1000)
		}, engine.ErrOpen},
	} {
		t.Run(name, func(t *testing.T) {
			dir := stateDir(t)
			m := newManager(t, dir)
			for _, g := range []string{guestA, guestB} {
				d := start(t, m, g, "")
				made(t, d)
				stop(t, d)
			}
			if err := m.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			c.spoil(t, m.guestDir(guestA), m.guestDir(guestB))
			before := tree(t, m.guestDir(guestA))
			m = newManager(t, dir)
			d, err := m.Start(t.Context(), guestA, Fixed(boot(t, "")))
			if err == nil {
				stop(t, d)
			}
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), guestA) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			if after := tree(t, m.guestDir(guestA)); after != before {
				t.Errorf("the refused state changed")
			}
			if name != "other's record" && name != "other's TPM" {
				stop(t, start(t, m, guestB, ""))
			}
			if err := m.Remove(guestA); err != nil {
				t.Errorf("remove: %v", err)
			}
			stop(t, start(t, m, guestA, ""))
		})
	}
}

// State that opens with the right key but is of another TPM is refused by its AK.
func TestForeignTPMWithTheRightKey(t *testing.T) {
	m := newManager(t, stateDir(t))
	d := start(t, m, guestA, "")
	made(t, d)
	stop(t, d)
	dir := filepath.Join(m.guestDir(guestA), tpmDir)
	if err := os.Remove(filepath.Join(dir, engine.StateFile)); err != nil {
		t.Fatal(err)
	}
	e, err := engine.Start(t.Context(), engine.Config{Dir: dir, Key: m.records[guestA].key})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Start(t.Context(), guestA, Fixed(boot(t, ""))); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "another TPM") {
		t.Errorf("error %v", err)
	}
}

func TestGuestNames(t *testing.T) {
	m := newManager(t, stateDir(t))
	for _, g := range []string{"", "x", "../../etc", strings.ToUpper(guestA), "{" + guestA + "}", guestA + "/", "urn:uuid:" + guestA} {
		if _, err := m.Start(t.Context(), g, Fixed(nil)); err == nil {
			t.Errorf("guest %q was started", g)
		}
		if err := m.Remove(g); err == nil {
			t.Errorf("guest %q was removed", g)
		}
	}
}

// A record that cannot be written ends the vTPM before any command has run, and leaves nothing.
func TestRecordCannotBeSaved(t *testing.T) {
	m := newManager(t, stateDir(t))
	events := boot(t, "")
	d, err := m.Start(t.Context(), guestA, func(context.Context) ([]eventlog.Event, error) {
		// A directory in the record's place.
		return events, os.Mkdir(filepath.Join(m.guestDir(guestA), recordFile), 0o700)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Manufactured(t.Context()); err == nil || !strings.Contains(err.Error(), "save its record") {
		t.Errorf("manufacture: %v", err)
	}
	if _, err := d.Execute(t.Context(), 1, 0, []byte{0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x7b, 0, 8}); err == nil || !strings.Contains(err.Error(), "save its record") {
		t.Errorf("a command ran without a record: %v", err)
	}
	if _, err := os.Stat(m.guestDir(guestA)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is left: %v", err)
	}
	if err := d.Close(t.Context()); !errors.Is(err, engine.ErrDead) {
		t.Errorf("close: %v", err)
	}
	stop(t, start(t, m, guestA, ""))
}

// A crash before the record was written leaves a guest that starts anew; one without the mark
// of that is refused.
func TestUnfinishedGuest(t *testing.T) {
	dir := stateDir(t)
	m := newManager(t, dir)
	d := start(t, m, guestA, "")
	made(t, d)
	stop(t, d)
	stop(t, start(t, m, guestB, ""))
	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, g := range []string{guestA, guestB} {
		if err := os.Remove(filepath.Join(m.guestDir(g), recordFile)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(m.guestDir(guestA), newMarker), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m = newManager(t, dir)
	stop(t, start(t, m, guestA, ""))
	if _, err := m.Start(t.Context(), guestB, Fixed(boot(t, ""))); !errors.Is(err, ErrState) {
		t.Errorf("guest without record and mark: %v", err)
	}
}

// A full disk fails what needs it, with a word about the disk, and costs nothing that was written.
func TestFullDisk(t *testing.T) {
	tools(t)
	if os.Getuid() != 0 {
		t.Fatal("needs root for a small tmpfs")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	m := newManager(t, filepath.Join(dir, "state"))
	d := start(t, m, guestA, "")
	made(t, d)
	id, err := d.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fill := filepath.Join(dir, "fill")
	if err := os.WriteFile(fill, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("fill the disk: %v", err)
	}
	// The running TPM writes NV and fails.
	if _, err := (tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}).Execute(guest{d}); err == nil {
		t.Fatal("NV was written on a full disk, so this test shows nothing")
	}
	if _, err := d.Quote(t.Context(), nil, Selection(tpm2.TPMAlgSHA256, 0)); !errors.Is(err, ErrFailure) {
		t.Errorf("quote: %v", err)
	}
	// A new one cannot be made and leaves nothing.
	if _, err := m.Start(t.Context(), guestB, Fixed(boot(t, ""))); err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("a new vTPM on a full disk: %v", err)
	}
	if _, err := os.Stat(m.guestDir(guestB)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is left of the new guest: %v", err)
	}
	_ = d.Close(t.Context()) // it has failed
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	d = start(t, m, guestA, "")
	defer stop(t, d)
	again, err := d.Identity(t.Context())
	if err != nil || !bytes.Equal(again.AK, id.AK) {
		t.Errorf("after room was made: %v", err)
	}
	stop(t, start(t, m, guestB, ""))
}

func FuzzRecord(f *testing.F) {
	dir := f.TempDir()
	m, err := Open(Options{Dir: filepath.Join(dir, "state")})
	if err != nil {
		f.Fatal(err)
	}
	defer func() { _ = m.Close(context.Background()) }()
	r := &record{Version: recordVersion, Guest: guestA, Instance: 3}
	b, err := r.encode(m.root)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1,"guest":"x","instance":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseRecord(b, guestA, m.root)
		if err == nil && (got.Instance != 3 || got.Guest != guestA || got.AK != nil || got.EKCertificate != nil) {
			t.Fatalf("an altered record was accepted: %s", b)
		}
	})
}

// TestKilledOverDirectories: what a manager leaves that is killed over making or removing a guest's directory is gone when the next
// one opens the state, and the guest can be made; what may be a vTPM that was given out is never removed.
func TestKilledOverDirectories(t *testing.T) {
	tools(t)
	state := func(dir string) {
		must(t, os.MkdirAll(filepath.Join(dir, tpmDir), 0o700))
		must(t, os.WriteFile(filepath.Join(dir, tpmDir, engine.StateFile), []byte("state"), 0o600))
	}
	record := func(dir string) { must(t, os.WriteFile(filepath.Join(dir, recordFile), []byte("record"), 0o600)) }
	for name, leave := range map[string]func(dir string){
		"made":                          func(d string) { must(t, os.Mkdir(d+makingSuffix, 0o700)) },
		"made and marked":               func(d string) { must(t, os.Mkdir(d+makingSuffix, 0o700)); mark(t, d+makingSuffix) },
		"made whole":                    func(d string) { state(d + makingSuffix); mark(t, d+makingSuffix) },
		"named":                         func(d string) { state(d); mark(t, d) },
		"to be removed":                 func(d string) { state(d + removedSuffix); mark(t, d+removedSuffix) },
		"removed in part":               func(d string) { state(d + removedSuffix) },
		"removed and another":           func(d string) { state(d + removedSuffix); state(d); mark(t, d) },
		"a whole one removed":           func(d string) { state(d + removedSuffix); record(d + removedSuffix) },
		"removed but for its directory": func(d string) { must(t, os.Mkdir(d+removedSuffix, 0o700)) },
		"removed and one made":          func(d string) { state(d + removedSuffix); state(d + makingSuffix) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := stateDir(t)
			m := newManager(t, dir)
			leave(m.guestDir(guestA))
			must(t, m.Close(t.Context()))
			m = newManager(t, dir)
			left, err := os.ReadDir(filepath.Join(dir, guestsDir))
			if err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
			stop(t, start(t, m, guestA, ""))
			must(t, m.Remove(guestA))
			if err := m.Remove(guestA); !errors.Is(err, ErrUnknown) {
				t.Errorf("removed twice: %v", err)
			}
		})
	}
	t.Run("removed by the same manager", func(t *testing.T) {
		m := newManager(t, stateDir(t))
		gone := m.guestDir(guestA) + removedSuffix
		state(gone)
		if err := m.Remove(guestA); !errors.Is(err, ErrUnknown) {
			t.Errorf("removed: %v", err)
		}
		if _, err := os.Lstat(gone); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("left: %v", err)
		}
	})
	t.Run("cannot be removed", func(t *testing.T) {
		dir := stateDir(t)
		m := newManager(t, dir)
		gone := m.guestDir(guestA) + removedSuffix
		state(gone)
		must(t, syscall.Mount("tmpfs", filepath.Join(gone, tpmDir), "tmpfs", 0, "size=16k"))
		unmount := sync.OnceValue(func() error { return syscall.Unmount(filepath.Join(gone, tpmDir), syscall.MNT_DETACH) })
		defer func() { must(t, unmount()) }()
		must(t, m.Close(t.Context()))
		m = newManager(t, dir)
		stop(t, start(t, m, guestB, "")) // others run
		if _, err := m.Start(t.Context(), guestA, Fixed(boot(t, ""))); !errors.Is(err, ErrState) {
			t.Errorf("started: %v", err)
		}
		must(t, unmount())
		if err := m.Remove(guestA); !errors.Is(err, ErrUnknown) {
			t.Errorf("removed: %v", err)
		}
		stop(t, start(t, m, guestA, ""))
	})
	t.Run("given out", func(t *testing.T) {
		dir := stateDir(t)
		m := newManager(t, dir)
		state(m.guestDir(guestA))
		must(t, m.Close(t.Context()))
		m = newManager(t, dir)
		if _, err := m.Start(t.Context(), guestA, Fixed(boot(t, ""))); !errors.Is(err, ErrState) {
			t.Errorf("a directory with state, without record and mark: %v", err)
		}
		if b, err := os.ReadFile(filepath.Join(m.guestDir(guestA), tpmDir, engine.StateFile)); string(b) != "state" {
			t.Errorf("%q, %v", b, err)
		}
	})
}

func mark(t *testing.T, dir string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(dir, newMarker), nil, 0o600))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
