package state

import (
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"

	"redoubt.dev/redoubt/store/logic"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// table is a core with named sessions that writes down what each of them is told.
type table struct {
	*core
	names    map[*session]string
	sessions map[string]*session
	out      strings.Builder
}

func newTable() *table {
	rule := tree.Reserved{Match: func(p string) bool { return strings.HasPrefix(p, "/vTPMready") }, Only: 1}
	t := &table{names: map[*session]string{}, sessions: map[string]*session{}}
	t.core = newCore(slog.New(slog.NewTextHandler(io.Discard, nil)), tree.New(rule), nil)
	t.emit = func(s *session, m wire.Message) {
		fmt.Fprintf(&t.out, "  %s: %v %s\n", t.names[s], m.Type, strings.TrimSuffix(strings.ReplaceAll(string(m.Payload), "\x00", "|"), "|"))
	}
	t.hangUp = func(s *session) { fmt.Fprintf(&t.out, "  %s: cut off\n", t.names[s]) }
	return t
}

func (t *table) join(name string, d tree.Domain) {
	s := t.open(d)
	t.names[s], t.sessions[name] = name, s
}

func (t *table) ask(s *session, tx uint32, ty wire.Type, payload []byte) {
	a := logic.Decide(logic.Request{Domain: s.domain, Type: ty, Payload: payload})
	t.handle(s, wire.Message{Type: ty, Tx: tx}, a)
}

// line performs one line of a transcript: "name joins domain", "name leaves",
// "name[/transaction] TYPE argument|argument|", or what the store is told by whoever runs it:
// "set node…", "introduce domain node…", "release domain path…", with path[=value][,perm]… for a
// node.
func (t *table) line(l string) error {
	who, rest, _ := strings.Cut(l, " ")
	switch who {
	case "set", "introduce", "release":
		if err := t.told(who, strings.Fields(rest)); err != nil {
			fmt.Fprintf(&t.out, "  %v\n", err)
		}
		return t.tree.Verify()
	}
	if d, ok := strings.CutPrefix(rest, "joins "); ok {
		n, err := strconv.Atoi(d)
		t.join(who, tree.Domain(n))
		return err
	}
	who, txs, _ := strings.Cut(who, "/")
	s := t.sessions[who]
	if s == nil {
		return fmt.Errorf("nobody is %q", who)
	}
	if rest == "leaves" {
		t.close(s)
		return nil
	}
	tx, _ := strconv.Atoi(txs)
	op, args, _ := strings.Cut(rest, " ")
	for ty := range wire.Type(24) {
		if ty.String() == op {
			t.ask(s, uint32(tx), ty, []byte(strings.ReplaceAll(args, "|", "\x00")))
			return t.tree.Verify()
		}
	}
	return fmt.Errorf("no type %q", op)
}

func (t *table) told(what string, args []string) error {
	if what == "set" {
		return t.set(nodes(args))
	}
	d, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	if what == "introduce" {
		return t.introduce(tree.Domain(d), nodes(args[1:]))
	}
	return t.release(tree.Domain(d), args[1:])
}

func nodes(args []string) (all []Node) {
	for _, a := range args {
		w := strings.Split(a, ",")
		var n Node
		n.Path, n.Value, _ = strings.Cut(w[0], "=")
		for _, p := range w[1:] {
			perm, err := tree.ParsePerm(p)
			if err != nil {
				panic(err)
			}
			n.Perms = append(n.Perms, perm)
		}
		all = append(all, n)
	}
	return all
}

// TestTranscripts: what clients of several domains ask and are told.
func TestTranscripts(t *testing.T) {
	datadriven.Walk(t, "testdata/transcripts", func(t *testing.T, path string) {
		var tab *table
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd == "new" {
				tab = newTable()
			}
			tab.out.Reset()
			for _, l := range strings.Split(d.Input, "\n") {
				if l == "" {
					continue
				}
				fmt.Fprintln(&tab.out, l)
				if err := tab.line(l); err != nil {
					t.Fatalf("%s: %s: %v", d.Pos, l, err)
				}
			}
			return tab.out.String()
		})
	})
}

// FuzzClients: whatever three clients send in whatever order, what the store counts stays true,
// a reserved name stays its domain's, and the end of all clients leaves nothing but contents.
func FuzzClients(f *testing.F) {
	f.Add([]byte("\x00\x0b\x00/a|v\n\x01\x06\x00|\n\x01\x0b\x01/local/domain/16/x|1\n\x01\x07\x01T|"))
	f.Add([]byte("\x02\x0b\x00/vTPMready1|1\n\x00\x0d\x00/vTPMready1|\n\x01\x04\x00/|t|"))
	f.Add([]byte("\x00\x13\x0016|17|\n\x00\x08\x0017|1|1|\n\x01\x0e\x00/a|b16|\n\x00\x09\x0017|"))
	f.Fuzz(func(t *testing.T, script []byte) {
		tab := newTable()
		tab.join("builder", 0)
		tab.join("guest", 16)
		tab.join("vtpm", 1)
		who := []*session{tab.sessions["builder"], tab.sessions["guest"], tab.sessions["vtpm"]}
		tab.ask(who[0], 0, wire.Mkdir, wire.Join("/local/domain/16"))
		tab.ask(who[0], 0, wire.SetPerms, wire.Join("/local/domain/16", "n16"))
		for l := range strings.SplitSeq(string(script), "\n") {
			if len(l) < 3 || len(l) > 3+wire.MaxPayload {
				continue
			}
			before, _ := tab.tree.Direct(0).Read("/vTPMready1")
			s := who[int(l[0])%len(who)]
			tab.ask(s, uint32(l[2]%4), wire.Type(l[1]%24), []byte(strings.ReplaceAll(l[3:], "|", "\x00")))
			if after, _ := tab.tree.Direct(0).Read("/vTPMready1"); s.domain != 1 && string(before) != string(after) {
				t.Fatalf("domain %d changed the ready node", s.domain)
			}
			if err := tab.tree.Verify(); err != nil {
				t.Fatal(err)
			}
			if n := tab.tree.Owned(16); n > tree.MaxNodes {
				t.Fatalf("the guest has %d nodes", n)
			}
		}
		for _, s := range who {
			tab.close(s)
		}
		if len(tab.watches) > 0 || len(tab.domains) > 0 || len(tab.core.sessions) > 0 {
			t.Fatalf("left: %v %v %v", tab.watches, tab.domains, tab.core.sessions)
		}
	})
}

// TestAge: a transaction that stays open while the store moves on for long ends in EAGAIN; until
// then it works.
func TestAge(t *testing.T) {
	tab := newTable()
	tab.join("b", 0)
	b := tab.sessions["b"]
	tab.ask(b, 0, wire.TransactionStart, wire.Join(""))
	tab.ask(b, 1, wire.Write, []byte("/mine\x00v"))
	for i := range 2 * maxAge {
		tab.ask(b, 0, wire.Write, []byte("/other\x00"+strconv.Itoa(i)))
	}
	tab.out.Reset()
	tab.ask(b, 1, wire.Read, wire.Join("/mine"))
	tab.ask(b, 1, wire.TransactionEnd, wire.Join("T"))
	if got := tab.out.String(); got != "  b: READ v\n  b: ERROR EAGAIN\n" {
		t.Fatal(got)
	}
}
