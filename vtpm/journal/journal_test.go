package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

// TestNext: what one manager leaves, the next one finds.
func TestNext(t *testing.T) {
	f, err := Create()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	open := func() (*Journal, bool) {
		j, fresh, err := OpenFile(f)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := j.Close(); err != nil {
				t.Error(err)
			}
		})
		return j, fresh
	}
	j, fresh := open()
	if !fresh {
		t.Error("new memory is not fresh")
	}
	j.Begin(5, bytes.Repeat([]byte{1}, nonceSize))
	j.SetAuth([]byte("secret"))
	if !j.SetLog([]byte("log")) || j.SetLog(make([]byte, MaxLog+1)) {
		t.Error("a log is kept, a longer one is not")
	}
	j.Now(Ready | Durable)
	j.SetLocality(2)
	j.Guest.Execute(9, 1, []byte("command"))
	j.Guest.Answer([]byte("response"))
	j.BeginTurn()
	j.Host.Execute(1, 0, []byte("first"))
	j.Host.Answer([]byte("one"))
	if !j.Noted(true, Exchange{[]byte("first"), []byte("one")}) {
		t.Error("no room")
	}
	j.Host.Execute(2, 0, []byte("no matter"))
	j.Host.Answer([]byte("two"))
	j.Noted(false, Exchange{})
	j.Host.Execute(3, 0, []byte("third"))
	j.NextProbe()

	k, fresh := open()
	if fresh || k.Instance() != 5 || string(k.Auth()) != "secret" || string(k.Log()) != "log" || k.Locality() != 2 || k.Probes() != 1 {
		t.Error("the facts are others")
	}
	if !k.Is(Ready|Durable) || k.Is(Open) {
		t.Error("the bits are others")
	}
	if g := k.Guest; g.State() != Answered || g.Seq() != 9 || g.Locality() != 1 || string(g.Command()) != "command" || string(g.Response()) != "response" {
		t.Error("the guest's command is another")
	}
	if h := k.Host; h.State() != Executing || h.Seq() != 3 || string(h.Command()) != "third" {
		t.Error("the host's command is another")
	}
	turn := func(want ...string) {
		t.Helper()
		all, err := k.Turn()
		if err != nil || len(all) != len(want) {
			t.Fatalf("%d exchanges, %v", len(all), err)
		}
		for i, w := range want {
			if string(all[i].Command) != w {
				t.Errorf("exchange %d: %q", i, all[i].Command)
			}
		}
	}
	turn("first")
	j.Host.Answer([]byte("three"))
	turn("first", "third") // answered, and the manager was killed before it noted it
	j.setU32(atTurn+4, 2)
	if !j.Noted(true, Exchange{[]byte("third"), []byte("three")}) {
		t.Error("no room")
	}
	j.setU32(atTurn+4, 2) // killed before the last step of that
	turn("first", "third")
	j.BeginTurn()
	turn()
	for range maxTurn / (exchangeHead + 2*MaxMessage) {
		if !j.Noted(true, Exchange{make([]byte, MaxMessage), make([]byte, MaxMessage)}) {
			t.Error("no room")
		}
	}
	if j.Noted(true, Exchange{make([]byte, MaxMessage), make([]byte, MaxMessage)}) {
		t.Error("more than there is room for")
	}
}

// TestRefused: what no manager leaves is refused.
func TestRefused(t *testing.T) {
	for name, do := range map[string]func(j *Journal){
		"magic":           func(j *Journal) { j.mem[0]++ },
		"facts":           func(j *Journal) { j.setU32(atFacts, 1<<20) },
		"instance":        func(j *Journal) { j.setU32(atInstance, 0) },
		"locality":        func(j *Journal) { j.setU32(atLocality, 4) },
		"authorisation":   func(j *Journal) { j.setU32(atAuth, MaxAuth+1) },
		"log":             func(j *Journal) { j.setU32(atLog, MaxLog+1) },
		"sequence":        func(j *Journal) { j.setU32(atTurn, maxTurn+1) },
		"state":           func(j *Journal) { j.Guest.setU32(slotState, 9) },
		"slot's locality": func(j *Journal) { j.Host.setU32(slotLocality, 4) },
		"command":         func(j *Journal) { j.Host.setU32(slotCommand, MaxMessage+1) },
		"response":        func(j *Journal) { j.Guest.setU32(slotResponse, 1<<31) },
		"two at once": func(j *Journal) {
			j.Host.Execute(1, 0, nil)
			j.Guest.Execute(1, 0, nil)
		},
		"exchange": func(j *Journal) {
			j.Noted(true, Exchange{[]byte("c"), []byte("r")})
			binary.LittleEndian.PutUint16(j.mem[atTurn+8+4:], 100)
		},
		"end of the sequence": func(j *Journal) { j.setU32(atTurn, 3) },
	} {
		f, err := Create()
		if err != nil {
			t.Fatal(err)
		}
		j, _, err := OpenFile(f)
		if err != nil {
			t.Fatal(err)
		}
		j.Begin(1, nil)
		do(j)
		if _, _, err := OpenFile(f); !errors.Is(err, ErrJournal) {
			t.Errorf("%s: %v", name, err)
		}
		if err := j.Close(); err != nil {
			t.Error(err)
		}
		f.Close()
	}
}

// FuzzOpen: whatever a manager that was taken over leaves is refused or read within bounds. The
// input is put over a journal in order, at an offset of its own choice.
func FuzzOpen(f *testing.F) {
	f.Add(uint32(0), []byte{1})
	f.Add(uint32(atGuest), []byte{2, 0, 0, 0})
	f.Add(uint32(atTurn), []byte{40, 0, 0, 0})
	file, err := Create()
	if err != nil {
		f.Fatal(err)
	}
	w, _, err := OpenFile(file)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, at uint32, b []byte) {
		w.Begin(1, nil)
		w.Guest.Execute(1, 0, []byte("command"))
		w.Noted(true, Exchange{[]byte("c"), []byte("r")})
		copy(w.mem[at%Size:], b)
		j, fresh, err := OpenFile(file)
		if err != nil {
			if !errors.Is(err, ErrJournal) {
				t.Fatal(err)
			}
			return
		}
		if !fresh {
			_, _ = j.Auth(), j.Log()
			for _, s := range []Slot{j.Guest, j.Host} {
				if len(s.Command()) > MaxMessage || len(s.Response()) > MaxMessage || s.Locality() > 3 {
					t.Fatal("out of bounds")
				}
			}
			if _, err := j.Turn(); err != nil {
				t.Fatalf("opened, and %v", err)
			}
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
