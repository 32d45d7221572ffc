package kept

import (
	"context"
	"log/slog"
	"os"
	"testing"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/store/tree"
)

type emulator struct{ domain tree.Domain }

func (e emulator) Domain() tree.Domain { return e.domain }
func (e emulator) Memory() *os.File    { return nil }
func (e emulator) Fail(string)         {}
func (e emulator) Ended() bool         { return false }
func (e emulator) Call(context.Context, string, any, any, ...*os.File) ([]*os.File, error) {
	return nil, rpc.ErrGone
}

// TestAgainRefused: an emulator gets no other connection of a disk once its guest runs, nor if it is another's.
func TestAgainRefused(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	memory, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	s := &Storage{Keeper: keeper.New(keeper.Options{Log: log}), o: Options{Disks: make([]*os.File, 1)}, memory: memory, domain: 7, run: emulator{7}}
	refused := func(of tree.Domain) {
		t.Helper()
		if f, err := s.Again(t.Context(), of, 0); rpc.KindOf(err) != rpc.Refused || f != nil {
			t.Errorf("%v, %v", f, err)
		}
	}
	refused(7) // it runs
	s.run = nil
	refused(8) // another one is being started
	s.memory = nil
	refused(7)
}

// TestWritten: what is written counts over BlkBacks, whose own counts begin anew.
func TestWritten(t *testing.T) {
	var sum uint64
	s := &Storage{o: Options{Disks: make([]*os.File, 2), Wrote: func(n uint64) { sum = n }}}
	for _, c := range []struct {
		disk        int
		bytes, want uint64
	}{{0, 10, 10}, {0, 25, 25}, {1, 5, 30}, {0, 3, 33}, {0, 4, 34}, {7, 100, 34}, {-1, 100, 34}} {
		s.wrote(protocol.Written{Index: c.disk, Bytes: c.bytes})
		if sum != c.want {
			t.Errorf("%+v: %d", c, sum)
		}
	}
}
