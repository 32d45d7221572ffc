package schedule

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

var eventNames = map[string]EventKind{
	"started": GuestStarted, "gone": GuestGone, "paused": Paused, "resumed": Resumed, "clock": Clock, "exits": Counted, "wrote": Wrote,
	"asked": Asked, "safe": Safe, "not-safe": NotSafe, "taken": SnapshotTaken, "lost": SnapshotLost, "done": ScanDone, "failed": ScanFailed,
	"committed": JournalCommitted, "map-lost": MapLost,
}

// TestTranscripts plays testdata/*.txt: a line an event, the actions below. Renew with -rewrite.
func TestTranscripts(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		var s *Schedule
		now := time.Duration(0)
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd == "config" {
				s = New(config(t, d))
				return "ok\n"
			}
			e := Event{Kind: eventNames[d.Cmd]}
			if e.Kind == 0 {
				d.Fatalf(t, "no such event")
			}
			for _, a := range d.CmdArgs {
				switch a.Key {
				case "at":
					now = duration(t, a.Vals[0])
				case "run":
					e.Run = number(t, a.Vals[0])
				case "id":
					e.ID = number(t, a.Vals[0])
				case "count":
					e.Count = number(t, a.Vals[0])
				case "findings":
					e.Findings = int(number(t, a.Vals[0]))
				case "fresh":
					e.Fresh = int(number(t, a.Vals[0]))
				case "kept":
					e.Kept = true
				case "reason":
					e.Reason = a.Vals[0]
				default:
					d.Fatalf(t, "no such argument: %s", a.Key)
				}
			}
			e.At = now
			return describe(s.Step(e))
		})
	})
}

func config(t *testing.T, d *datadriven.TestData) (c Config) {
	for _, a := range d.CmdArgs {
		switch a.Key {
		case "every":
			c.Every = duration(t, a.Vals[0])
		case "exits":
			c.Exits = number(t, a.Vals[0])
		case "written":
			c.Written = number(t, a.Vals[0])
		case "tries":
			c.Tries = int(number(t, a.Vals[0]))
		case "try-every":
			c.TryEvery = duration(t, a.Vals[0])
		case "confirm-within":
			c.ConfirmWithin = duration(t, a.Vals[0])
		case "force":
			c.Force = true
		case "hold":
			c.Hold = true
		default:
			d.Fatalf(t, "no such setting: %s", a.Key)
		}
	}
	return c
}

func duration(t *testing.T, s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func number(t *testing.T, s string) uint64 {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func describe(actions []Action) string {
	var b strings.Builder
	flag := func(set bool, s string) string {
		if set {
			return " " + s
		}
		return ""
	}
	for _, a := range actions {
		switch a.Kind {
		case Trap:
			fmt.Fprintf(&b, "trap, run %d\n", a.Run)
		case Snapshot:
			fmt.Fprintf(&b, "snapshot, run %d%s\n", a.Run, flag(a.Unsafe, "UNSAFE"))
		case Resume:
			b.WriteString("resume\n")
		case Scan:
			fmt.Fprintf(&b, "scan, run %d%s\n", a.Run, flag(a.Full, "full"))
		case ConfirmScan:
			fmt.Fprintf(&b, "confirm, run %d%s\n", a.Run, flag(a.Full, "full"))
		case Release:
			fmt.Fprintf(&b, "release, run %d\n", a.Run)
		case AwaitCommit:
			b.WriteString("await commit\n")
		case SetAlarm:
			fmt.Fprintf(&b, "alarm at %v\n", a.At)
		case Report:
			fmt.Fprintf(&b, "REPORT %v: %d findings, to %v%s%s\n", a.Outcome, a.Findings, a.IDs, flag(a.Forced, "forced"), flag(a.Reason != "", "("+a.Reason+")"))
		}
	}
	if b.Len() == 0 {
		return "(nothing)\n"
	}
	return b.String()
}
