package audit

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"redoubt.dev/redoubt/ipc/rpc"
)

// Names in the state directory that are the audit log's.
const (
	Dir        = "audit"      // the log
	AnchorFile = "audit-head" // its head, renewed at each record: not beside the log
	// DamagedPrefix begins the names of logs that were found damaged and set aside.
	DamagedPrefix = "audit-damaged-"
)

// ActDamaged is the alarm that begins a log after one that is damaged.
const ActDamaged = "audit-damaged"

// A Journal is the log of a state directory with its anchor: the head that is kept apart from the
// log, which finds a log that was cut, rolled back or removed as a whole. It has one writer. A
// record is on the disk before what it says is done or answered; where it cannot be written, the act
// is not to be done. A nil Journal records nothing.
type Journal struct {
	log  *slog.Logger
	w    *Writer
	self Actor

	mu   sync.Mutex
	head *os.File // the anchor; see AnchorFile
}

// OpenJournal continues the log, whole or not at all: a damaged one, or one that is not what its
// head names, is set aside as it is, as evidence, and another one begins with an alarm. Redoubt
// starts nevertheless: who could damage the log could as well stop Redoubt, and an operator whose
// disk lost a sector wants guests, the evidence and the alarm. `redoubt audit verify` fails until
// the operator has taken the damaged log away.
//
// What the log does not say the end of has ended with the last Builder, but for what is alive.
func OpenJournal(stateDir string, self Actor, log *slog.Logger, alive Alive) (*Journal, error) {
	dir, anchor := filepath.Join(stateDir, Dir), filepath.Join(stateDir, AnchorFile)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	j := &Journal{log: log, self: self}
	damage, err := Check(stateDir)
	if err != nil {
		return nil, err
	}
	aside := ""
	if damage != "" {
		aside = DamagedPrefix + time.Now().UTC().Format("20060102T150405.000000000")
		log.Error("the audit log is damaged and was set aside", "damage", damage, "kept", filepath.Join(stateDir, aside))
		if err := os.Rename(dir, filepath.Join(stateDir, aside)); err != nil {
			return nil, err
		}
		if err := os.Rename(anchor, filepath.Join(stateDir, aside, AnchorFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if j.head, err = os.OpenFile(anchor, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	if j.w, err = Open(dir, Options{Actor: self}); err != nil {
		j.head.Close()
		return nil, err
	}
	err = j.anchor(j.w.Head())
	if err == nil && aside != "" {
		err = j.Record(j.Entry(ActDamaged, "audit log", Done, "damage", damage, "kept", aside))
	}
	if err == nil {
		err = j.endLeft(dir, alive)
	}
	if err != nil {
		j.Close()
		return nil, err
	}
	return j, nil
}

// Check verifies the audit log of a state directory against the head that is kept apart. It
// says what is damaged, "" for nothing. A last line that was cut short is no damage: the writer
// was killed, and the act was not done.
func Check(stateDir string) (damage string, err error) {
	var heads []Head
	head, err := KeptHead(stateDir)
	missing := errors.Is(err, os.ErrNotExist)
	switch {
	case err == nil:
		heads = append(heads, head)
	case !missing:
		return err.Error(), nil
	}
	r, err := Verify(filepath.Join(stateDir, Dir), heads...)
	if err != nil {
		return "", err
	}
	for _, f := range r.Findings {
		if f.Kind != TornTail {
			return f.String(), nil
		}
	}
	if missing && r.Head.Seq > 1 { // a Builder was killed before it wrote its first head
		return fmt.Sprintf("%s is not there, the log has %d records", AnchorFile, r.Records), nil
	}
	return "", nil
}

// KeptHead reads the head that is kept apart from the log; os.ErrNotExist for none yet.
func KeptHead(stateDir string) (Head, error) {
	b, err := os.ReadFile(filepath.Join(stateDir, AnchorFile))
	if err != nil {
		return Head{}, err
	}
	if len(b) == 0 {
		return Head{}, os.ErrNotExist
	}
	h, err := ParseHead(b)
	if err != nil {
		return h, fmt.Errorf("%s: %w", AnchorFile, err)
	}
	return h, nil
}

// Alive is what outlived the last Builder.
type Alive struct {
	Guests    []string // by name
	Instances []string // by ID
}

// endLeft ends in the log what ended with a Builder that was killed.
func (j *Journal) endLeft(dir string, alive Alive) error {
	guests, instances := map[string]bool{}, map[[2]string]bool{}
	for r, err := range Records(dir) {
		if err != nil {
			return err
		}
		if r.Outcome != Done {
			continue
		}
		instance := [2]string{r.Object, r.Detail[DetailInstance]}
		switch r.Act {
		case ActLink:
			guests[r.Object] = true
		case ActGuestEnd:
			delete(guests, r.Object)
		case ActInstanceStart:
			instances[instance] = true
		case ActInstanceEnd:
			delete(instances, instance)
		}
	}
	var all []Entry
	for _, g := range alive.Guests {
		delete(guests, g)
	}
	for i := range instances {
		if slices.Contains(alive.Instances, i[1]) {
			delete(instances, i)
		}
	}
	for g := range guests {
		all = append(all, j.Entry(ActGuestEnd, g, Done, "reason", "ended with a Builder that was killed"))
	}
	for i := range instances {
		all = append(all, j.Entry(ActInstanceEnd, i[0], Done, DetailInstance, i[1], "reason", "ended with a Builder that was killed"))
	}
	return j.Record(all...)
}

// Entry is an act of the writer's own; detail is names and values.
func (j *Journal) Entry(act, object string, o Outcome, detail ...string) Entry {
	e := Entry{Time: time.Now(), Act: act, Object: Text(object), Outcome: o}
	if j != nil {
		e.Actor = j.self
	}
	for i := 0; i+1 < len(detail); i += 2 {
		if detail[i+1] != "" {
			if e.Detail == nil {
				e.Detail = map[string]string{}
			}
			e.Detail[detail[i]] = Text(detail[i+1])
		}
	}
	return e
}

// With is the entry with one more detail, in place of one of that name.
func (e Entry) With(name, value string) Entry {
	e.Detail = maps.Clone(e.Detail)
	if e.Detail == nil {
		e.Detail = map[string]string{}
	}
	e.Detail[name] = Text(value)
	return e
}

// Text is what the log can hold of what others say.
func Text(s string) string { return strings.ToValidUTF8(s[:min(len(s), 1024)], "�") }

// Record writes entries and waits for the disk once.
func (j *Journal) Record(entries ...Entry) error {
	if j == nil || len(entries) == 0 {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	h, err := j.w.Append(entries...)
	if err != nil {
		j.log.Error("audit", "err", err)
		return rpc.Errorf(rpc.Unavailable, "what cannot be recorded is not done: %v", err)
	}
	return j.anchor(h)
}

// anchor renews the head that is kept apart: it is behind the log at worst.
func (j *Journal) anchor(h Head) error {
	if _, err := j.head.WriteAt(h.Line(), 0); err != nil {
		return rpc.Errorf(rpc.Unavailable, "what cannot be recorded is not done: %v", err)
	}
	return nil
}

// Note is Record where there is nothing that could be left undone.
func (j *Journal) Note(entries ...Entry) { _ = j.Record(entries...) }

// Failed is why nothing is recorded any more, nil while it is: what needs a record had better not begin.
func (j *Journal) Failed() error {
	if j == nil {
		return nil
	}
	return j.w.Err()
}

// Close ends it.
func (j *Journal) Close() {
	if j == nil {
		return
	}
	j.w.Close()
	j.head.Close()
}

// An Instance is one process of a service, as the log names it for ever.
type Instance struct {
	Service, ID string
	PID         int
}

// NewInstance names a process that was just started.
func NewInstance(service string, pid int) Instance {
	return Instance{service, fmt.Sprintf("%d.%x", pid, time.Now().UnixNano()), pid}
}

// Started is an instance's start; detail is names and values.
func (j *Journal) Started(i Instance, detail ...string) Entry {
	detail = append(detail, DetailInstance, i.ID, "pid", strconv.Itoa(i.PID))
	return j.Entry(ActInstanceStart, i.Service, Done, detail...)
}

// Ended is an instance's end; guests are those that depended on it.
func (j *Journal) Ended(i Instance, err error, guests []string) Entry {
	reason := "ended in order"
	if err != nil {
		reason = err.Error()
	}
	slices.Sort(guests)
	return j.Entry(ActInstanceEnd, i.Service, Done, DetailInstance, i.ID, "reason", reason, "guests", strings.Join(guests, " "))
}

// Linked says that a guest depends on an instance from here on.
func (j *Journal) Linked(guest string, i Instance) Entry {
	return j.Entry(ActLink, guest, Done, DetailService, i.Service, DetailInstance, i.ID)
}
