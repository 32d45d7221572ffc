package engine

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/vtpm/journal"
)

// theirs is the engine's process as a program sees it that only passes by.
type theirs struct{}

func (theirs) PID() int     { return 0 }
func (theirs) Terminate()   {}
func (theirs) Kill()        {}
func (theirs) Wait() error  { select {} }
func (theirs) Exit() string { return "" }

// answered is how many commands of the guest's were: one that was not even noted is its sender's to ask for again.
func answered(j *journal.Journal) uint32 {
	if n := j.Guest.Seq(); n > 0 && j.Guest.State() != journal.Answered {
		return n - 1
	}
	return j.Guest.Seq()
}

// passerby adopts an engine, says so, and has it execute commands of the guest's and of the host's in turn until it is
// killed: command n of the guest's extends the register by n's digest.
func passerby() {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
	}
	_, err := os.NewFile(6, "begun").Write([]byte{1})
	fail(err)
	j, _, err := journal.OpenFile(os.NewFile(5, "journal"))
	fail(err)
	e, err := Adopt(context.Background(), Config{Dir: "the test's", Journal: j}, os.NewFile(3, "control"), os.NewFile(4, "data"),
		func(io.Writer) (programs.Running, error) { return theirs{}, nil })
	fail(err)
	for n := answered(j) + 1; ; n++ {
		_, err := e.ExecuteGuest(context.Background(), n, 0, extendCommand(byte(n)))
		fail(err)
		_, err = tpm2.GetRandom{BytesRequested: 8}.Execute(tpm{e})
		fail(err)
	}
}

// TestAdoptKilled: of many programs, each killed at some moment of adopting the engine or of using it, each finds an engine
// that goes on, and every command was executed once.
func TestAdoptKilled(t *testing.T) {
	const programs = 200
	l := leave(t)
	memory := l.memory
	for range programs {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "REDOUBT_TEST_FAKE_ENGINE=passerby")
		begun, theirs, err := os.Pipe()
		l.must(err)
		cmd.ExtraFiles = []*os.File{l.control, l.data, memory, theirs}
		var said bytes.Buffer
		cmd.Stderr = &said
		l.must(cmd.Start())
		theirs.Close()
		_, err = begun.Read(make([]byte, 1))
		begun.Close()
		l.must(err)
		<-time.After(rand.N(3 * time.Millisecond)) // any moment
		_ = cmd.Process.Signal(unix.SIGKILL)       // or it has failed
		_ = cmd.Wait()
		if said.Len() > 0 {
			t.Fatalf("after %d commands: %s", l.cfg.Journal.Guest.Seq(), &said)
		}
	}
	e, err := l.adopt()
	l.must(err)
	n := int(answered(l.cfg.Journal))
	t.Logf("%d commands", n)
	if got := readPCR(t, e); !bytes.Equal(got, extended(n)) {
		t.Errorf("PCR %x, extended %d times it is %x", got, n, extended(n))
	}
}
