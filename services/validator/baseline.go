package validator

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"time"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/answer"
	"redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/schedule"
	"redoubt.dev/redoubt/validation/verdict"
)

// text is bytes in memory to hand on.
func text(name string, b []byte) (t asked.Text, err error) {
	if len(b) == 0 {
		return t, nil
	}
	if t.File, err = memfd.New(name, int64(len(b))); err != nil {
		return t, err
	}
	t.Size = len(b)
	if _, err = t.File.WriteAt(b, 0); err != nil {
		t.Close()
	}
	return t, err
}

// Create drafts a guest's next baseline from what its disks hold now; with no rules by those of the one there is.
func (m *Manager) Create(ctx context.Context, in protocol.CreateBaseline) (any, error) {
	if len(in.Rules) > 0 {
		if _, err := baseline.ParseRules(in.Rules); err != nil {
			return nil, rpc.Errorf(rpc.Invalid, "rules: %v", err)
		}
	}
	rules, err := text("rules", in.Rules)
	if err != nil {
		return nil, err
	}
	defer rules.Close()
	return m.draft(ctx, in.UUID, in.Force, asked.Scan{Draft: true, Rules: rules})
}

// Accept drafts a guest's next baseline, with files as they are now.
func (m *Manager) Accept(ctx context.Context, in protocol.AcceptBaseline) (any, error) {
	for _, p := range in.Paths {
		if _, err := baseline.ParseName(p); err != nil {
			return nil, rpc.Errorf(rpc.Invalid, "%v", err)
		}
	}
	return m.draft(ctx, in.UUID, false, asked.Scan{Draft: true, Accept: in.Paths, Changed: true})
}

func (m *Manager) draft(ctx context.Context, uuid string, force bool, q asked.Scan) (any, error) {
	var d verdict.Drafted
	err := m.with(ctx, uuid, func(ctx context.Context, w *worker) error {
		base, err := m.baseline(uuid, w.spec)
		if err != nil && q.Changed { // a baseline that does not count is no reason not to make another
			return err
		}
		if base != nil {
			defer base.text.Close()
			q.Baseline = base.text
		} else if q.Changed {
			return errNone
		}
		if err := w.snapshot(ctx, force); err != nil {
			return err
		}
		defer w.end()
		q.Created = time.Now().UTC().Truncate(time.Second)
		out, err := w.scan(ctx, q)
		if err != nil {
			return err
		}
		defer out.Answer.Close()
		b, err := read(out.Answer)
		if err != nil {
			return err
		}
		made, err := baseline.Open(b)
		if err == nil {
			err = made.Check()
		}
		if err != nil {
			return fmt.Errorf("the inspector's draft: %w", err)
		}
		if made.Guest != uuid || made.Signed() {
			return fmt.Errorf("the inspector's draft is another guest's, or signed")
		}
		d = verdict.Drafted{Version: made.Version, Entries: made.Len(), Bytes: len(b), SHA256: fmt.Sprintf("%x", sha256.Sum256(b)), Problems: out.Problems}
		return m.write(uuid, fileDraft, b)
	})
	if err != nil {
		return nil, err
	}
	return answered(d)
}

var errNone = rpc.Errorf(rpc.NotFound, "the guest has no baseline: make one (`redoubt baseline create`) and sign it")

// Get answers with the baseline or the draft.
func (m *Manager) Get(in protocol.Baseline) (any, error) {
	name, missing := fileBaseline, errNone
	if in.Draft {
		name, missing = fileDraft, errNoDraft
	}
	b, err := m.read(in.UUID, name, protocol.MaxAnswer)
	if err == nil && b == nil {
		err = missing
	}
	if err != nil {
		return nil, err
	}
	return bytesAnswered(b)
}

// Sign puts a signature to the draft.
func (m *Manager) Sign(ctx context.Context, in protocol.SignBaseline, g *spec.Guest) (any, error) {
	v, err := m.sign(in.UUID, g.Validated(), in.Signature, in.Signer)
	if err != nil {
		return nil, err
	}
	// From here on it is validated by itself. A guest without disks has nobody who would.
	_ = m.with(ctx, in.UUID, func(_ context.Context, w *worker) error {
		w.step(schedule.Event{Kind: schedule.Resumed})
		return nil
	})
	return protocol.Signed{Version: v}, nil
}

// answered is a handler's answer with JSON.
func answered(v any) (any, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return bytesAnswered(b)
}

func bytesAnswered(b []byte) (any, error) {
	return answer.Text(services.Builder, b)
}
