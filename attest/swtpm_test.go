package attest

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/lab/debian"
)

// Control commands of swtpm.
const (
	ctlInit        uint32 = 0x02
	ctlSetLocality uint32 = 0x05
	ctlSetDataFD   uint32 = 0x10
)

// An emulator is a real TPM: swtpm, on an empty state.
type emulator struct {
	t          testing.TB
	ctrl, data *os.File
	ek, ak     tpm2.NamedHandle
	ekPub      *tpm2.TPMTPublic
	akPub      *tpm2.TPMTPublic
}

// newEmulator starts a TPM from a locality and makes its keys; it ends with the test.
func newEmulator(t testing.TB, root *debian.Root, locality byte) *emulator {
	t.Helper()
	s := &emulator{t: t}
	var theirs, theirData *os.File
	s.ctrl, theirs = socketpair(t)
	s.data, theirData = socketpair(t)
	cmd := root.Command(context.Background(), "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+t.TempDir(),
		"--ctrl", "type=unixio,clientfd=3")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may be gone
		_ = cmd.Wait()         // it was killed
	})
	theirs.Close()
	s.control(ctlSetDataFD, nil, unix.UnixRights(int(theirData.Fd())))
	theirData.Close()
	s.control(ctlInit, make([]byte, 4), nil)
	s.control(ctlSetLocality, []byte{locality}, nil)
	if _, err := (tpm2.Startup{StartupType: tpm2.TPMSUClear}).Execute(s); err != nil {
		t.Fatal(err)
	}
	s.control(ctlSetLocality, []byte{0}, nil)
	s.ek, s.ekPub = s.primary(tpm2.TPMRHEndorsement, tpm2.ECCEKTemplate)
	s.ak, s.akPub = s.primary(tpm2.TPMRHPlatform, akTemplate())
	return s
}

func socketpair(t testing.TB) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, b = os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func (s *emulator) control(cmd uint32, body, rights []byte) {
	s.t.Helper()
	if err := unix.Sendmsg(int(s.ctrl.Fd()), append(binary.BigEndian.AppendUint32(nil, cmd), body...), rights, nil, 0); err != nil {
		s.t.Fatal(err)
	}
	var b [4]byte
	if _, err := io.ReadFull(s.ctrl, b[:]); err != nil {
		s.t.Fatal(err)
	}
	if r := binary.BigEndian.Uint32(b[:]); r != 0 {
		s.t.Fatalf("swtpm: control command %#x: %#x", cmd, r)
	}
}

// Send implements transport.TPM.
func (s *emulator) Send(cmd []byte) ([]byte, error) {
	if _, err := s.data.Write(cmd); err != nil {
		return nil, err
	}
	b := make([]byte, 4096)
	if _, err := io.ReadFull(s.data, b[:10]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(b[2:])
	if n < 10 || int(n) > len(b) {
		return nil, fmt.Errorf("response of %d bytes", n)
	}
	_, err := io.ReadFull(s.data, b[10:n])
	return b[:n], err
}

func (s *emulator) primary(in tpm2.TPMHandle, template tpm2.TPMTPublic) (tpm2.NamedHandle, *tpm2.TPMTPublic) {
	s.t.Helper()
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: in, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(template),
	}.Execute(s)
	if err != nil {
		s.t.Fatal(err)
	}
	pub, err := rsp.OutPublic.Contents()
	if err != nil {
		s.t.Fatal(err)
	}
	return tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, pub
}

// extend carries out the events of a log.
func (s *emulator) extend(events []eventlog.Event) {
	s.t.Helper()
	for _, e := range events {
		if e.Type == eventlog.TypeNoAction {
			continue
		}
		var digests tpm2.TPMLDigestValues
		for _, d := range e.Digests {
			digests.Digests = append(digests.Digests, tpm2.TPMTHA{HashAlg: d.Algorithm, Digest: d.Sum})
		}
		if _, err := (tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)}, Digests: digests,
		}).Execute(s); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *emulator) read(bank tpm2.TPMAlgID, pcr int) []byte {
	s.t.Helper()
	rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: bank, PCRSelect: tpm2.PCClientCompatible.PCRs(uint(pcr))},
	}}}.Execute(s)
	if err != nil {
		s.t.Fatal(err)
	}
	if len(rsp.PCRValues.Digests) != 1 {
		s.t.Fatalf("bank %s has no PCR %d", eventlog.AlgorithmName(bank), pcr)
	}
	return rsp.PCRValues.Digests[0].Buffer
}

func (s *emulator) quote(nonce []byte) (quote, signature []byte, pcrs []Hex) {
	s.t.Helper()
	cmd := tpm2.Quote{
		SignHandle:     tpm2.AuthHandle{Handle: s.ak.Handle, Name: s.ak.Name, Auth: tpm2.PasswordAuth(nil)},
		QualifyingData: tpm2.TPM2BData{Buffer: nonce},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect:      allPCRs(),
	}
	rsp, err := cmd.Execute(s)
	for errors.Is(err, tpm2.TPMRCRetry) { // the first use of an algorithm tests it
		rsp, err = cmd.Execute(s)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	for i := range PCRCount {
		pcrs = append(pcrs, s.read(tpm2.TPMAlgSHA256, i))
	}
	return rsp.Quoted.Bytes(), tpm2.Marshal(rsp.Signature), pcrs
}

func (s *emulator) activate(blob, secret []byte) ([]byte, error) {
	rsp, err := tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: s.ak.Handle, Name: s.ak.Name, Auth: tpm2.PasswordAuth(nil)},
		KeyHandle: tpm2.AuthHandle{
			Handle: s.ek.Handle, Name: s.ek.Name,
			Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(tpm transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
				_, err := tpm2.PolicySecret{
					AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
					PolicySession: session, NonceTPM: nonce,
				}.Execute(tpm)
				return err
			}),
		},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: blob},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: secret},
	}.Execute(s)
	if err != nil {
		return nil, err
	}
	return rsp.CertInfo.Buffer, nil
}

// evidence boots a guest on the TPM and returns evidence of it.
func (s *emulator) evidence(ca *testCA, events []eventlog.Event, nonce []byte) *Evidence {
	s.t.Helper()
	log, err := eventlog.Encode(events)
	if err != nil {
		s.t.Fatal(err)
	}
	s.extend(events)
	parms, err := s.ekPub.Parameters.ECCDetail()
	if err != nil {
		s.t.Fatal(err)
	}
	point, err := s.ekPub.Unique.ECC()
	if err != nil {
		s.t.Fatal(err)
	}
	ek, err := tpm2.ECDSAPub(parms, point)
	if err != nil {
		s.t.Fatal(err)
	}
	e := &Evidence{
		Guest: "web", EventLog: append(log, make([]byte, 4096)...), AK: tpm2.Marshal(tpm2.New2B(*s.akPub)),
		EKCertificate: ca.endorse(s.t, ek, oidEKCertificate), EKChain: ca.chain,
	}
	e.Quote, e.Signature, e.PCRs = s.quote(nonce)
	return e
}

func openRoot(t testing.TB) *debian.Root {
	t.Helper()
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// A real TPM's evidence passes every step, and fails where the start was another.
func TestRealTPM(t *testing.T) {
	root := openRoot(t)
	ca, nonce := newTestCA(t), []byte{1, 2, 3, 4}
	good := newEmulator(t, root, 0)
	e := good.evidence(ca, bootEvents(t, "kernel", "quiet ro"), nonce)
	o := Options{Nonce: nonce, Roots: ca.roots, Activate: good.activate}
	var err error
	if o.Policy, err = PolicyFrom(e); err != nil {
		t.Fatal(err)
	}
	if r := Verify(e, o); !r.OK {
		t.Fatalf("good start: %+v", r.Failed())
	}

	other := newEmulator(t, root, 0)
	changed := other.evidence(ca, bootEvents(t, "kernel", "quiet"), nonce)
	if f := Verify(changed, o).Failed(); f == nil || f.Name != StepActivation {
		t.Errorf("evidence of one TPM, credential to another: %+v", f)
	}
	o.Activate = other.activate
	const want = "PCR 8 (kernel command line): event 4 'quiet' is not 'quiet ro'"
	if f := Verify(changed, o).Failed(); f == nil || f.Name != StepPolicy || f.Reason != want {
		t.Errorf("changed command line: %+v", f)
	}
	changed.EventLog = e.EventLog
	if f := Verify(changed, o).Failed(); f == nil || f.Name != StepLog || !strings.HasPrefix(f.Reason, "PCR 8 (kernel command line): log says ") {
		t.Errorf("log of the good start: %+v", f)
	}
}

// The registers we compute are the TPM's own, in every bank, from every start locality.
func TestReplayAgainstTPM(t *testing.T) {
	root := openRoot(t)
	for _, locality := range []byte{0, 3} {
		tpm := newEmulator(t, root, locality)
		start := eventlog.Event{Type: eventlog.TypeNoAction, Data: append([]byte("StartupLocality\x00"), locality)}
		for _, size := range []int{20, 32, 48, 64} {
			start.Digests = append(start.Digests, eventlog.Digest{
				Algorithm: map[int]tpm2.TPMAlgID{20: tpm2.TPMAlgSHA1, 32: tpm2.TPMAlgSHA256, 48: tpm2.TPMAlgSHA384, 64: tpm2.TPMAlgSHA512}[size],
				Sum:       make([]byte, size),
			})
		}
		events := append([]eventlog.Event{start}, bootEvents(t, "kernel", "ro")...)
		tpm.extend(events)
		pcrs, err := eventlog.Replay(events)
		if err != nil {
			t.Fatal(err)
		}
		for _, bank := range eventlog.Banks {
			for i := range 17 { // above, registers start with ones
				if got, want := pcrs.Value(bank, uint32(i)), tpm.read(bank, i); !bytes.Equal(got, want) {
					t.Errorf("locality %d, %s: PCR %d: replayed %x, the TPM says %x", locality, eventlog.AlgorithmName(bank), i, got, want)
				}
			}
		}
	}
}

// tpm2-tools take what WriteDir writes, by the very commands of its README, and find the faults
// they are there to find.
func TestToolsTakeOurFiles(t *testing.T) {
	root := openRoot(t)
	ca, nonce := newTestCA(t), []byte{0xca, 0xfe, 1, 2}
	tpm := newEmulator(t, root, 0)
	e := tpm.evidence(ca, bootEvents(t, "kernel", "quiet ro"), nonce)
	e.GuestLog = e.EventLog // for its file
	dir := filepath.Join(t.TempDir(), "evidence")
	if err := e.WriteDir(dir); err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile(filepath.Join(dir, FileReadme))
	if err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, error) {
		cmd := root.Command(t.Context(), args[0], args[1:]...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	outputs := map[string]string{}
	for line := range strings.Lines(string(readme)) {
		args := strings.Fields(line)
		if !strings.HasPrefix(line, "    tpm2_") {
			continue
		}
		out, err := run(args...)
		if err != nil {
			t.Errorf("%s: %v\n%s", strings.TrimSpace(line), err, out)
		}
		outputs[args[0]] += out
	}
	pcr8 := hex.EncodeToString(e.PCRs[8])
	if len(outputs) != 2 || !strings.Contains(strings.ToLower(outputs["tpm2_checkquote"]), pcr8) || strings.Count(strings.ToLower(outputs["tpm2_eventlog"]), pcr8) != 2 {
		t.Errorf("the tools' output lacks PCR 8, %s: %v", pcr8, outputs)
	}
	check := []string{"tpm2_checkquote", "-u", FileAK, "-m", FileQuote, "-s", FileSignature, "-f", FilePCRs, "-g", "sha256", "-q"}
	if out, err := run(append(check, "deadbeef")...); err == nil {
		t.Errorf("another nonce was taken:\n%s", out)
	}
	e.PCRs[8] = make(Hex, 32)
	if err := e.WriteDir(dir); err != nil {
		t.Fatal(err)
	}
	if out, err := run(append(check, "cafe0102")...); err == nil {
		t.Errorf("another register was taken:\n%s", out)
	}
	if back, err := os.Open(filepath.Join(dir, FileEvidence)); err != nil {
		t.Error(err)
	} else {
		defer back.Close()
		if _, err := DecodeEvidence(back); err != nil {
			t.Error(err)
		}
	}
	e.PCRs = nil
	if err := e.WriteDir(dir); err == nil {
		t.Error("evidence without registers was written")
	}
}
