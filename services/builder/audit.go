package builder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/store/tree"
)

// Names in the state directory that are the audit log's.
const (
	AuditDir  = "audit"      // the log
	AuditHead = "audit-head" // its head, renewed at each record: not beside the log
	// AuditDamaged begins the names of logs that were found damaged and set aside.
	AuditDamaged = "audit-damaged-"
)

// ActDamaged is the alarm that begins a log after one that is damaged.
const ActDamaged = "audit-damaged"

// Acts beside those of package audit and the methods of package protocol.
const (
	// ActHandOver gives a process what lets it touch a guest: detail to, memory in bytes, kvm.
	ActHandOver = "hand-over"
	// ActCall is a call or notice of a service that was refused: detail method, count.
	ActCall = "call"
)

// journal is the audit log. Its one writer is the Builder. A record is on the disk before what
// it says is done or answered; where it cannot be written, the act is not done.
type journal struct {
	log *slog.Logger
	w   *audit.Writer

	mu   sync.Mutex
	head *os.File // the anchor; see AuditHead
}

// openJournal continues the log, whole or not at all: a damaged one, or one that is not what its
// head names, is set aside as it is, as evidence, and another one begins with an alarm. Redoubt
// starts nevertheless: who could damage the log could as well stop Redoubt, and an operator whose
// disk lost a sector wants guests, the evidence and the alarm. `redoubt audit verify` fails until
// the operator has taken the damaged log away.
func openJournal(stateDir string, log *slog.Logger) (*journal, error) {
	dir, anchor := filepath.Join(stateDir, AuditDir), filepath.Join(stateDir, AuditHead)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	j := &journal{log: log}
	damage, err := CheckAudit(stateDir)
	if err != nil {
		return nil, err
	}
	aside := ""
	if damage != "" {
		aside = AuditDamaged + time.Now().UTC().Format("20060102T150405.000000000")
		log.Error("the audit log is damaged and was set aside", "damage", damage, "kept", filepath.Join(stateDir, aside))
		if err := os.Rename(dir, filepath.Join(stateDir, aside)); err != nil {
			return nil, err
		}
		if err := os.Rename(anchor, filepath.Join(stateDir, aside, AuditHead)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if j.head, err = os.OpenFile(anchor, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	if j.w, err = audit.Open(dir, audit.Options{Actor: j.self()}); err != nil {
		j.head.Close()
		return nil, err
	}
	err = j.anchor(j.w.Head())
	if err == nil && aside != "" {
		err = j.record(j.entry(ActDamaged, "audit log", audit.Done, "damage", damage, "kept", aside))
	}
	if err == nil {
		err = j.endLeft(dir)
	}
	if err != nil {
		j.close()
		return nil, err
	}
	return j, nil
}

// CheckAudit verifies the audit log of a state directory against the head that is kept apart. It
// says what is damaged, "" for nothing. A last line that was cut short is no damage: the writer
// was killed, and the act was not done.
func CheckAudit(stateDir string) (damage string, err error) {
	var heads []audit.Head
	head, err := ReadAuditHead(stateDir)
	missing := errors.Is(err, os.ErrNotExist)
	switch {
	case err == nil:
		heads = append(heads, head)
	case !missing:
		return err.Error(), nil
	}
	r, err := audit.Verify(filepath.Join(stateDir, AuditDir), heads...)
	if err != nil {
		return "", err
	}
	for _, f := range r.Findings {
		if f.Kind != audit.TornTail {
			return f.String(), nil
		}
	}
	if missing && r.Head.Seq > 1 { // a Builder was killed before it wrote its first head
		return fmt.Sprintf("%s is not there, the log has %d records", AuditHead, r.Records), nil
	}
	return "", nil
}

// ReadAuditHead reads the head that is kept apart from the log; os.ErrNotExist for none yet.
func ReadAuditHead(stateDir string) (audit.Head, error) {
	b, err := os.ReadFile(filepath.Join(stateDir, AuditHead))
	if err != nil {
		return audit.Head{}, err
	}
	if len(b) == 0 {
		return audit.Head{}, os.ErrNotExist
	}
	h, err := audit.ParseHead(b)
	if err != nil {
		return h, fmt.Errorf("%s: %w", AuditHead, err)
	}
	return h, nil
}

func (j *journal) self() audit.Actor {
	return audit.Actor{Service: services.Builder, UID: uint32(os.Getuid()), PID: os.Getpid()}
}

// endLeft ends in the log what a Builder that was killed left: it all ended with it.
func (j *journal) endLeft(dir string) error {
	guests, instances := map[string]bool{}, map[[2]string]bool{}
	for r, err := range audit.Records(dir) {
		if err != nil {
			return err
		}
		if r.Outcome != audit.Done {
			continue
		}
		instance := [2]string{r.Object, r.Detail[audit.DetailInstance]}
		switch r.Act {
		case audit.ActLink:
			guests[r.Object] = true
		case audit.ActGuestEnd:
			delete(guests, r.Object)
		case audit.ActInstanceStart:
			instances[instance] = true
		case audit.ActInstanceEnd:
			delete(instances, instance)
		}
	}
	var all []audit.Entry
	for g := range guests {
		all = append(all, j.entry(audit.ActGuestEnd, g, audit.Done, "reason", "ended with a Builder that was killed"))
	}
	for i := range instances {
		all = append(all, j.entry(audit.ActInstanceEnd, i[0], audit.Done, audit.DetailInstance, i[1], "reason", "ended with a Builder that was killed"))
	}
	return j.record(all...)
}

// entry is an act of the Builder's own; detail is names and values.
func (j *journal) entry(act, object string, o audit.Outcome, detail ...string) audit.Entry {
	e := audit.Entry{Time: time.Now(), Actor: j.self(), Act: act, Object: text(object), Outcome: o}
	for i := 0; i+1 < len(detail); i += 2 {
		if detail[i+1] != "" {
			if e.Detail == nil {
				e.Detail = map[string]string{}
			}
			e.Detail[detail[i]] = text(detail[i+1])
		}
	}
	return e
}

// text is what the log can hold of what others say.
func text(s string) string { return strings.ToValidUTF8(clip(s, 1024), "�") }

// record writes entries and waits for the disk once.
func (j *journal) record(entries ...audit.Entry) error {
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
func (j *journal) anchor(h audit.Head) error {
	if _, err := j.head.WriteAt(h.Line(), 0); err != nil {
		return rpc.Errorf(rpc.Unavailable, "what cannot be recorded is not done: %v", err)
	}
	return nil
}

// note is record where there is nothing that could be left undone.
func (j *journal) note(entries ...audit.Entry) { _ = j.record(entries...) }

func (j *journal) close() {
	if j == nil {
		return
	}
	j.w.Close()
	j.head.Close()
}

// tenure is one process of a service, as the log names it for ever.
type tenure struct {
	service, id string
	pid         int
}

func newTenure(service string, p *process.Process) tenure {
	return tenure{service, fmt.Sprintf("%d.%x", p.PID(), time.Now().UnixNano()), p.PID()}
}

func (j *journal) started(i tenure, detail ...string) audit.Entry {
	detail = append(detail, audit.DetailInstance, i.id, "pid", strconv.Itoa(i.pid))
	return j.entry(audit.ActInstanceStart, i.service, audit.Done, detail...)
}

// ended is an instance's end; guests are those that depended on it.
func (j *journal) ended(i tenure, err error, guests []string) audit.Entry {
	reason := "ended in order"
	if err != nil {
		reason = err.Error()
	}
	slices.Sort(guests)
	return j.entry(audit.ActInstanceEnd, i.service, audit.Done, audit.DetailInstance, i.id, "reason", reason, "guests", strings.Join(guests, " "))
}

// linked says that a guest depends on an instance from here on.
func (j *journal) linked(guest string, i tenure) audit.Entry {
	return j.entry(audit.ActLink, guest, audit.Done, audit.DetailService, i.service, audit.DetailInstance, i.id)
}

// outcome is what an error makes of an act.
func outcome(err error) audit.Outcome {
	if err == nil {
		return audit.Done
	}
	switch rpc.KindOf(err) {
	case rpc.Refused, rpc.Invalid, rpc.NotFound, rpc.Exists:
		return audit.Refused
	}
	return audit.Failed
}

// asked is what every call of the toolstack says of who asked for what.
type asked struct {
	UUID   string          `json:"uuid"`
	Name   string          `json:"name"`
	Path   string          `json:"path"`
	Caller protocol.Caller `json:"caller"`
	Spec   struct {
		Name string `json:"name"`
	} `json:"spec"`
}

// recorded has each call of the toolstack in the log: that it was asked for before anything is
// done, unless the answer is all that is done, and what came of it before it is answered. Who asked is the toolstack's word.
func (b *Builder) recorded(tenant string, next rpc.Handler) rpc.Handler {
	return func(ctx context.Context, r *rpc.Request) (any, error) {
		var who asked
		if err := r.Decode(&who); err != nil {
			who = asked{}
		}
		name := who.Name + who.Spec.Name
		if g := b.guest(who.UUID); g != nil {
			name = g.build.Spec.Name
		}
		for _, other := range []string{who.Path, who.UUID} {
			if name == "" {
				name = other
			}
		}
		e := b.journal.entry(text(clip(r.Method, 64)), name, audit.Asked, "uuid", who.UUID, "tenant", tenant)
		e.Actor = audit.Actor{Service: services.Toolstack, UID: who.Caller.UID, PID: who.Caller.PID}
		if e.Act == "" {
			e.Act = ActCall
		}
		switch r.Method {
		case protocol.MethodOpen, protocol.MethodVars:
			// What these make is the caller's with the answer only.
		default:
			if err := b.journal.record(e); err != nil {
				closeAll(r.Files)
				return nil, err
			}
		}
		v, err := next(ctx, r)
		e.Time, e.Outcome = time.Now(), outcome(err)
		if err != nil {
			e = withDetail(e, "reason", err.Error())
		}
		if rerr := b.journal.record(e); err == nil && rerr != nil {
			if w, ok := v.(rpc.WithFiles); ok {
				closeAll(w.Files)
			}
			return nil, rerr
		}
		return v, err
	}
}

func withDetail(e audit.Entry, name, value string) audit.Entry {
	detail := map[string]string{name: text(value)}
	for k, v := range e.Detail {
		detail[k] = v
	}
	e.Detail = detail
	return e
}

// maxRefusals is how many refusals of one process's calls are recorded one by one: then only
// each one whose number is a power of two, so that nobody fills the log.
const maxRefusals = 16

// refusals has the calls and notices of a service in the log that it may not make, p's process.
func (b *Builder) refusals(service, guest string, next rpc.Handler) rpc.Handler {
	var mu sync.Mutex
	count := 0
	return func(ctx context.Context, r *rpc.Request) (any, error) {
		v, err := next(ctx, r)
		if rpc.KindOf(err) != rpc.Refused {
			return v, err
		}
		mu.Lock()
		count++
		n := count
		mu.Unlock()
		if n <= maxRefusals || n&(n-1) == 0 {
			e := b.journal.entry(ActCall, service, audit.Refused, "method", r.Method, "reason", err.Error(), "guest", guest, "count", strconv.Itoa(n))
			e.Actor = audit.Actor{Service: service}
			b.journal.note(e)
		}
		return v, err
	}
}

// depends records what a guest depends on from the moment it is announced.
func (b *Builder) depends(g *guest, d tree.Domain) error {
	b.mu.Lock()
	all := []tenure{b.tenures[services.StoreState]}
	if !g.build.Spec.TPM.Disabled {
		all = append(all, b.tenures[services.VTPM])
	}
	b.mu.Unlock()
	var entries []audit.Entry
	for _, i := range all {
		e := b.journal.linked(g.build.Spec.Name, i)
		entries = append(entries, withDetail(withDetail(e, "uuid", g.build.UUID), "domain", strconv.Itoa(int(d))))
	}
	return b.journal.record(entries...)
}

// handOver records that an emulator was started and what it is given.
func (b *Builder) handOver(g *guest, r *run, kvm bool) error {
	name := g.build.Spec.Name
	e := b.journal.entry(ActHandOver, name, audit.Done, "to", services.Emulator, audit.DetailInstance, r.is.id,
		"memory", strconv.FormatInt(int64(g.build.Spec.Memory), 10), "kvm", strconv.FormatBool(kvm))
	return b.journal.record(b.journal.started(r.is, "guest", name, "emulator", string(g.emulator)), b.journal.linked(name, r.is), e)
}

// handQEMU records what a QEMU is given by the emulator that keeps it.
func (b *Builder) handQEMU(g *guest, r *run, kvm bool) error {
	return b.journal.record(b.journal.entry(ActHandOver, g.build.Spec.Name, audit.Done, "to", services.QEMU,
		"emulator", r.is.id, "memory", strconv.FormatInt(int64(g.build.Spec.Memory), 10), "kvm", strconv.FormatBool(kvm)))
}

// serviceStarted records an instance of a service that all guests share. Guests that run depend on
// it from here on; only the store can be started again under them.
func (b *Builder) serviceStarted(service string, p *process.Process, detail ...string) error {
	i := newTenure(service, p)
	b.mu.Lock()
	b.tenures[service] = i
	entries := []audit.Entry{b.journal.started(i, detail...)}
	if service == services.StoreState {
		for _, g := range b.guests {
			entries = append(entries, b.journal.linked(g.build.Spec.Name, i))
		}
	}
	b.mu.Unlock()
	return b.journal.record(entries...)
}

// serviceEnded records its end. Every guest depends on the services that this is for.
func (b *Builder) serviceEnded(service string, err error) {
	b.mu.Lock()
	i, ok := b.tenures[service]
	delete(b.tenures, service)
	var guests []string
	for _, g := range b.guests {
		if service != services.VTPM || !g.build.Spec.TPM.Disabled {
			guests = append(guests, g.build.Spec.Name)
		}
	}
	b.mu.Unlock()
	if ok {
		b.journal.note(b.journal.ended(i, err, guests))
	}
}
