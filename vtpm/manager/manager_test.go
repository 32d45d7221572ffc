package manager

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/lab/debian"
)

const guestA = "0b5ff3a6-0d8e-4a1c-9c41-0d7b4c2f6a01"

const guestB = "0b5ff3a6-0d8e-4a1c-9c41-0d7b4c2f6a02"

// tools points package programs at the unpacked swtpm.
func tools(t testing.TB) *debian.Root {
	t.Helper()
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("REDOUBT_TOOLS", root.Tools())
	return root
}

// boot is the measured boot of a guest with a command line.
func boot(t testing.TB, cmdline string) []eventlog.Event {
	t.Helper()
	e, err := eventlog.Boot(eventlog.BootConfig{
		MonitorVersion: "test", MachineConfig: []byte("{}"), Cmdline: cmdline,
		Kernel: strings.NewReader("kernel"), Initrd: strings.NewReader("initrd"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func newManager(t testing.TB, dir string) *Manager {
	t.Helper()
	tools(t)
	m, err := Open(Options{Dir: dir, HostID: "test-host"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(context.Background()); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return m
}

func stateDir(t testing.TB) string { return filepath.Join(t.TempDir(), "state") }

func start(t testing.TB, m *Manager, guest, cmdline string) *Device {
	t.Helper()
	d, err := m.Start(t.Context(), guest, Fixed(boot(t, cmdline)))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func made(t testing.TB, d *Device) {
	t.Helper()
	if err := d.Manufactured(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func stop(t testing.TB, d *Device) {
	t.Helper()
	if err := d.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// guest is the transport of the guest's own software.
type guest struct{ d *Device }

// sent numbers all guests' commands.
var sent atomic.Uint32

func (g guest) Send(cmd []byte) ([]byte, error) {
	return g.d.Execute(context.Background(), sent.Add(1), 0, cmd)
}

// The registers in every bank are those of the event log, and the log says the boot. In banks that
// nothing was measured in, every register that the boot extends is capped, so that the guest cannot
// give it the value of a boot.
func TestMeasurementsAreInEveryBank(t *testing.T) {
	m := newManager(t, stateDir(t))
	for name, banks := range map[string][]tpm2.TPMAlgID{
		"all": nil, "default": {tpm2.TPMAlgSHA256}, "two": {tpm2.TPMAlgSHA384, tpm2.TPMAlgSHA256},
	} {
		t.Run(name, func(t *testing.T) { measuredIn(t, m, banks) })
	}
}

func measuredIn(t *testing.T, m *Manager, banks []tpm2.TPMAlgID) {
	list, err := eventlog.Boot(eventlog.BootConfig{Kernel: strings.NewReader("kernel"), Cmdline: "quiet", Banks: banks})
	if err != nil {
		t.Fatal(err)
	}
	d, err := m.Start(t.Context(), guestA, Fixed(list))
	if err != nil {
		t.Fatal(err)
	}
	defer stop(t, d)
	log, err := d.EventLog(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	events, err := eventlog.Parse(log)
	if err != nil {
		t.Fatal(err)
	}
	want, err := eventlog.Replay(events)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(banks); n == 0 && len(want.BankIDs()) != len(eventlog.Banks) || n > 0 && len(want.BankIDs()) != n {
		t.Errorf("the log has the banks %v", want.BankIDs())
	}
	for _, bank := range eventlog.Banks {
		got, err := d.ReadPCRs(t.Context(), Selection(bank, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 11 {
			t.Fatalf("%d registers of %s", len(got), eventlog.AlgorithmName(bank))
		}
		for _, p := range got {
			value := want.Value(bank, p.Index)
			if !slices.Contains(want.BankIDs(), bank) {
				value = capped(t, bank, p.Index, events)
			}
			if !bytes.Equal(p.Value, value) {
				t.Errorf("%s PCR %d is %x, not %x", eventlog.AlgorithmName(bank), p.Index, p.Value, value)
			}
		}
	}
}

// capped is a register after each of its events has put a cap there.
func capped(t *testing.T, bank tpm2.TPMAlgID, pcr uint32, events []eventlog.Event) []byte {
	t.Helper()
	caps := []eventlog.Event{}
	for _, e := range events {
		if e.PCR == pcr {
			e.Digests = []eventlog.Digest{{Algorithm: bank, Sum: eventlog.Cap(bank)}}
			caps = append(caps, e)
		}
	}
	r, err := eventlog.Replay(caps)
	if err != nil {
		t.Fatal(err)
	}
	return r.Value(bank, pcr)
}

// The engine starts while the measurements are still being taken, and a failure of theirs ends it.
func TestMeasurementsInParallel(t *testing.T) {
	m := newManager(t, stateDir(t))
	broken := errors.New("broken kernel image")
	called := false
	if _, err := m.Start(t.Context(), guestA, func(context.Context) ([]eventlog.Event, error) {
		called = true
		return nil, broken
	}); !errors.Is(err, broken) || !called {
		t.Errorf("broken measurements: %v", err)
	}
	if _, err := os.Stat(m.guestDir(guestA)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a start that failed left %s: %v", m.guestDir(guestA), err)
	}
	events := boot(t, "")
	events[2].Digests = events[2].Digests[:1]
	if _, err := m.Start(t.Context(), guestA, Fixed(events)); err == nil || !strings.Contains(err.Error(), "no sha256 digest") {
		t.Errorf("a bank without measurement: %v", err)
	}
	stop(t, start(t, m, guestA, ""))
}

func TestManufacture(t *testing.T) {
	dir := stateDir(t)
	m := newManager(t, dir)
	d := start(t, m, guestA, "")
	made(t, d)
	id, err := d.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(id.EKCertificate)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(m.CACertificate())
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Errorf("EK certificate: %v", err)
	}
	if ca.Subject.CommonName != "Redoubt vTPM CA test-host" || !strings.Contains(cert.Subject.CommonName, guestA) {
		t.Errorf("names %q, %q", ca.Subject, cert.Subject)
	}
	if len(cert.UnknownExtKeyUsage) != 1 || !cert.UnknownExtKeyUsage[0].Equal(asn1.ObjectIdentifier{2, 23, 133, 8, 1}) {
		t.Errorf("extended key usage %v", cert.UnknownExtKeyUsage)
	}
	// What the guest's software finds: certificate in NV, EK at its handle with the same key.
	nv, err := readNV(guest{d}, indexEKCertificate)
	if err != nil || !bytes.Equal(nv, id.EKCertificate) {
		t.Errorf("certificate in NV: %v", err)
	}
	ek, _, err := readPublic(guest{d}, handleEK)
	if err != nil || ek == nil {
		t.Fatalf("EK: %v, %v", ek, err)
	}
	if k, err := publicKey(ek); err != nil || !k.Equal(cert.PublicKey) {
		t.Errorf("the certificate is of another key: %v", err)
	}
	_, akName, err := readPublic(guest{d}, handleAK)
	if err != nil || !bytes.Equal(akName, id.AKName) {
		t.Errorf("AK name %x, %v", akName, err)
	}
	stop(t, d)

	// The identity is the same after a restart of the manager.
	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	m = newManager(t, dir)
	d = start(t, m, guestA, "")
	defer stop(t, d)
	again, err := d.Identity(t.Context())
	if err != nil || !bytes.Equal(again.EKCertificate, id.EKCertificate) || !bytes.Equal(again.AK, id.AK) {
		t.Errorf("the identity changed over a restart: %v", err)
	}
	inv := m.Inventory()
	if len(inv) != 1 || inv[0].Guest != guestA || inv[0].Instance != 1 || !inv[0].Running || !bytes.Equal(inv[0].AKName, id.AKName) {
		t.Errorf("inventory %+v", inv)
	}
}

// checkQuote verifies a quote's signature, nonce and digest of registers.
func checkQuote(t *testing.T, q Quote, nonce []byte) {
	t.Helper()
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](q.AK)
	if err != nil {
		t.Fatal(err)
	}
	key, err := publicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](q.Signature)
	if err != nil {
		t.Fatal(err)
	}
	e, err := sig.Signature.ECDSA()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(q.Attest)
	if !ecdsa.Verify(key, sum[:], new(big.Int).SetBytes(e.SignatureR.Buffer), new(big.Int).SetBytes(e.SignatureS.Buffer)) {
		t.Error("the quote's signature is wrong")
	}
	att, err := tpm2.Unmarshal[tpm2.TPMSAttest](q.Attest)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(att.ExtraData.Buffer, nonce) {
		t.Errorf("nonce %x", att.ExtraData.Buffer)
	}
	quoted, err := att.Attested.Quote()
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	for _, p := range q.PCRs {
		h.Write(p.Value)
	}
	if !bytes.Equal(quoted.PCRDigest.Buffer, h.Sum(nil)) {
		t.Error("the registers are not those of the quote")
	}
}

var allPCRs = []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23}

// challenge makes a credential for an AK under the EK of a certificate, as a verifier does.
func challenge(t *testing.T, id Identity, akName []byte) (credential, seed, secret []byte) {
	t.Helper()
	cert, err := x509.ParseCertificate(id.EKCertificate)
	if err != nil {
		t.Fatal(err)
	}
	point, err := cert.PublicKey.(*ecdsa.PublicKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	ek := tpm2.ECCEKTemplate
	ek.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
	})
	key, err := tpm2.ImportEncapsulationKey(&ek)
	if err != nil {
		t.Fatal(err)
	}
	secret = []byte("thirty-two bytes of a secret ...")
	credential, seed, err = tpm2.CreateCredential(rand.Reader, key, akName, secret)
	if err != nil {
		t.Fatal(err)
	}
	return credential, seed, secret
}

func TestQuoteAndActivate(t *testing.T) {
	m := newManager(t, stateDir(t))
	d := start(t, m, guestA, "")
	defer stop(t, d)
	nonce := []byte("0123456789abcdef0123456789abcdef")
	q, err := d.Quote(t.Context(), nonce, Selection(tpm2.TPMAlgSHA256, allPCRs...))
	if err != nil {
		t.Fatal(err)
	}
	checkQuote(t, q, nonce)
	if len(q.PCRs) != 24 {
		t.Errorf("%d registers", len(q.PCRs))
	}
	credential, seed, secret := challenge(t, q.Identity, q.AKName)
	answer, err := d.Activate(t.Context(), credential, seed)
	if err != nil || !bytes.Equal(answer, secret) {
		t.Errorf("activation: %x, %v", answer, err)
	}
	// A credential for another AK does not open.
	other := bytes.Clone(q.AKName)
	other[5] ^= 1
	credential, seed, _ = challenge(t, q.Identity, other)
	if _, err := d.Activate(t.Context(), credential, seed); err == nil {
		t.Error("a credential for another AK opened")
	}
	// Nor one for another EK.
	d2 := start(t, m, guestB, "")
	defer stop(t, d2)
	id2, err := d2.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	credential, seed, _ = challenge(t, id2, q.AKName)
	if _, err := d.Activate(t.Context(), credential, seed); err == nil {
		t.Error("a credential for another EK opened")
	}
	if bytes.Equal(id2.AKName, q.AKName) {
		t.Error("two guests have one AK")
	}
}

func TestManyDevices(t *testing.T) {
	m := newManager(t, stateDir(t))
	var wg sync.WaitGroup
	events := boot(t, "")
	for i := range 8 {
		wg.Go(func() {
			id := fmt.Sprintf("0b5ff3a6-0d8e-4a1c-9c41-0000000000%02d", i)
			d, err := m.Start(t.Context(), id, Fixed(events))
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := m.Start(t.Context(), id, Fixed(events)); !errors.Is(err, ErrRunning) {
				t.Errorf("second start: %v", err)
			}
			if _, err := d.Quote(t.Context(), []byte("n"), Selection(tpm2.TPMAlgSHA256, 0)); err != nil {
				t.Error(err)
			}
			if i%2 == 0 { // the others are closed by the manager
				if err := d.Close(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	seen := make(map[int]bool)
	for _, e := range m.Inventory() {
		if seen[e.Instance] {
			t.Errorf("instance %d twice", e.Instance)
		}
		seen[e.Instance] = true
	}
	if len(seen) != 8 {
		t.Errorf("%d in the inventory", len(seen))
	}
	if err := m.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := m.Start(t.Context(), guestA, Fixed(events)); !errors.Is(err, ErrClosed) {
		t.Errorf("start after close: %v", err)
	}
}
