package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/vtpm/journal"
)

// Kept is what a keeper holds of an engine: copies of this program's ends, which the receiver
// closes, and the process.
type Kept struct {
	Control, Data *os.File
	Process       programs.Running
}

// keep gives the keeper its copies.
func (e *Engine) keep(to func(Kept) error) error {
	control, err := e.ctl.conn.File()
	if err != nil {
		return err
	}
	data, err := e.data.File()
	if err != nil {
		control.Close()
		return err
	}
	return to(Kept{Control: control, Data: data, Process: e.proc.Running})
}

// Adopt goes on with an engine whose program was killed; run gives the process, whose output goes
// to the writer. What was under way is settled first: a command that was sent has its response in the
// journal, one that was not is sent now. It takes all of kept over. ctx bounds the settling.
func Adopt(ctx context.Context, cfg Config, control, data *os.File, run func(io.Writer) (programs.Running, error)) (*Engine, error) {
	e, err := adopt(ctx, cfg, control, data, run)
	if err != nil {
		return nil, fmt.Errorf("vTPM engine on %s: adopt: %w", cfg.Dir, err)
	}
	return e, nil
}

func adopt(ctx context.Context, cfg Config, control, data *os.File, run func(io.Writer) (programs.Running, error)) (*Engine, error) {
	p := &process{done: make(chan struct{})}
	var err error
	if p.Running, err = run(&p.log); err != nil {
		control.Close()
		data.Close()
		return nil, err
	}
	go func() { // ends with the program
		defer close(p.done)
		_ = p.Wait() // Exit tells
	}()
	ctl, err := ipc.Socket(control)
	dat, derr := ipc.Socket(data)
	if err = errors.Join(err, derr); err == nil {
		e := over(cfg, p, ctl, dat)
		if err = e.settle(ctx); err == nil {
			go e.work()
			return e, nil
		}
	}
	p.kill()
	for _, c := range []*net.UnixConn{ctl, dat} {
		if c != nil {
			_ = c.Close()
		}
	}
	return nil, err
}

// settle brings both channels to where nothing is under way.
func (e *Engine) settle(ctx context.Context) error {
	cancelled := context.AfterFunc(ctx, func() { e.proc.Kill() })
	defer cancelled()
	err := e.settleControl()
	if err == nil {
		err = e.settleData()
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return e.explain(err)
	}
	return nil
}

// settleControl sets the locality anew if that was under way.
func (e *Engine) settleControl() error {
	if e.note.Locality() != journal.SettingLocality {
		return nil
	}
	limit := time.Now().Add(e.controlLimit)
	if err := e.ctl.settle(limit); err != nil {
		return err
	}
	if _, err := e.ctl.do(limit, ctlSetLocality, []byte{0}, 0); err != nil {
		return err
	}
	e.note.SetLocality(0)
	return nil
}

// settleData finds out what became of the command that was under way. The engine takes whatever it
// reads at once for one command, so nothing is sent while it has something unread. Then a probe is
// sent, a command whose response nothing else has: what comes before that response is the
// answer to the command, and if nothing does it was never sent. This may be cut short, too: a response is in the journal before
// it is taken from the socket, and is taken by one call.
func (e *Engine) settleData() error {
	if err := e.data.SetDeadline(time.Now().Add(e.commandLimit)); err != nil {
		return err
	}
	s := e.note.Guest
	if e.note.Host.State() != journal.Idle && e.note.Host.State() != journal.Answered {
		s = e.note.Host
	}
	if s.State() == journal.Split {
		return errors.New("a response was split by the engine and by the end of who read it")
	}
	found := false
	take := func() (probe uint32, err error) {
		b, err := peek(e.data, MaxMessage)
		if err != nil {
			return 0, fmt.Errorf("response: %w", noEOF(err))
		}
		rsp, err := readResponse(bytes.NewReader(b))
		if err != nil {
			return 0, err
		}
		last := e.note.Probes()
		for n := last; n > 0 && n+16 > last; n-- { // those of earlier settlings that were cut short
			if bytes.Equal(rsp, e.probeResponse(n)) {
				return n, e.discard(len(rsp))
			}
		}
		switch {
		case ResponseCode(rsp) == tpm2.TPMRCFailure: // it answers nothing else any more, the probe neither
			return 0, errors.New("the TPM is in failure mode")
		case found:
			return 0, fmt.Errorf("a response (code %#x) to nothing that was sent", uint32(ResponseCode(rsp)))
		}
		found = true
		if s.State() == journal.Executing {
			s.Answer(rsp)
		} // else the journal has it
		return 0, e.discard(len(rsp))
	}
	for {
		unread, err := e.unread()
		if err != nil {
			return err
		}
		if !unread {
			break
		}
		if _, err := take(); err != nil {
			return err
		}
	}
	n := e.note.NextProbe()
	if _, err := e.data.Write(e.probe(n)); err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	for {
		got, err := take()
		if err != nil {
			return fmt.Errorf("probe: %w", err)
		}
		if got == n {
			break
		}
	}
	if s.State() != journal.Executing {
		return nil
	}
	_, err := e.run(s, s.Seq(), s.Locality(), s.Command())
	return err
}

// unread reports whether the engine has not yet read all that was sent.
func (e *Engine) unread() (bool, error) { return unread(e.data) }

func unread(c *net.UnixConn) (bool, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return false, err
	}
	n := 0
	if cerr := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); cerr != nil {
		return false, cerr
	}
	return n > 0, err
}

// probeText is what probe n hashes.
func (e *Engine) probeText(n uint32) []byte {
	return binary.BigEndian.AppendUint32(e.note.Nonce(), n)
}

// probe is a command that changes nothing: TPM2_Hash (Part 3 §15.4) of a number nobody else has.
func (e *Engine) probe(n uint32) []byte {
	text := e.probeText(n)
	b := binary.BigEndian.AppendUint16(nil, uint16(len(text)))
	b = append(b, text...)
	b = binary.BigEndian.AppendUint16(b, uint16(tpm2.TPMAlgSHA256))
	b = binary.BigEndian.AppendUint32(b, uint32(tpm2.TPMRHNull))
	h := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTNoSessions))
	h = binary.BigEndian.AppendUint32(h, uint32(headerSize+len(b)))
	return append(binary.BigEndian.AppendUint32(h, uint32(tpm2.TPMCCHash)), b...)
}

// probeResponse is the engine's: the digest, and an empty ticket, for such a hash has none.
func (e *Engine) probeResponse(n uint32) []byte {
	sum := sha256.Sum256(e.probeText(n))
	b := binary.BigEndian.AppendUint16(nil, uint16(len(sum)))
	b = append(b, sum[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(tpm2.TPMSTHashCheck))
	b = binary.BigEndian.AppendUint32(b, uint32(tpm2.TPMRHNull))
	b = binary.BigEndian.AppendUint16(b, 0)
	h := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTNoSessions))
	h = binary.BigEndian.AppendUint32(h, uint32(headerSize+len(b)))
	return append(binary.BigEndian.AppendUint32(h, uint32(tpm2.TPMRCSuccess)), b...)
}

// receive reads the response to a command. It is looked at in the socket, and in the journal
// before it is taken from there: whoever goes on from here has it.
func (e *Engine) receive(s journal.Slot) ([]byte, error) {
	b, err := peek(e.data, MaxMessage)
	if err != nil {
		return nil, fmt.Errorf("response: %w", noEOF(err))
	}
	if rsp, err := readResponse(bytes.NewReader(b)); err == nil && len(rsp) == len(b) {
		s.Answer(rsp)
		return rsp, e.discard(len(rsp))
	}
	// Not whole, or malformed: an engine writes a response at once, so this is no engine in
	// order, but what it says is still taken.
	s.Splits()
	rsp, err := readResponse(e.data)
	if err == nil {
		s.Answer(rsp)
	}
	return rsp, err
}

// discard takes n bytes that are there, by one call: whoever is killed over it leaves them all, or none.
func (e *Engine) discard(n int) error {
	got, err := e.data.Read(make([]byte, n))
	if err == nil && got < n {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("response of %d bytes ends at offset %d: %w", n, got, noEOF(err))
	}
	return nil
}

// peek waits for bytes and leaves them where they are; io.EOF at the end.
func peek(c *net.UnixConn, limit int) ([]byte, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	b, n := make([]byte, limit), 0
	rerr := raw.Read(func(fd uintptr) bool {
		n, err = eintr.Value(func() (int, error) {
			n, _, err := unix.Recvfrom(int(fd), b, unix.MSG_PEEK|unix.MSG_DONTWAIT)
			return n, err
		})
		return !errors.Is(err, unix.EAGAIN)
	})
	switch {
	case rerr != nil:
		return nil, rerr
	case err != nil:
		return nil, err
	case n == 0:
		return nil, io.EOF
	}
	return b[:n], nil
}
