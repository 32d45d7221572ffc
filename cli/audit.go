package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/services"
)

func (a *app) auditCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "audit",
		Short: "Check and question the log of privileged acts",
		Long: `The Builder writes one record for each privileged act: what callers of the API ask for and
what comes of it, services started, killed and replaced, what is handed to whom, calls refused.
The log is <state-dir>/audit; its head is kept apart, in <state-dir>/audit-head. These commands
read the files and need no running Redoubt.`,
		Example: "  redoubt audit verify\n  redoubt audit exposed --service blkback --from 2026-01-02T03:04:05Z --to now",
	}
	c.AddCommand(a.auditVerifyCommand(), a.auditExposedCommand())
	return c
}

// auditFinding is a damage as --json prints it.
type auditFinding struct {
	Kind   string `json:"kind"`
	File   string `json:"file"`
	Line   int    `json:"line,omitempty"`
	Offset int64  `json:"offset,omitempty"`
	Seq    uint64 `json:"record,omitempty"`
	Text   string `json:"text"`
}

type auditReport struct {
	Whole    bool           `json:"whole"`
	Records  uint64         `json:"records"`
	Head     audit.Head     `json:"head"`
	Findings []auditFinding `json:"findings"`
	SetAside []string       `json:"setAside"`
}

func (a *app) auditVerifyCommand() *cobra.Command {
	var heads []string
	c := &cobra.Command{
		Use:   "verify",
		Short: "Find any edit, cut or change of order in the log",
		Long: `Checks every record's hash, that each continues the one before, and that the log reaches the
heads that are known: the one beside it, the one in <state-dir>/audit-head, and those given. A
head that you noted elsewhere, on another machine or on paper, finds a log that was cut or written anew by
somebody who could write all these files.

Exit status: 0 the log is whole; 1 it is damaged, or one that was damaged was set aside by the
Builder and still lies in <state-dir>/audit-damaged-*: look into it, then take it away.`,
		Example: "  redoubt audit verify\n  redoubt audit verify --head 120:9f86d081...\n  redoubt audit verify --json",
		Args:    names(0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			var known []audit.Head
			for _, h := range heads {
				var k audit.Head
				seq, hash, _ := strings.Cut(h, ":")
				if _, err := fmt.Sscanf(seq, "%d", &k.Seq); err != nil || k.Hash.UnmarshalText([]byte(hash)) != nil {
					return usagef("--head %q: give RECORD:HASH, as verify prints it", h)
				}
				known = append(known, k)
			}
			return a.auditVerify(known)
		},
	}
	c.Flags().StringArrayVar(&heads, "head", nil, "a head noted before, RECORD:HASH (repeatable)")
	return c
}

// verifyAttempts: a Builder that writes while the log is read can make its end look cut.
const verifyAttempts = 3

func (a *app) auditVerify(known []audit.Head) error {
	if _, err := os.Stat(filepath.Join(a.stateDir, audit.Dir)); err != nil {
		return fmt.Errorf("audit: %w: no log: name the state directory with --state-dir", err)
	}
	var out auditReport
	for range verifyAttempts {
		var err error
		if out, err = a.auditReport(known); err != nil {
			return err
		}
		if len(out.Findings) == 0 {
			break
		}
	}
	aside, err := filepath.Glob(filepath.Join(a.stateDir, audit.DamagedPrefix+"*"))
	if err != nil {
		return err
	}
	out.SetAside = append([]string{}, aside...)
	out.Whole = len(out.Findings) == 0 && len(aside) == 0
	if a.json {
		err = a.printJSON(out)
	} else {
		err = a.sayAudit(out)
	}
	if err == nil && !out.Whole {
		err = exitError(1)
	}
	return err
}

func (a *app) auditReport(known []audit.Head) (auditReport, error) {
	out := auditReport{Findings: []auditFinding{}}
	bad := func(text string) {
		out.Findings = append(out.Findings, auditFinding{Kind: string(audit.BadHead), File: audit.AnchorFile, Text: text})
	}
	apart, err := audit.KeptHead(a.stateDir)
	missing := errors.Is(err, os.ErrNotExist)
	switch {
	case err == nil:
		known = append(slices.Clip(known), apart)
	case !missing:
		bad(err.Error())
	}
	r, err := audit.Verify(filepath.Join(a.stateDir, audit.Dir), known...)
	if err != nil {
		return out, err
	}
	if missing && r.Head.Seq > 1 {
		bad("is not there")
	}
	for _, f := range r.Findings {
		out.Findings = append(out.Findings, auditFinding{string(f.Kind), f.File, f.Line, f.Offset, f.Seq, f.Text})
	}
	out.Records, out.Head = r.Records, r.Head
	return out, nil
}

func (a *app) sayAudit(r auditReport) error {
	for _, f := range r.Findings {
		place := f.File
		if f.Line > 0 {
			place += fmt.Sprintf(", line %d (byte %d)", f.Line, f.Offset)
		}
		fmt.Fprintf(a.out, "%s: %s: %s\n", place, f.Kind, f.Text)
	}
	for _, d := range r.SetAside {
		fmt.Fprintf(a.out, "%s: a log that was damaged, kept as it was\n", d)
	}
	word := "whole"
	if len(r.Findings) > 0 {
		word = "damaged"
	}
	_, err := fmt.Fprintf(a.out, "%s: %d records, head %d:%s\n", word, r.Records, r.Head.Seq, r.Head.Hash)
	return err
}

// exposureJSON is an exposure as --json prints it.
type exposureJSON struct {
	Guest    string     `json:"guest"`
	Service  string     `json:"service"`
	Instance string     `json:"instance"`
	Since    time.Time  `json:"since"`
	Until    *time.Time `json:"until,omitempty"`
}

func (a *app) auditExposedCommand() *cobra.Command {
	var service, from, to string
	c := &cobra.Command{
		Use:   "exposed",
		Short: "List the guests that depended on a service at some time",
		Long: `Lists which guests depended on which instance of a service between two moments, both included:
whom it concerns when the service is found to have been taken over then. Services: blkback, emulator, store, vtpm.

Times are RFC 3339, a local date and time, "now", or how long ago. The log is trusted as it is:
run "redoubt audit verify" first.`,
		Example: `  redoubt audit exposed --service blkback --from 2026-01-02T03:04:05Z --to 2026-01-02T04:00:00Z
  redoubt audit exposed --service store --from "2026-01-02 03:04" --to now
  redoubt audit exposed --service vtpm --from 24h --json`,
		Args: names(0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			if service == "" || from == "" {
				return usagef("audit exposed: give --service and --from: see `redoubt audit exposed --help`")
			}
			now := time.Now()
			begin, err := parseMoment(from, now)
			if err != nil {
				return usagef("--from: %v", err)
			}
			end, err := parseMoment(to, now)
			if err != nil {
				return usagef("--to: %v", err)
			}
			if end.Before(begin) {
				return usagef("audit exposed: --to is before --from")
			}
			service = strings.TrimPrefix(service, "redoubt-")
			if service == "store" {
				service = services.StoreState
			}
			return a.auditExposed(service, begin, end)
		},
	}
	f := c.Flags()
	f.StringVar(&service, "service", "", "blkback, emulator, store or vtpm")
	f.StringVar(&from, "from", "", "the first moment")
	f.StringVar(&to, "to", "now", "the last moment")
	return c
}

// parseMoment reads a time as the flags give it.
func parseMoment(s string, now time.Time) (time.Time, error) {
	if s == "now" {
		return now, nil
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	for _, layout := range []string{time.DateTime, "2006-01-02 15:04", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is no time: use 2026-01-02T03:04:05Z, \"2026-01-02 03:04\", 24h or now", s)
}

func (a *app) auditExposed(service string, from, to time.Time) error {
	dir := filepath.Join(a.stateDir, audit.Dir)
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("audit: %w: no log: name the state directory with --state-dir", err)
	}
	all, err := audit.Exposed(audit.Records(dir), service, from, to)
	if err != nil {
		return fmt.Errorf("%w: see `redoubt audit verify`", err)
	}
	list := []exposureJSON{}
	for _, e := range all {
		x := exposureJSON{Guest: e.Guest, Service: service, Instance: e.Instance, Since: e.Since}
		if !e.Until.IsZero() {
			x.Until = &e.Until
		}
		list = append(list, x)
	}
	if a.json {
		return a.printJSON(list)
	}
	w := tabwriter.NewWriter(a.out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "GUEST\tINSTANCE\tSINCE\tUNTIL")
	for _, e := range list {
		until := "-"
		if e.Until != nil {
			until = e.Until.Format(time.RFC3339)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", e.Guest, e.Instance, e.Since.Format(time.RFC3339), until)
	}
	return w.Flush()
}
