package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// An emulatedQEMU speaks the control protocol as QEMU does.
type emulatedQEMU struct {
	t    *testing.T
	ctrl *os.File
	data *os.File
	tpm  *TPM
}

func newEmulated(t *testing.T, transport Transport, before func() error) *emulatedQEMU {
	t.Helper()
	own, theirs := socketpair(t)
	tpm, err := newTPM(theirs, transport, before, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = tpm.Close()
		<-tpm.Done()
	})
	return &emulatedQEMU{t: t, ctrl: own, tpm: tpm}
}

// ask sends a request and reads n bytes of reply.
func (q *emulatedQEMU) ask(n int, words ...uint32) []byte {
	q.t.Helper()
	if _, err := q.ctrl.Write(u32s(words...)); err != nil {
		q.t.Fatal(err)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(q.ctrl, b); err != nil {
		q.t.Fatal(err)
	}
	return b
}

func (q *emulatedQEMU) setData() {
	q.t.Helper()
	own, theirs := socketpair(q.t)
	q.data = own
	if err := unix.Sendmsg(int(q.ctrl.Fd()), u32s(uint32(cmdSetDataFD)), unix.UnixRights(int(theirs.Fd())), nil, 0); err != nil {
		q.t.Fatal(err)
	}
	theirs.Close()
	b := make([]byte, 4)
	if _, err := io.ReadFull(q.ctrl, b); err != nil || binary.BigEndian.Uint32(b) != 0 {
		q.t.Fatalf("SET_DATAFD: %x, %v", b, err)
	}
}

func (q *emulatedQEMU) command(cmd []byte) []byte {
	q.t.Helper()
	if _, err := q.data.Write(cmd); err != nil {
		q.t.Fatal(err)
	}
	b := make([]byte, 4096)
	n, err := q.data.Read(b)
	if err != nil {
		q.t.Fatalf("no response: %v (%v)", err, q.tpm.Err())
	}
	return b[:n]
}

// getRandom is a well-formed command.
var getRandom = []byte{0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 4}

// The order of a QEMU start: capabilities, data, probe, stop, size, INIT, commands.
func TestTPMStart(t *testing.T) {
	var localities []uint8
	placed := 0
	q := newEmulated(t, transportFunc(func(l uint8, cmd []byte) ([]byte, error) {
		localities = append(localities, l)
		if placed != 0 && len(localities) == 1 {
			t.Error("the log was placed before the first command ran")
		}
		return tpmError(0), nil
	}), func() error { placed++; return nil })
	if b := q.ask(8, uint32(cmdGetCapability)); binary.BigEndian.Uint64(b) != controlCapabilities {
		t.Errorf("capabilities %x", b)
	}
	q.setData()
	if b := q.command(getRandom); !bytes.Equal(b, tpmError(rcFailure)) {
		t.Errorf("probe before INIT: %x", b)
	}
	if b := q.ask(4, uint32(cmdStop)); !bytes.Equal(b, u32s(0)) {
		t.Errorf("STOP: %x", b)
	}
	if b := q.ask(16, uint32(cmdSetBufferSize), 4096); !bytes.Equal(b, u32s(0, 4096, 128, 4096)) {
		t.Errorf("SET_BUFFERSIZE: %x", b)
	}
	if b := q.ask(4, uint32(cmdInit), 0); !bytes.Equal(b, u32s(0)) {
		t.Errorf("INIT: %x", b)
	}
	if b := q.ask(8, uint32(cmdGetEstablished)); !bytes.Equal(b, u32s(0, 0)) {
		t.Errorf("GET_TPMESTABLISHED: %x", b)
	}
	if b := q.command(getRandom); !bytes.Equal(b, tpmError(0)) {
		t.Errorf("command: %x", b)
	}
	q.ask(4, uint32(cmdSetLocality), 2<<24)
	if b := q.ask(4, uint32(cmdSetLocality), 4<<24); binary.BigEndian.Uint32(b) == 0 {
		t.Error("locality 4 was taken")
	}
	q.command(getRandom)
	if !bytes.Equal(localities, []byte{0, 2}) || placed != 1 {
		t.Errorf("localities %v, log placed %d times", localities, placed)
	}
	// The guest's header decides what QEMU sends: it never reaches the TPM when they differ.
	for _, cmd := range [][]byte{{1}, getRandom[:11], append(getRandom[:12:12], 0), make([]byte, 4096)} {
		if b := q.command(cmd); !bytes.Equal(b, tpmError(rcCommandSize)) {
			t.Errorf("command of %d bytes: %x", len(cmd), b)
		}
	}
	for _, c := range []controlCommand{cmdShutdown, cmdCancel} {
		if b := q.ask(4, uint32(c)); !bytes.Equal(b, u32s(0)) {
			t.Errorf("command %#x: %x", uint32(c), b)
		}
	}
	q.ask(4, uint32(cmdResetEstablished), 3<<24)
	if b := q.ask(16, uint32(cmdGetStateBlob), 0, 1, 0); binary.BigEndian.Uint32(b) == 0 {
		t.Errorf("GET_STATEBLOB: %x", b)
	}
	if b := q.ask(4, uint32(cmdStoreVolatile)); binary.BigEndian.Uint32(b) == 0 {
		t.Errorf("STORE_VOLATILE: %x", b)
	}
	if len(localities) != 2 {
		t.Errorf("%d commands reached the TPM", len(localities))
	}
	q.ctrl.Close()
	<-q.tpm.Done()
	if err := q.tpm.Err(); err != nil {
		t.Errorf("an orderly end: %v", err)
	}
}

// INIT is answered while a command waits for its TPM: QEMU's main loop never blocks on us.
func TestTPMControlWhileWaiting(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	q := newEmulated(t, transportFunc(func(uint8, []byte) ([]byte, error) {
		close(arrived)
		<-release
		return tpmError(0), nil
	}), nil)
	q.setData()
	q.ask(4, uint32(cmdInit), 0)
	if _, err := q.data.Write(getRandom); err != nil {
		t.Fatal(err)
	}
	<-arrived
	q.ask(4, uint32(cmdCancel))
	q.ask(4, uint32(cmdInit), 0)
	close(release)
	b := make([]byte, 64)
	if n, err := q.data.Read(b); err != nil || !bytes.Equal(b[:n], tpmError(0)) {
		t.Errorf("%x, %v", b[:n], err)
	}
}

func TestTPMTransportFails(t *testing.T) {
	for name, tr := range map[string]transportFunc{
		"engine gone":   func(uint8, []byte) ([]byte, error) { return nil, errors.New("engine gone") },
		"0 bytes":       func(uint8, []byte) ([]byte, error) { return nil, nil },
		"5000 bytes":    func(uint8, []byte) ([]byte, error) { return make([]byte, 5000), nil },
		"no place left": func(uint8, []byte) ([]byte, error) { return tpmError(0), nil },
	} {
		t.Run(name, func(t *testing.T) {
			q := newEmulated(t, tr, func() error { return errors.New("no place left") })
			q.setData()
			q.ask(4, uint32(cmdInit), 0)
			if _, err := q.data.Write(getRandom); err != nil {
				t.Fatal(err)
			}
			<-q.tpm.Done()
			if err := q.tpm.Err(); err == nil || !strings.Contains(err.Error(), name) {
				t.Error(err)
			}
			if n, err := q.data.Read(make([]byte, 16)); n != 0 || err != io.EOF {
				t.Errorf("the guest got %d bytes, %v", n, err)
			}
		})
	}
}

func TestTPMHostileControl(t *testing.T) {
	for name, words := range map[string][]uint32{
		"zero":          {0},
		"hash start":    {6},
		"set stateblob": {0xd, 0, 1, 0xffff_ffff},
		"beyond":        {0xffff_ffff},
	} {
		t.Run(name, func(t *testing.T) {
			q := newEmulated(t, nil, nil)
			if _, err := q.ctrl.Write(u32s(words...)); err != nil {
				t.Fatal(err)
			}
			<-q.tpm.Done()
			if err := q.tpm.Err(); !errors.Is(err, errControl) {
				t.Error(err)
			}
		})
	}
	t.Run("no descriptor", func(t *testing.T) {
		q := newEmulated(t, nil, nil)
		if b := q.ask(4, uint32(cmdSetDataFD)); binary.BigEndian.Uint32(b) == 0 {
			t.Error("SET_DATAFD without a descriptor was taken")
		}
	})
	t.Run("second descriptor", func(t *testing.T) {
		q := newEmulated(t, nil, nil)
		q.setData()
		if err := unix.Sendmsg(int(q.ctrl.Fd()), u32s(uint32(cmdSetDataFD)), unix.UnixRights(int(q.data.Fd())), nil, 0); err != nil {
			t.Fatal(err)
		}
		<-q.tpm.Done()
		if err := q.tpm.Err(); !errors.Is(err, errControl) {
			t.Error(err)
		}
	})
	t.Run("many descriptors", func(t *testing.T) {
		q := newEmulated(t, nil, nil)
		fd := int(q.ctrl.Fd())
		if err := unix.Sendmsg(fd, u32s(uint32(cmdSetDataFD)), unix.UnixRights(fd, fd, fd, fd, fd, fd, fd, fd), nil, 0); err != nil {
			t.Fatal(err)
		}
		<-q.tpm.Done()
		if err := q.tpm.Err(); !errors.Is(err, errControl) {
			t.Error(err)
		}
	})
	t.Run("no socket", func(t *testing.T) {
		q := newEmulated(t, nil, nil)
		f := tempFile(t, "file", nil)
		defer f.Close()
		if err := unix.Sendmsg(int(q.ctrl.Fd()), u32s(uint32(cmdSetDataFD)), unix.UnixRights(int(f.Fd())), nil, 0); err != nil {
			t.Fatal(err)
		}
		<-q.tpm.Done()
		if q.tpm.Err() == nil {
			t.Error("a file was taken for a socket")
		}
	})
}

func FuzzControl(f *testing.F) {
	f.Add(u32s(1, 2, 0, 5, 0x01000000, 0x11, 4096, 0x10))
	f.Add(u32s(0xc, 1, 2, 3, 3, 4, 9, 0xa, 0xb, 0, 0xe))
	f.Fuzz(func(t *testing.T, data []byte) {
		tpm := &TPM{}
		for rest := data; ; {
			req, next, ok, err := parseControl(rest)
			if err != nil || !ok {
				return
			}
			if len(next)+len(req.body)+controlHeader != len(rest) {
				t.Fatalf("%d bytes became %d and %d", len(rest), len(req.body), len(next))
			}
			var fd *os.File
			b, err := tpm.control(req, &fd)
			if err != nil || len(b) < 4 {
				t.Fatalf("command %#x: %x, %v", uint32(req.command), b, err)
			}
			if tpm.locality.Load() > uint32(maxGuestLocality) {
				t.Fatal("locality 4")
			}
			rest = next
		}
	})
}
