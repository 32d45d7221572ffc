package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/vtpm/journal"
)

// kept is a process of which several programs may wait for the end; none of them ends it.
type kept struct {
	programs.Running
	gone chan struct{}
	err  error
}

func (k *kept) Wait() error {
	<-k.gone
	return k.err
}

type keptStarter struct{ started *kept }

func (s *keptStarter) Start(ctx context.Context, p programs.Program) (programs.Running, error) {
	r, err := programs.Direct{}.Start(ctx, p)
	if err != nil {
		return nil, err
	}
	s.started = &kept{Running: r, gone: make(chan struct{})}
	go func() {
		s.started.err = r.Wait()
		close(s.started.gone)
	}()
	return s.started, nil
}

// A left is an engine whose program is no more: its process, its channels and its journal.
type left struct {
	t       *testing.T
	cfg     Config
	control *os.File
	data    *os.File
	memory  *os.File // the journal's
	process *kept
	last    *Engine // only its channels are used
}

func leave(t *testing.T) *left {
	t.Helper()
	tools(t)
	memory, err := journal.Create()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { memory.Close() })
	j, fresh, err := journal.OpenFile(memory)
	if err != nil || !fresh {
		t.Fatal(err, fresh)
	}
	j.Begin(1, bytes.Repeat([]byte{7}, 32))
	starter := &keptStarter{}
	l := &left{t: t, memory: memory}
	l.cfg = Config{
		Dir: t.TempDir(), Key: testKey(1), Starter: starter, Journal: j,
		Keep: func(k Kept) error {
			l.control, l.data = k.Control, k.Data
			return nil
		},
	}
	l.last = run(t, l.cfg)
	l.process = starter.started
	startup(t, l.last)
	return l
}

func (l *left) adopt() (*Engine, error) {
	l.t.Helper()
	e, err := Adopt(l.t.Context(), l.cfg, l.control, l.data, func(io.Writer) (programs.Running, error) { return l.process, nil })
	if err == nil {
		l.t.Cleanup(e.Kill)
	}
	return e, err
}

const testPCR = 16

// extendCommand is TPM2_PCR_Extend of a register that begins with zeros, by a digest of b's.
func extendCommand(b byte) []byte {
	p := binary.BigEndian.AppendUint32(nil, testPCR)
	p = binary.BigEndian.AppendUint32(p, 9) // password session of no password
	p = binary.BigEndian.AppendUint32(p, uint32(tpm2.TPMRSPW))
	p = append(p, 0, 0, 0, 0, 0)
	p = binary.BigEndian.AppendUint32(p, 1)
	p = binary.BigEndian.AppendUint16(p, uint16(tpm2.TPMAlgSHA256))
	p = append(p, bytes.Repeat([]byte{b}, 32)...)
	h := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTSessions))
	h = binary.BigEndian.AppendUint32(h, uint32(headerSize+len(p)))
	return append(binary.BigEndian.AppendUint32(h, uint32(tpm2.TPMCCPCRExtend)), p...)
}

// extended is the register's value after n such commands.
func extended(n int) []byte {
	v := make([]byte, 32)
	for i := range n {
		sum := sha256.Sum256(append(v, bytes.Repeat([]byte{byte(i + 1)}, 32)...))
		v = sum[:]
	}
	return v
}

func readPCR(t *testing.T, e *Engine) []byte {
	t.Helper()
	rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(testPCR)},
	}}}.Execute(tpm{e})
	if err != nil || len(rsp.PCRValues.Digests) != 1 {
		t.Fatalf("%v", err)
	}
	return rsp.PCRValues.Digests[0].Buffer
}

// read waits until the engine has read what was sent.
func (l *left) read() {
	for {
		if unread, err := l.last.unread(); err != nil {
			l.t.Fatal(err)
		} else if !unread {
			return
		}
		time.Sleep(time.Millisecond) // the kernel has no event for it
	}
}

func (l *left) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// TestAdopt: a program that is killed between any two steps of a command leaves an engine that goes on:
// the command is executed once, and its response is had.
func TestAdopt(t *testing.T) {
	const seq = 7
	cmd := extendCommand(1)
	// Each step is what a program does after the ones before it.
	steps := []struct {
		name string
		do   func(l *left, s journal.Slot)
	}{
		{"nothing", func(*left, journal.Slot) {}},
		{"noted", func(_ *left, s journal.Slot) { s.Execute(seq, 0, cmd) }},
		{"sent", func(l *left, _ journal.Slot) {
			_, err := l.last.data.Write(cmd)
			l.must(err)
		}},
		{"read by the engine", func(l *left, _ journal.Slot) { l.read() }},
		{"answered", func(l *left, s journal.Slot) {
			b, err := peek(l.last.data, MaxMessage)
			l.must(err)
			s.Answer(b)
		}},
		{"taken", func(l *left, _ journal.Slot) {
			_, err := readResponse(l.last.data)
			l.must(err)
		}},
	}
	for n := range steps {
		for probes := range 3 { // of settlings that were cut short
			t.Run(fmt.Sprintf("%s after %d probes", steps[n].name, probes), func(t *testing.T) {
				l := leave(t)
				j := l.cfg.Journal
				for _, s := range steps[:n+1] {
					s.do(l, j.Guest)
				}
				for range probes {
					l.read()
					_, err := l.last.data.Write(l.last.probe(j.NextProbe()))
					l.must(err)
				}
				e, err := l.adopt()
				l.must(err)
				rsp, err := e.ExecuteGuest(t.Context(), seq, 0, cmd) // its sender's again
				l.must(err)
				if rc := ResponseCode(rsp); rc != tpm2.TPMRCSuccess {
					t.Errorf("response code %#x", uint32(rc))
				}
				rsp, err = e.ExecuteGuest(t.Context(), seq+1, 0, extendCommand(2))
				l.must(err)
				if rc := ResponseCode(rsp); rc != tpm2.TPMRCSuccess {
					t.Errorf("the next one: response code %#x", uint32(rc))
				}
				if got := readPCR(t, e); !bytes.Equal(got, extended(2)) {
					t.Errorf("PCR %x, extended twice it is %x", got, extended(2))
				}
			})
		}
	}
}

// TestAdoptHost: as TestAdopt, for a command of the host's, of which nobody asks again.
func TestAdoptHost(t *testing.T) {
	l := leave(t)
	j := l.cfg.Journal
	j.Host.Execute(j.Host.Seq()+1, 0, extendCommand(1))
	_, err := l.last.data.Write(extendCommand(1))
	l.must(err)
	e, err := l.adopt()
	l.must(err)
	if j.Host.State() != journal.Answered || ResponseCode(j.Host.Response()) != tpm2.TPMRCSuccess {
		t.Errorf("state %v, response %x", j.Host.State(), j.Host.Response())
	}
	if got := readPCR(t, e); !bytes.Equal(got, extended(1)) {
		t.Errorf("PCR %x, extended once it is %x", got, extended(1))
	}
}

// TestAdoptLocality: the same while the engine is told the locality of a command.
func TestAdoptLocality(t *testing.T) {
	const seq, locality = 3, 2
	cmd := extendCommand(1)
	for name, do := range map[string]func(l *left){
		"not sent": func(*left) {},
		"sent": func(l *left) {
			_, err := l.last.ctl.conn.Write([]byte{0, 0, 0, byte(ctlSetLocality), locality})
			l.must(err)
		},
		"done": func(l *left) {
			_, err := l.last.ctl.do(time.Now().Add(controlLimit), ctlSetLocality, []byte{locality}, 0)
			l.must(err)
		},
		"read by the engine": func(l *left) {
			_, err := l.last.ctl.conn.Write([]byte{0, 0, 0, byte(ctlSetLocality), locality})
			l.must(err)
			_, err = peek(l.last.ctl.conn, 4)
			l.must(err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := leave(t)
			l.cfg.Journal.Guest.Execute(seq, locality, cmd)
			l.cfg.Journal.SetLocality(journal.SettingLocality)
			do(l)
			e, err := l.adopt()
			l.must(err)
			if _, err := e.ExecuteGuest(t.Context(), seq, locality, cmd); err != nil {
				t.Fatal(err)
			}
			if got := readPCR(t, e); !bytes.Equal(got, extended(1)) {
				t.Errorf("PCR %x, extended once it is %x", got, extended(1))
			}
			for l := range uint8(4) { // the control channel is in step
				if _, err := e.ExecuteGuest(t.Context(), seq+1+uint32(l), l, shortCommand(ccStartup, tpm2.TPMSUClear)); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestAdoptRefuses: what cannot be gone on from ends the engine.
func TestAdoptRefuses(t *testing.T) {
	for name, do := range map[string]func(l *left){
		"a split response": func(l *left) {
			l.cfg.Journal.Guest.Execute(1, 0, extendCommand(1))
			l.cfg.Journal.Guest.Splits()
		},
		"a response to nothing": func(l *left) {
			_, err := l.last.data.Write(extendCommand(1))
			l.must(err)
			l.read()
			_, err = l.last.data.Write(extendCommand(1))
			l.must(err)
		},
		"a dead engine": func(l *left) { l.process.Kill(); <-l.process.gone },
	} {
		t.Run(name, func(t *testing.T) {
			l := leave(t)
			do(l)
			if _, err := l.adopt(); err == nil {
				t.Error("adopted")
			} else {
				t.Log(err)
			}
			<-l.process.gone
		})
	}
}
