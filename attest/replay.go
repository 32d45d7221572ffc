package attest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"redoubt.dev/redoubt/attest/eventlog"
)

// A Replay is what an event log says, in a form to print. Of a damaged log it holds what stands
// before the damage.
type Replay struct {
	Format string        `json:"format"` // SHA-1 or crypto-agile
	Banks  []string      `json:"banks"`  // as tpm2-tools name them
	Size   int           `json:"size"`   // bytes read
	Events []ReplayEvent `json:"events"`
	PCRs   []ReplayBank  `json:"pcrs"`
	Damage string        `json:"damage,omitempty"` // why reading or replaying ended early, with the offset
}

// A ReplayEvent is one event of a log.
type ReplayEvent struct {
	Event   int            `json:"event"`  // counted from 1; the header is not counted
	Offset  int            `json:"offset"` // bytes from the start of the log
	PCR     uint32         `json:"pcr"`
	Type    string         `json:"type"`
	Text    string         `json:"text"`              // of the data, printable
	Matches bool           `json:"matches,omitempty"` // the digests are those of the data
	Digests map[string]Hex `json:"digests"`
}

// A ReplayBank is the registers of one bank that the log sets.
type ReplayBank struct {
	Bank string         `json:"bank"`
	PCRs map[uint32]Hex `json:"pcrs"`

	order []uint32
}

// ReplayReport reads a TCG event log of either format and computes its registers. It never
// returns nil: the error, which the report carries as Damage too, names the offset of what
// cannot be read, and the report holds everything before it.
func ReplayReport(log []byte) (*Replay, error) {
	l, err := eventlog.ParseLog(log)
	r := &Replay{Format: string(l.Format), Size: l.Size, Events: []ReplayEvent{}, PCRs: []ReplayBank{}}
	for _, b := range l.Banks {
		r.Banks = append(r.Banks, eventlog.AlgorithmName(b.Algorithm))
	}
	for i, e := range l.Events {
		_, matches := e.Measured()
		out := ReplayEvent{
			Event: i + 1, Offset: l.Offsets[i], PCR: e.PCR, Type: eventlog.TypeName(e.Type), Text: e.Text(),
			Matches: matches, Digests: map[string]Hex{},
		}
		for _, d := range e.Digests {
			out.Digests[eventlog.AlgorithmName(d.Algorithm)] = d.Sum
		}
		r.Events = append(r.Events, out)
	}
	pcrs, replayErr := eventlog.Replay(l.Events)
	var damage *eventlog.DamageError
	if errors.As(replayErr, &damage) {
		damage.Offset = l.Offsets[damage.Event-1]
	}
	if err == nil {
		err = replayErr
	}
	for _, id := range pcrs.BankIDs() {
		b := ReplayBank{Bank: eventlog.AlgorithmName(id), PCRs: map[uint32]Hex{}, order: pcrs.Indexes(id)}
		for _, i := range b.order {
			b.PCRs[i] = pcrs[id][i]
		}
		r.PCRs = append(r.PCRs, b)
	}
	if err != nil {
		r.Damage = err.Error()
	}
	return r, err
}

// WriteText writes the events and registers for a person.
func (r *Replay) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s log, %d events in %d bytes, banks %s\n", r.Format, len(r.Events), r.Size, strings.Join(r.Banks, " "))
	for _, e := range r.Events {
		fmt.Fprintf(&b, "%4d  %#06x  PCR %2d  %-32s  %s\n", e.Event, e.Offset, int32(e.PCR), e.Type, e.Text) // -1 means none
	}
	for _, bank := range r.PCRs {
		fmt.Fprintf(&b, "%s:\n", bank.Bank)
		for _, i := range bank.order {
			fmt.Fprintf(&b, "  %2d  %x\n", i, []byte(bank.PCRs[i]))
		}
	}
	if r.Damage != "" {
		fmt.Fprintf(&b, "damaged: %s\n", r.Damage)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// WriteJSON writes the same as JSON.
func (r *Replay) WriteJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}
