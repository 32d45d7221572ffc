package manager

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"redoubt.dev/redoubt/vtpm/engine"
)

// A guest that owns its TPM and clears it loses neither AK nor certificate, and the EK comes back.
func TestGuestClears(t *testing.T) {
	dir := stateDir(t)
	m := newManager(t, dir)
	d := start(t, m, guestA, "")
	made(t, d)
	before, err := d.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}).Execute(guest{d}); err != nil {
		t.Fatalf("clear through lockout: %v", err)
	}
	if _, err := d.Quote(t.Context(), []byte("n"), Selection(tpm2.TPMAlgSHA256, 0)); err != nil {
		t.Errorf("quote after a clear: %v", err)
	}
	if nv, err := readNV(guest{d}, indexEKCertificate); err != nil || !bytes.Equal(nv, before.EKCertificate) {
		t.Errorf("certificate after a clear: %v", err)
	}
	if ek, _, err := readPublic(guest{d}, handleEK); err != nil || ek != nil {
		t.Errorf("the clear did not evict the EK, so this test shows nothing: %v", err)
	}
	credential, seed, secret := challenge(t, before, before.AKName)
	if a, err := d.Activate(t.Context(), credential, seed); err != nil || !bytes.Equal(a, secret) {
		t.Errorf("activation after a clear: %v", err)
	}
	// What only the platform may do is refused: evict the AK, clear or own the platform.
	for name, do := range map[string]func() error{
		"evict the AK as owner": func() error {
			_, err := tpm2.EvictControl{
				Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
				ObjectHandle:     tpm2.NamedHandle{Handle: handleAK, Name: tpm2.TPM2BName{Buffer: before.AKName}},
				PersistentHandle: handleAK,
			}.Execute(guest{d})
			return err
		},
		"evict the AK as platform": func() error {
			_, err := tpm2.EvictControl{
				Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)},
				ObjectHandle:     tpm2.NamedHandle{Handle: handleAK, Name: tpm2.TPM2BName{Buffer: before.AKName}},
				PersistentHandle: handleAK,
			}.Execute(guest{d})
			return err
		},
		"clear as platform": func() error {
			_, err := tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)}}.Execute(guest{d})
			return err
		},
		"own the platform": func() error {
			_, err := tpm2.HierarchyChangeAuth{
				AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)},
				NewAuth:    tpm2.TPM2BAuth{Buffer: []byte("mine")},
			}.Execute(guest{d})
			return err
		},
	} {
		if err := do(); err == nil {
			t.Errorf("the guest may %s", name)
		}
	}
	stop(t, d)
	d = start(t, m, guestA, "")
	defer stop(t, d)
	made(t, d)
	if ek, _, err := readPublic(guest{d}, handleEK); err != nil || ek == nil {
		t.Errorf("the EK is not back after a restart: %v", err)
	}
}

// The guest's objects and sessions fill the TPM; the host's commands work all the same and the
// guest finds everything under its handle.
func TestHostInAFullTPM(t *testing.T) {
	m := newManager(t, stateDir(t))
	d := start(t, m, guestA, "")
	defer stop(t, d)
	made(t, d)
	g := guest{d}
	for _, gap := range []int{-1, 0, 1, 2} { // a slot that is free, if any
		handles, names := fill(t, g)
		if gap >= 0 {
			if _, err := (tpm2.FlushContext{FlushHandle: handles[gap]}).Execute(g); err != nil {
				t.Fatal(err)
			}
		}
		var sessions []func() error
		for range 3 {
			_, end, err := tpm2.PolicySession(g, tpm2.TPMAlgSHA256, 16)
			if err != nil {
				t.Fatal(err)
			}
			sessions = append(sessions, end)
		}
		q, err := d.Quote(t.Context(), []byte("n"), Selection(tpm2.TPMAlgSHA256, 0))
		if err != nil {
			t.Fatalf("gap %d: quote: %v", gap, err)
		}
		credential, seed, secret := challenge(t, q.Identity, q.AKName)
		if a, err := d.Activate(t.Context(), credential, seed); err != nil || !bytes.Equal(a, secret) {
			t.Fatalf("gap %d: activate: %v", gap, err)
		}
		for i, h := range handles {
			if i == gap {
				continue
			}
			pub, err := tpm2.ReadPublic{ObjectHandle: h}.Execute(g)
			if err != nil || !bytes.Equal(pub.Name.Buffer, names[i]) {
				t.Errorf("gap %d: the guest's object %#x is another now: %v", gap, h, err)
			}
			if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(g); err != nil {
				t.Error(err)
			}
		}
		for _, end := range sessions {
			if err := end(); err != nil {
				t.Errorf("gap %d: the guest's session is gone: %v", gap, err)
			}
		}
	}
	// Nothing of the host's is left.
	for _, first := range []uint32{firstTransient, firstLoadedSession} {
		h := d.host(t.Context(), &turn{})
		if l, err := h.handles(first); err != nil || len(l) != 0 {
			t.Errorf("left loaded: %v, %v", l, err)
		}
	}
}

// fill has the guest load an object into each of the TPM's three slots.
func fill(t *testing.T, g guest) (handles []tpm2.TPMHandle, names [][]byte) {
	t.Helper()
	for i := range 3 {
		tmpl := tpm2.ECCSRKTemplate
		tmpl.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: []byte{byte(i)}}, Y: tpm2.TPM2BECCParameter{Buffer: []byte{0}},
		})
		rsp, err := tpm2.CreatePrimary{
			PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			InPublic:      tpm2.New2B(tmpl),
		}.Execute(g)
		if err != nil {
			t.Fatal(err)
		}
		handles, names = append(handles, rsp.ObjectHandle), append(names, rsp.Name.Buffer)
	}
	return handles, names
}

// srk is the guest's storage key.
func srk(t *testing.T, g transport.TPM) tpm2.NamedHandle {
	t.Helper()
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(g)
	if err != nil {
		t.Fatal(err)
	}
	return tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}
}

// unseal opens a sealed object with the policy of PCR 8 and 9 as they are.
func unseal(t *testing.T, g transport.TPM, public, private []byte) ([]byte, error) {
	t.Helper()
	parent := srk(t, g)
	obj, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: parent.Handle, Name: parent.Name, Auth: tpm2.PasswordAuth(nil)},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](public),
		InPrivate:    tpm2.TPM2BPrivate{Buffer: private},
	}.Execute(g)
	if err != nil {
		t.Fatal(err)
	}
	rsp, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: obj.ObjectHandle, Name: obj.Name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16,
		func(tpm transport.TPM, s tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
			_, err := tpm2.PolicyPCR{PolicySession: s, Pcrs: Selection(tpm2.TPMAlgSHA256, 8, 9)}.Execute(tpm)
			return err
		})}}.Execute(g)
	for _, h := range []tpm2.TPMHandle{obj.ObjectHandle, parent.Handle} {
		if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(g); err != nil {
			t.Fatal(err)
		}
	}
	if err != nil {
		return nil, err
	}
	return rsp.OutData.Buffer, nil
}

// A key that the guest sealed to its boot opens after a restart, and not after another boot.
func TestSealedInTheGuest(t *testing.T) {
	dir := stateDir(t)
	m := newManager(t, dir)
	d := start(t, m, guestA, "root=/dev/vda")
	g := guest{d}
	secret := []byte("disk key")

	s, end, err := tpm2.PolicySession(g, tpm2.TPMAlgSHA256, 16, tpm2.Trial())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.PolicyPCR{PolicySession: s.Handle(), Pcrs: Selection(tpm2.TPMAlgSHA256, 8, 9)}).Execute(g); err != nil {
		t.Fatal(err)
	}
	policy, err := tpm2.PolicyGetDigest{PolicySession: s.Handle()}.Execute(g)
	if err != nil {
		t.Fatal(err)
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
	parent := srk(t, g)
	obj, err := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: parent.Handle, Name: parent.Name, Auth: tpm2.PasswordAuth(nil)},
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret}),
		}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, AuthPolicy: policy.PolicyDigest,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true},
		}),
	}.Execute(g)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.FlushContext{FlushHandle: parent.Handle}).Execute(g); err != nil {
		t.Fatal(err)
	}
	public, private := obj.OutPublic.Bytes(), obj.OutPrivate.Buffer
	opens := func(when string, want bool) {
		t.Helper()
		got, err := unseal(t, guest{d}, public, private)
		if ok := err == nil && bytes.Equal(got, secret); ok != want {
			t.Errorf("%s: opens %v, want %v (%v)", when, ok, want, err)
		}
	}
	opens("same boot", true)
	stop(t, d)
	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}

	m = newManager(t, dir)
	d = start(t, m, guestA, "root=/dev/vda")
	opens("restart, same measurements", true)
	if err := d.Reset(t.Context(), Fixed(boot(t, "root=/dev/vda init=/bin/sh"))); err != nil {
		t.Fatal(err)
	}
	opens("reboot with another command line", false)
	if err := d.Reset(t.Context(), Fixed(boot(t, "root=/dev/vda"))); err != nil {
		t.Fatal(err)
	}
	opens("reboot with the first command line", true)
	stop(t, d)
	d = start(t, m, guestA, "root=/dev/vda init=/bin/sh")
	opens("restart, other measurements", false)
	stop(t, d)
	d = start(t, m, guestA, "root=/dev/vda")
	defer stop(t, d)
	opens("restart, same measurements again", true)
}

// A guest that sets an endorsement password keeps the host from activation, with a clear word,
// and from nothing else.
func TestEndorsementPassword(t *testing.T) {
	m := newManager(t, stateDir(t))
	d := start(t, m, guestA, "")
	defer stop(t, d)
	made(t, d)
	if _, err := (tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		NewAuth:    tpm2.TPM2BAuth{Buffer: []byte("mine")},
	}).Execute(guest{d}); err != nil {
		t.Fatal(err)
	}
	q, err := d.Quote(t.Context(), []byte("n"), Selection(tpm2.TPMAlgSHA256, 0))
	if err != nil {
		t.Fatal(err)
	}
	credential, seed, _ := challenge(t, q.Identity, q.AKName)
	if _, err := d.Activate(t.Context(), credential, seed); err == nil || !strings.Contains(err.Error(), "endorsement password") {
		t.Errorf("activation: %v", err)
	}
}

// Host's commands and the guest's run side by side without seeing each other.
func TestGuestAndHostTogether(t *testing.T) {
	m := newManager(t, stateDir(t))
	d := start(t, m, guestA, "")
	defer stop(t, d)
	var wg sync.WaitGroup
	// The guest works from the first moment, while the vTPM is being manufactured.
	for range 3 { // each holds an object and a session at a time, all slots together
		wg.Go(func() {
			for range 5 {
				s, end, err := tpm2.PolicySession(guest{d}, tpm2.TPMAlgSHA256, 16)
				if err != nil {
					t.Error(err)
					return
				}
				key := srk(t, guest{d})
				if _, err := (tpm2.PolicyGetDigest{PolicySession: s.Handle()}).Execute(guest{d}); err != nil {
					t.Error(err)
				}
				pub, err := tpm2.ReadPublic{ObjectHandle: key.Handle}.Execute(guest{d})
				if err != nil || !bytes.Equal(pub.Name.Buffer, key.Name.Buffer) {
					t.Errorf("the guest's key: %v", err)
				}
				if _, err := (tpm2.FlushContext{FlushHandle: key.Handle}).Execute(guest{d}); err != nil {
					t.Error(err)
				}
				if err := end(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for range 10 {
			q, err := d.Quote(t.Context(), []byte("n"), Selection(tpm2.TPMAlgSHA256, 0, 8))
			if err != nil {
				t.Error(err)
				return
			}
			checkQuote(t, q, []byte("n"))
			credential, seed, secret := challenge(t, q.Identity, q.AKName)
			if a, err := d.Activate(t.Context(), credential, seed); err != nil || !bytes.Equal(a, secret) {
				t.Errorf("activation: %v", err)
				return
			}
		}
	})
	wg.Wait()
}

// An engine that dies ends its device; the guest's vTPM can be started again.
func TestEngineDies(t *testing.T) {
	m := newManager(t, stateDir(t))
	d := start(t, m, guestA, "")
	made(t, d)
	if err := syscall.Kill(d.Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-d.Done()
	if _, err := d.Quote(t.Context(), nil, Selection(tpm2.TPMAlgSHA256, 0)); !errors.Is(err, engine.ErrDead) {
		t.Errorf("quote: %v", err)
	}
	if err := d.Close(t.Context()); !errors.Is(err, engine.ErrDead) {
		t.Errorf("close: %v", err)
	}
	stop(t, start(t, m, guestA, ""))
}

// A close that may not take time kills.
func TestCloseInAHurry(t *testing.T) {
	m := newManager(t, stateDir(t))
	d := start(t, m, guestA, "")
	if err := syscall.Kill(d.Pid(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.Close(ctx); err == nil {
		t.Error("a frozen engine was closed in order")
	}
	select {
	case <-d.Done():
	default:
		t.Error("the engine still runs")
	}
}
