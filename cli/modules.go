package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/policy"
)

func (a *app) modulesCommand() *cobra.Command {
	var learned bool
	c := &cobra.Command{
		Use:   "modules NAME",
		Short: "Say what the isolated modules of a guest's kernel have done",
		Long: `Says, of each module that a running guest's kernel has loaded since it booted, what became of it and what crossed the
border around it: the functions of it that the kernel called, the functions that it called, what it wrote of the kernel's
data, what was refused; and what the kernel's view and the module's allow on the memory of both (r, w, x; - for what they do
not); then the last events, of which ` + "`redoubt events`" + ` has the first. The guest's spec has a section
modules (` + "`redoubt run --modules`" + `).

With --learned it prints the profiles of the isolated modules, with what they have learnt where the guest runs with
modules.mode learn: a file for modules.profile. They end with the guest.`,
		Example: `  redoubt modules web-1
  redoubt modules web-1 --json
  redoubt run --name web-1 --kernel vmlinuz --modules isolate --modules-mode learn
  redoubt modules web-1 --learned > profile.yaml
  redoubt stop web-1
  redoubt run --name web-1 --kernel vmlinuz --modules isolate --modules-profile profile.yaml`,
		Args: names(1, "a guest's name"),
		RunE: func(c *cobra.Command, args []string) error { return a.modules(c.Context(), args[0], learned) },
	}
	c.Flags().BoolVar(&learned, "learned", false, "print the modules' profiles (YAML)")
	return c
}

func (a *app) modules(ctx context.Context, name string, learned bool) error {
	res, err := a.client().Modules(ctx, &v1.ModulesRequest{Name: name})
	if err != nil {
		return err
	}
	var r isolate.Report
	if err := json.Unmarshal(res.Report, &r); err != nil {
		return fmt.Errorf("modules: the report: %w", err)
	}
	switch {
	case learned && len(r.Profiles) == 0:
		return errors.New("modules: no module is isolated, so that there is no profile")
	case learned && a.json:
		return a.printJSON(r.Profiles)
	case learned:
		return policy.Write(a.out, r.Profiles)
	case a.json:
		return a.printJSON(r)
	}
	return a.printReport(&r)
}

func (a *app) printReport(r *isolate.Report) error {
	p := &printer{w: tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)}
	p.line("MODULE\tVERDICT\tSTATE\tPAGES\tENTRIES\tCALLS\tREADS\tWRITES\tREFUSED")
	all := slices.Sorted(maps.Keys(r.Modules))
	for _, name := range all {
		m := r.Modules[name]
		state := "loaded"
		switch {
		case m.Verdict == isolate.Refuse:
			state = "refused"
		case m.Unloaded:
			state = "unloaded"
		}
		p.line("%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d", printable(name), printable(string(m.Verdict)), state, m.Pages,
			sum(m.Entries), sum(m.Calls), m.Reads, sum(m.Writes), m.Refused)
	}
	head := "\nMODULE\tMEMORY\tPAGES\tKERNEL'S VIEW\tMODULE'S VIEW\tFROM\tTO"
	for _, name := range all {
		for _, m := range r.Modules[name].Permissions {
			if head != "" {
				p.line("%s", head)
				head = ""
			}
			own, from, to := m.Module, "", ""
			if m.Judged {
				own += ", writes judged"
			}
			if m.From != 0 {
				from, to = fmt.Sprintf("%#x", m.From), fmt.Sprintf("%#x", m.To)
			}
			p.line("%s\t%s\t%d\t%s\t%s\t%s\t%s", printable(name), printable(m.What), m.Pages, printable(m.Kernel), printable(own), from, to)
		}
	}
	head = "\nMODULE\tWHAT\tSYMBOL\tTIMES"
	for _, name := range all {
		m := r.Modules[name]
		for _, kind := range []struct {
			what  string
			times map[string]uint64
		}{{"entry", m.Entries}, {"call", m.Calls}, {"write", m.Writes}} {
			for _, symbol := range most(kind.times) {
				if head != "" {
					p.line("%s", head)
					head = ""
				}
				p.line("%s\t%s\t%s\t%d", printable(name), kind.what, printable(symbol), kind.times[symbol])
			}
		}
	}
	if len(r.Events) > 0 {
		p.line("\nLAST EVENTS")
	}
	for _, e := range r.Events {
		what := "allowed"
		if !e.Allowed {
			what = "refused"
		}
		p.line("%s\t%s", what, printable(e.String()))
	}
	if p.err != nil {
		return p.err
	}
	return p.w.Flush()
}

func sum(times map[string]uint64) (n uint64) {
	for _, t := range times {
		n += t
	}
	return n
}

// most are the names, those that occurred most often first.
func most(times map[string]uint64) []string {
	return slices.SortedFunc(maps.Keys(times), func(a, b string) int {
		return cmp.Or(cmp.Compare(times[b], times[a]), cmp.Compare(a, b))
	})
}
