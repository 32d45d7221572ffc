package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/vtpm/channel"
)

// A Transport carries out TPM commands. vtpm/frontend.Frontend is one. Execute may take as long
// as the TPM is not ready; its error is final.
type Transport interface {
	Execute(locality uint8, command []byte) ([]byte, error)
}

// A TPM stands between QEMU and the guest's TPM. QEMU takes it for a TPM emulator.
//
// Everything about the device's life (INIT, STOP, localities, sizes) is answered from here and
// at once: QEMU asks for it inside its start, long before the guest's TPM exists, and would not
// start the guest before the answer. Only commands of the guest reach the Transport, one at a
// time, and never at locality 4.
//
// It owns two goroutines; both end with Close, the second once its Execute returns: whoever
// closes must end the Transport too.
type TPM struct {
	ctrl      *net.UnixConn
	transport Transport
	before    func() error // before the first reply reaches the guest
	onFirst   func()       // when the guest's first command arrives

	locality atomic.Uint32
	running  atomic.Bool // between INIT and STOP

	done chan struct{}

	mu   sync.Mutex
	data *net.UnixConn // nil until SET_DATAFD
	err  error         // the first
	wg   sync.WaitGroup
}

// errStop ends the control loop in order: QEMU closed its end.
var errStop = errors.New("closed")

// newTPM serves QEMU on ctrl, one end of a stream socketpair, which it takes over.
func newTPM(ctrl *os.File, transport Transport, before func() error, onFirst func()) (*TPM, error) {
	c, err := ipc.Socket(ctrl)
	if err != nil {
		return nil, err
	}
	t := &TPM{ctrl: c, transport: transport, before: before, onFirst: onFirst, done: make(chan struct{})}
	t.wg.Add(1)
	go t.serveControl()
	go func() { // ends with the two loops
		t.wg.Wait()
		close(t.done)
	}()
	return t, nil
}

// Done is closed when the TPM serves no more; Err then says why.
func (t *TPM) Done() <-chan struct{} { return t.done }

// Err is the first failure: of the Transport, or of QEMU to keep the protocol. An orderly end
// is nil.
func (t *TPM) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// fail keeps the first error and closes both sockets, so that both loops end and QEMU's guest
// sees a TPM that does not answer.
func (t *TPM) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil && !errors.Is(err, errStop) {
		t.err = err
	}
	_ = t.ctrl.Close()
	if t.data != nil {
		_ = t.data.Close()
	}
}

// Close ends both sockets. It does not wait for an Execute that runs; Done does.
func (t *TPM) Close() error {
	t.fail(errStop)
	return nil
}

func (t *TPM) serveControl() {
	defer t.wg.Done()
	// A descriptor arrives with SET_DATAFD; it belongs to the request that starts in the same
	// read, and QEMU writes one request at a time.
	var pending *os.File
	defer func() {
		if pending != nil {
			_ = pending.Close()
		}
	}()
	var buf []byte
	chunk := make([]byte, 64)
	oob := make([]byte, unix.CmsgSpace(4*4))
	for {
		n, oobn, flags, _, err := t.ctrl.ReadMsgUnix(chunk, oob)
		files := descriptors(oob[:oobn])
		switch {
		case len(files) > 1 || flags&unix.MSG_CTRUNC != 0 || (len(files) == 1 && pending != nil):
			for _, f := range files {
				_ = f.Close()
			}
			t.fail(fmt.Errorf("%w: too many descriptors", errControl))
			return
		case len(files) == 1:
			pending = files[0]
		}
		if n == 0 || err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || err == nil {
				err = errStop
			}
			t.fail(err)
			return
		}
		buf = append(buf, chunk[:n]...)
		for {
			req, rest, ok, err := parseControl(buf)
			if err != nil {
				t.fail(err)
				return
			}
			if !ok {
				break
			}
			answer, err := t.control(req, &pending)
			if err == nil {
				_, err = t.ctrl.Write(answer)
			}
			if err != nil {
				t.fail(fmt.Errorf("tpm control command %#x: %w", uint32(req.command), err))
				return
			}
			buf = rest
		}
	}
}

func descriptors(oob []byte) []*os.File {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var files []*os.File
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "tpm-data"))
		}
	}
	return files
}

// control carries out one request.
func (t *TPM) control(req controlRequest, fd **os.File) ([]byte, error) {
	switch req.command {
	case cmdGetCapability:
		return u32s(0, controlCapabilities), nil
	case cmdInit:
		// The engine's own INIT is the manager's; here it only lets commands through. Flag bit 0
		// (delete volatile state) belongs to migration.
		t.running.Store(true)
		return u32s(tpmResultSuccess), nil
	case cmdStop:
		t.running.Store(false)
		return u32s(tpmResultSuccess), nil
	case cmdShutdown, cmdCancel, cmdResetEstablished:
		// The established bit is never set (no dynamic launch), so resetting it is done; a
		// command once sent is not cancelled: the guest must take its answer.
		return u32s(tpmResultSuccess), nil
	case cmdGetEstablished:
		return u32s(tpmResultSuccess, 0), nil
	case cmdSetLocality:
		if req.body[0] > maxGuestLocality {
			return u32s(tpmResultBadLocality), nil
		}
		t.locality.Store(uint32(req.body[0]))
		return u32s(tpmResultSuccess), nil
	case cmdSetBufferSize:
		size := binary.BigEndian.Uint32(req.body)
		if size == 0 || size > channel.MaxCommand {
			size = channel.MaxCommand
		}
		if t.running.Load() && size != channel.MaxCommand {
			return u32s(tpmResultFail, 0, 0, 0), nil
		}
		// A smaller wish is answered with the one size there is: QEMU takes what it is told.
		return u32s(tpmResultSuccess, channel.MaxCommand, bufferMin, channel.MaxCommand), nil
	case cmdGetStateBlob:
		return u32s(tpmResultBadOrdinal, 0, 0, 0), nil
	case cmdStoreVolatile:
		return u32s(tpmResultBadOrdinal), nil
	case cmdSetDataFD:
		return t.setData(fd)
	}
	return nil, errControl
}

func (t *TPM) setData(fd **os.File) ([]byte, error) {
	f := *fd
	*fd = nil
	if f == nil {
		return u32s(tpmResultFail), nil
	}
	c, err := ipc.Socket(f)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	second := t.data != nil
	if !second {
		t.data = c
	}
	t.mu.Unlock()
	if second {
		return nil, errors.Join(fmt.Errorf("%w: a second data descriptor", errControl), c.Close())
	}
	t.wg.Add(1)
	go t.serveData(c)
	return u32s(tpmResultSuccess), nil
}

// serveData forwards commands. QEMU writes each in one piece, at most the buffer size, and
// waits for the response; a Unix stream socket keeps a piece that small together.
func (t *TPM) serveData(c *net.UnixConn) {
	defer t.wg.Done()
	buf := make([]byte, channel.MaxCommand+1)
	first := true
	for {
		n, err := c.Read(buf)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				err = errStop
			}
			t.fail(err)
			return
		}
		var response []byte
		switch {
		case !t.running.Load():
			// QEMU probes for the TPM's version before INIT, inside its own start: any valid
			// TPM 2.0 response tells it, and this one is what a TPM gives there.
			response = tpmError(rcFailure)
		case !checkCommand(buf[:n]) || n > channel.MaxCommand:
			response = tpmError(rcCommandSize)
		default:
			if first && t.onFirst != nil {
				t.onFirst()
			}
			response, err = t.transport.Execute(uint8(t.locality.Load()), buf[:n])
			if err == nil && (len(response) < tpmHeader || len(response) > channel.MaxCommand) {
				err = fmt.Errorf("TPM response of %d bytes", len(response))
			}
			if err == nil && first && t.before != nil {
				err = t.before()
			}
			first = false
			if err != nil {
				t.fail(err)
				return
			}
		}
		if _, err := c.Write(response); err != nil {
			if errors.Is(err, unix.EPIPE) || errors.Is(err, net.ErrClosed) {
				err = errStop
			}
			t.fail(err)
			return
		}
	}
}
