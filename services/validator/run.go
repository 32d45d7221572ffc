package validator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/verdict"
)

// ActValidate is a validation in the audit log: detail cause, baseline, findings, seen, unjudged, responses.
const ActValidate = "validate"

// end ends what a validation has in force: its snapshot, and where the guest is held, the hold.
func (w *worker) end() {
	w.drop()
	if _, err := w.letGo(); err != nil {
		w.m.Log.Warn("a guest is not let go", "guest", w.g.Name(), "err", err)
	}
}

// conclude has a verdict recorded, and what follows it done. failed is why there is none.
func (m *Manager) conclude(g Guest, v spec.Validation, r *verdict.Report, failed error) error {
	if failed == nil {
		r.Responses = decide(v.Respond, r.Findings)
	}
	detail := []string{"uuid", g.UUID(), "cause", r.Cause, "baseline", strconv.FormatUint(r.Baseline, 10), "findings", strconv.Itoa(len(r.Findings) + r.Omitted)}
	if s := r.Seen; s != nil {
		detail = append(detail, "seen", strconv.Itoa(s.Listed), "unjudged", strconv.Itoa(s.Unjudged))
	}
	for i, f := range r.Findings {
		if i == maxRecorded {
			break
		}
		detail = append(detail, fmt.Sprintf("finding%d", i), f.String())
	}
	if len(r.Responses) > 0 {
		detail = append(detail, "responses", fmt.Sprint(r.Responses))
	}
	outcome := audit.Done
	if failed != nil {
		outcome, detail = audit.Failed, append(detail, "reason", failed.Error())
	}
	if err := m.Journal.Record(m.Journal.Entry(ActValidate, g.Name(), outcome, detail...)); err != nil {
		if slices.ContainsFunc(r.Responses, func(what spec.Response) bool { return what != spec.Log }) {
			g.Fail(fmt.Sprintf("validation: %s, which could not be recorded: %v", clip(r.Findings[0].String()), err))
		}
		return errors.Join(failed, err)
	}
	err := m.respond(g, r)
	b, merr := json.Marshal(r)
	if merr == nil {
		merr = m.write(g.UUID(), fileLast, b)
	}
	switch {
	case failed != nil:
		g.Tell(protocol.EventValidation, "no verdict: "+clip(failed.Error()))
	case len(r.Findings) > 0:
		g.Tell(protocol.EventValidation, clip(fmt.Sprintf("%s deviate: %v", plural(len(r.Findings)+r.Omitted, "finding"), r.Findings[0])))
	}
	return errors.Join(failed, err, merr)
}

// maxRecorded is how many findings the audit log has of one validation.
const maxRecorded = 16

func clip(s string) string { return s[:min(len(s), 400)] }

// decide is what follows the findings: everything that the spec has for their severities, from the least to the most.
func decide(policy spec.Respond, findings []baseline.Finding) (all []spec.Response) {
	for _, f := range findings {
		for _, r := range map[baseline.Severity][]spec.Response{
			baseline.Info: policy.Info, baseline.Warning: policy.Warning, baseline.Critical: policy.Critical,
		}[f.Severity] {
			if !slices.Contains(all, r) {
				all = append(all, r)
			}
		}
	}
	if slices.ContainsFunc(all, func(r spec.Response) bool { return r == spec.Stop || r == spec.Revoke }) {
		all = slices.DeleteFunc(all, func(r spec.Response) bool { return r == spec.Pause }) // a guest that ends need not stand still
	}
	slices.SortFunc(all, func(a, b spec.Response) int { return slices.Index(spec.Responses, a) - slices.Index(spec.Responses, b) })
	return all
}

// Validate validates a guest now and answers with the report. It closes what came with the request.
func (m *Manager) Validate(ctx context.Context, in protocol.Validate, from *rpc.Request) (any, error) {
	seen, err := takeSeen(in, from)
	if err != nil {
		return nil, err
	}
	a := &want{full: in.Full, force: in.Force, seen: seen}
	w, err := m.worker(in.UUID)
	if err == nil && !m.has(in.UUID, fileBaseline) {
		err = errNone
	}
	if err != nil {
		a.end(nil)
		return nil, err
	}
	r, err := w.asked(ctx, a)
	switch {
	case err != nil:
		return nil, err
	case r.Error != "":
		return nil, rpc.Errorf(rpc.Unavailable, "%s", r.Error)
	}
	return answered(r)
}

// Status answers with what is known of a guest's validation.
func (m *Manager) Status(in protocol.Control, g *spec.Guest) (any, error) {
	s := verdict.Status{Guest: in.Name, Validation: g.Validated()}
	b, err := m.baseline(in.UUID, s.Validation)
	if err != nil {
		return nil, rpc.Errorf(rpc.Unavailable, "%v", err)
	}
	if b != nil {
		s.Baseline, s.Signer = b.Version, b.signer
		b.text.Close()
	}
	if s.Draft, err = m.draftVersion(in.UUID); err != nil {
		return nil, err
	}
	if s.Last, err = m.last(in.UUID); err != nil {
		return nil, err
	}
	s.InForce, s.Reason, s.Since = m.inForce(in.UUID)
	return answered(s)
}
