// Package calls has what Redoubt's services ask of the Builder in the audit log: who asked for what
// before it is done, and what came of it; and what was refused, so that nobody can fill the log.
package calls

import (
	"context"
	"errors"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
)

// ActCall is a call or notice of a service that was refused: detail method, count.
const ActCall = "call"

// Outcome is what an error makes of an act.
func Outcome(err error) audit.Outcome {
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

// Recorded has each call of a tenant's toolstack in the log: that it was asked for before anything is
// done, unless the answer is all that is done, and what came of it before it is answered. Who
// asked is the toolstack's word. name is what a guest is called in the log, "" for one that is not known.
// What cannot be recorded is not done.
func Recorded(j *audit.Journal, tenant string, name func(uuid string) string, next rpc.Handler) rpc.Handler {
	return func(ctx context.Context, r *rpc.Request) (any, error) {
		var who asked
		if err := r.Decode(&who); err != nil {
			who = asked{}
		}
		object := name(who.UUID)
		for _, other := range []string{who.Name + who.Spec.Name, who.Path, who.UUID} {
			if object == "" {
				object = other
			}
		}
		act := audit.Text(r.Method[:min(len(r.Method), 64)])
		if act == "" {
			act = ActCall
		}
		e := j.Entry(act, object, audit.Asked, "uuid", who.UUID, "tenant", tenant)
		e.Actor = audit.Actor{Service: services.Toolstack, UID: who.Caller.UID, PID: who.Caller.PID}
		switch r.Method {
		case protocol.MethodOpen, protocol.MethodVars:
			// What these make is the caller's with the answer only.
		default:
			if err := j.Record(e); err != nil {
				closeAll(r.Files)
				return nil, err
			}
		}
		v, err := next(ctx, r)
		if rerr := j.Record(ended(e, err)); err == nil && rerr != nil {
			if w, ok := v.(rpc.WithFiles); ok {
				closeAll(w.Files)
			}
			return nil, rerr
		}
		return v, err
	}
}

// ended is an act that was asked for with what came of it.
func ended(e audit.Entry, err error) audit.Entry {
	e.Time, e.Outcome = time.Now(), Outcome(err)
	if err != nil {
		e = e.With("reason", err.Error())
	}
	return e
}

// Act has an act of the Builder's own in the log before it is done and with what came of it.
func Act(j *audit.Journal, act, object string, do func() error) error {
	e := j.Entry(act, object, audit.Asked)
	if err := j.Record(e); err != nil {
		return err
	}
	err := do()
	return errors.Join(err, j.Record(ended(e, err)))
}

// maxRefusals is how many refusals of one process's calls are recorded one by one: then only
// each one whose number is a power of two, so that nobody fills the log.
const maxRefusals = 16

// Refusals counts what one process was refused.
type Refusals struct{ n atomic.Int64 }

// Note records a refusal, if it is one of those that are recorded. It takes no lock that is held
// while anything is waited for but the disk.
func (c *Refusals) Note(j *audit.Journal, who audit.Actor, detail ...string) {
	n := c.n.Add(1)
	if n > maxRefusals && n&(n-1) != 0 {
		return
	}
	e := j.Entry(ActCall, who.Service, audit.Refused, append(detail, "count", strconv.FormatInt(n, 10))...)
	e.Actor = who
	j.Note(e)
}

// Watched has the calls and notices in the log that a process of a service made and may not make.
// guest is the one it is for, "" for all.
func Watched(j *audit.Journal, service, guest string, next rpc.Handler) rpc.Handler {
	var refused Refusals
	return func(ctx context.Context, r *rpc.Request) (any, error) {
		v, err := next(ctx, r)
		if rpc.KindOf(err) == rpc.Refused {
			refused.Note(j, audit.Actor{Service: service}, "method", r.Method, "reason", err.Error(), "guest", guest)
		}
		return v, err
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
