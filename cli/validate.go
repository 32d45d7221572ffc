package cli

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/validation/verdict"
)

func digest(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

func (a *app) validateCommand() *cobra.Command {
	var full, force, last bool
	var s seen
	c := &cobra.Command{
		Use:   "validate NAME",
		Short: "Hold a running guest's disks to its baseline",
		Long: `Takes a snapshot of the disks at a safe moment (no processor has its interrupts off, no request is in flight), lets the guest
go on, and has an inspector compare what changed since the last validation with the guest's signed baseline. What deviates
counts once a second snapshot, after the guest's file systems had time to commit, confirms it; then follows what the spec's
section validation says. The exit status is 1 where something deviates.

A spec's section validation does the same by itself: every so often, or after so much was written.

With --seen the disk is also held to what the guest shows of it: a listing of its root file system, made inside by
find / -xdev -print0. What the disk has and the listing lacks is hidden, unless it has changed since --seen-at, when the listing
was begun by the guest's clock. Without that it is a minute before this command, which is right only for a listing that comes
through a pipe while it is made.`,
		Example: `  redoubt validate web-1
  redoubt validate web-1 --full --json
  redoubt validate web-1 --last      # the last verdict, and what is in force
  ssh web-1 find / -xdev -print0 | redoubt validate web-1 --seen -
  at=$(ssh web-1 date +@%s); ssh web-1 find / -xdev -print0 >web-1.seen
  redoubt validate web-1 --seen web-1.seen --seen-at $at --seen-of disk0p1`,
		Args: names(1, "a guest's name"),
		RunE: func(c *cobra.Command, args []string) error {
			if last {
				return a.validation(c.Context(), args[0])
			}
			r := &v1.ValidateRequest{Name: args[0], Full: full, Force: force}
			if err := s.into(c.Context(), r, c.InOrStdin()); err != nil {
				return err
			}
			return a.validate(c.Context(), r)
		},
	}
	f := c.Flags()
	f.BoolVar(&full, "full", false, "read everything, not only what changed")
	f.BoolVar(&force, "force", false, "take a moment that is not safe, if no other comes")
	f.StringVar(&s.file, "seen", "", "listing of what the guest shows, by names that end in zero bytes or newlines; - for standard input")
	f.StringVar(&s.at, "seen-at", "", "when it was begun, by the guest's clock: RFC 3339, or @SECONDS")
	f.StringVar(&s.of, "seen-of", "", "volume that it is of, such as disk0p1 (default: the only ext file system)")
	f.BoolVar(&last, "last", false, "validate nothing: print the last verdict and what is in force against the guest")
	return c
}

func (a *app) validate(ctx context.Context, req *v1.ValidateRequest) error {
	a.progress("validating %s's disks", req.Name)
	res, err := a.client().Validate(ctx, req)
	a.progressEnd()
	if err != nil {
		return err
	}
	var r verdict.Report
	if err := json.Unmarshal(res.Report, &r); err != nil {
		return fmt.Errorf("validate: the report: %w", err)
	}
	if a.json {
		err = a.printJSON(r)
	} else {
		err = a.printVerdict(&r)
	}
	switch {
	case err != nil:
		return err
	case len(r.Findings) > 0:
		return exitError(1)
	}
	return nil
}

func (a *app) validation(ctx context.Context, name string) error {
	res, err := a.client().Validation(ctx, &v1.ValidationRequest{Name: name})
	if err != nil {
		return err
	}
	var s verdict.Status
	if err := json.Unmarshal(res.Status, &s); err != nil {
		return fmt.Errorf("validate: the status: %w", err)
	}
	if a.json {
		return a.printJSON(s)
	}
	p := &printer{w: tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)}
	switch {
	case s.Baseline != 0:
		p.line("baseline\tversion %d, signed by %s", s.Baseline, printable(s.Signer))
	default:
		p.line("baseline\tnone: `redoubt baseline create %s`", name)
	}
	if s.Draft != 0 {
		p.line("draft\tversion %d, not signed", s.Draft)
	}
	if force := responses(s.InForce); force != "" {
		p.line("in force\t%s: %s", force, printable(s.Reason))
	} else {
		p.line("in force\tnothing")
	}
	if s.Last == nil {
		p.line("last verdict\tnone")
	}
	if err := errors.Join(p.err, p.w.Flush()); err != nil || s.Last == nil {
		return err
	}
	return a.printVerdict(s.Last)
}

func responses(all []spec.Response) string {
	var text []string
	for _, r := range all {
		text = append(text, string(r))
	}
	return strings.Join(text, ", ")
}

func (a *app) printVerdict(r *verdict.Report) error {
	kind := "what changed"
	if r.Full {
		kind = "everything"
		if r.Why != "" {
			kind += " (" + printable(r.Why) + ")"
		}
	}
	fmt.Fprintf(a.out, "%s: %s, baseline %d, %d files, %d read again, %v\n", printable(r.Guest), kind, r.Baseline, r.Files, r.Read, r.Took.Round(time.Millisecond))
	for _, s := range r.Snapshots {
		fmt.Fprintf(a.out, "snapshot %d: %s; processors held %v, disks %v\n", s.Snapshot, printable(s.Why), s.Held.Round(10*time.Microsecond), s.HeldIO.Round(time.Microsecond))
	}
	if s := r.Seen; s != nil {
		fmt.Fprintf(a.out, "seen: %d names, held to %d of %s\n", s.Listed, s.Names, printable(s.Volume))
		if s.Unjudged > 0 {
			fmt.Fprintf(a.out, "not seen, and changed since %s, so that nothing is said of them: %d, such as %s\n", s.Begun.Format(time.RFC3339), s.Unjudged, printable(strings.Join(s.Some, " ")))
		}
	}
	if r.Error != "" {
		fmt.Fprintf(a.out, "no verdict: %s\n", printable(r.Error))
		return nil
	}
	if len(r.Findings) == 0 {
		fmt.Fprintln(a.out, "nothing deviates")
	}
	for _, f := range r.Findings {
		fmt.Fprintln(a.out, f)
	}
	if r.Omitted > 0 {
		fmt.Fprintf(a.out, "and %d more\n", r.Omitted)
	}
	if n := len(r.Withdrawn); n > 0 {
		fmt.Fprintf(a.out, "not confirmed by the second snapshot: %d\n", n)
	}
	if f := responses(r.Responses); f != "" {
		fmt.Fprintf(a.out, "followed by: %s\n", f)
	}
	return nil
}

// controlCommand is one that does something to a guest and has nothing to answer.
func (a *app) controlCommand(use, short, long, example, done string, do func(ctx context.Context, name, reason string) error, reasons bool) *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use: use + " NAME", Short: short, Long: long, Example: example, Args: names(1, "a guest's name"),
		RunE: func(c *cobra.Command, args []string) error {
			if err := do(c.Context(), args[0], reason); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]string{"guest": args[0], "done": use})
			}
			fmt.Fprintf(a.out, "%s %s\n", args[0], done)
			return nil
		},
	}
	if reasons {
		c.Flags().StringVar(&reason, "reason", "", "why, for the record")
	}
	return c
}

func (a *app) controlCommands() []*cobra.Command {
	return []*cobra.Command{
		a.controlCommand("pause", "Stop a guest's processors and its clock",
			"Stops a running guest's processors and its clock until `redoubt resume`. For the guest no time passes. It stays so when services are replaced.\nIts disks can be validated meanwhile: of the next moments, one is chosen at which no processor has its interrupts off.",
			"  redoubt pause web-1\n  redoubt resume web-1", "is paused",
			func(ctx context.Context, name, _ string) error {
				_, err := a.client().Pause(ctx, &v1.PauseRequest{Name: name})
				return err
			}, false),
		a.controlCommand("resume", "Let a paused guest go on",
			"Ends what `redoubt pause` began. A guest that a verdict has paused goes on with `redoubt release`.",
			"  redoubt resume web-1", "goes on",
			func(ctx context.Context, name, _ string) error {
				_, err := a.client().Resume(ctx, &v1.ResumeRequest{Name: name})
				return err
			}, false),
		a.controlCommand("quarantine", "Have a guest reach nothing but the remediation addresses",
			"Moves the guest's NICs to the quarantine VLAN, where they reach the remediation addresses of `redoubt up --quarantine` and\nnothing else. It stays so over restarts of the guest and of Redoubt, until `redoubt release`. Its console works.",
			"  redoubt quarantine web-1 --reason 'ticket 4711'\n  redoubt release web-1", "is in quarantine",
			func(ctx context.Context, name, reason string) error {
				_, err := a.client().Quarantine(ctx, &v1.QuarantineRequest{Name: name, Reason: reason})
				return err
			}, true),
		a.controlCommand("release", "End what is in force against a guest",
			"Ends what verdicts or `redoubt quarantine` have put in force: quarantine, dropped devices, a verdict's pause, a revoked vTPM.\nWhat deviates is not changed by that: the next validation finds it again, unless `redoubt baseline accept` took it in.",
			"  redoubt release web-1 --reason restored", "is released",
			func(ctx context.Context, name, reason string) error {
				_, err := a.client().Release(ctx, &v1.ReleaseRequest{Name: name, Reason: reason})
				return err
			}, true),
	}
}
