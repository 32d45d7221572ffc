package cli

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode"

	"github.com/spf13/cobra"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/attest/ima"
	"redoubt.dev/redoubt/introspect/inspect"
	"redoubt.dev/redoubt/introspect/integrity"
	"redoubt.dev/redoubt/introspect/memory"
)

// inspectOptions are the flags of inspect.
type inspectOptions struct{ memory, kernel, machine, out string }

func (a *app) inspectCommand() *cobra.Command {
	var o inspectOptions
	c := &cobra.Command{
		Use:   "inspect NAME | --memory FILE --kernel FILE  modules|kernel|ima|tasks ...",
		Short: "Say what a guest's memory says of its kernel",
		Long: `Reads a running guest's memory, with nothing installed in it, and says what its kernel holds:

  modules  the modules of the kernel's list, and what is executable where modules are and is none of theirs
  kernel   where the kernel is, and whether its system-call table, interrupt table and text are its image's
  ima      what the kernel has measured (IMA); ` + "`redoubt attest`" + ` says what that is worth
  tasks    the processes of the kernel's list

The guest runs on meanwhile; it boots by boot.kernel, which says what its kernel is. What it has damaged is
told, and what is not as its image has it; the exit status is 1 then.

With --memory a dump is read instead, without Redoubt running: a copy of a guest's memory, as a file of its
machine's RAM or as an ELF core (QEMU's dump-guest-memory), with the kernel's image that it was booted from.`,
		Example: `  redoubt inspect web-1 modules
  redoubt inspect web-1 kernel tasks --json
  redoubt inspect web-1 ima --out binary_runtime_measurements   # for evmctl ima_measurement
  redoubt inspect --memory web-1.core --kernel vmlinuz modules
  redoubt inspect --memory ram.img --machine native --kernel vmlinuz kernel`,
		RunE: func(c *cobra.Command, args []string) error { return a.inspect(c.Context(), o, args) },
	}
	f := c.Flags()
	f.StringVar(&o.memory, "memory", "", "a dump to read instead of a running guest")
	f.StringVar(&o.kernel, "kernel", "", "with --memory: the image its kernel was booted from (bzImage or vmlinux)")
	f.StringVar(&o.machine, "machine", string(memory.QEMU), "with --memory: how a raw file is laid out around the hole below 4 GiB (native, qemu, flat)")
	f.StringVar(&o.out, "out", "", "write the IMA list to this file, as the kernel does")
	return c
}

func (a *app) inspect(ctx context.Context, o inspectOptions, args []string) error {
	dump := o.memory != ""
	name := ""
	switch {
	case dump != (o.kernel != ""):
		return usagef("inspect: give --memory and --kernel together: the kernel's image says what its memory means")
	case !dump && len(args) < 2, dump && len(args) < 1:
		return usagef("inspect: give a guest's name and what is asked, %s: see `redoubt inspect --help`", strings.Join(inspect.All, ", "))
	case !dump:
		name, args = args[0], args[1:]
	}
	q := inspect.Question{What: args}
	if err := q.Check(); err != nil {
		return usagef("inspect: %v", err)
	}
	if o.out != "" && !slices.Contains(args, inspect.IMA) {
		return usagef("--out: it is for the IMA list: ask for ima")
	}
	var answer *inspect.Answer
	var err error
	if dump {
		answer, err = readDump(o, q)
	} else {
		answer, err = a.askInspector(ctx, name, args)
	}
	if err != nil {
		return err
	}
	if o.out != "" {
		if err := os.WriteFile(o.out, answer.IMA.List, 0o600); err != nil {
			return err
		}
	}
	if a.json {
		err = a.printJSON(answer)
	} else {
		err = a.printAnswer(answer)
	}
	if err == nil && !answer.Sound() {
		err = exitError(1)
	}
	return err
}

func (a *app) askInspector(ctx context.Context, name string, what []string) (*inspect.Answer, error) {
	a.progress("reading %s's memory", name)
	res, err := a.client().Inspect(ctx, &v1.InspectRequest{Name: name, What: what})
	a.progressEnd()
	if err != nil {
		return nil, err
	}
	answer, err := inspect.Decode(res.Answer, res.ImaList)
	if err != nil {
		return nil, fmt.Errorf("inspect: the answer: %w", err)
	}
	for w, there := range map[string]bool{
		inspect.Modules: answer.Modules != nil, inspect.Kernel: answer.Kernel != nil, inspect.IMA: answer.IMA != nil, inspect.Tasks: answer.Tasks != nil,
	} {
		if slices.Contains(what, w) != there {
			return nil, fmt.Errorf("inspect: the answer is to another question than %s", strings.Join(what, ", "))
		}
	}
	return answer, nil
}

// readDump answers from files.
func readDump(o inspectOptions, q inspect.Question) (*inspect.Answer, error) {
	mem, size, err := openFile("--memory", o.memory)
	if err != nil {
		return nil, err
	}
	defer mem.Close()
	kernel, length, err := openFile("--kernel", o.kernel)
	if err != nil {
		return nil, err
	}
	defer kernel.Close()
	p, err := memory.Open(mem, uint64(size), memory.Machine(o.machine))
	if err != nil {
		return nil, usagef("--memory: %s: %v", o.memory, err)
	}
	answer, _, err := inspect.Ask(inspect.Guest{Memory: p, Image: func() ([]byte, error) { return inspect.ReadImage(kernel, length) }}, q)
	if err != nil {
		return nil, fmt.Errorf("inspect: %s: %w (is it of --kernel, and --machine right?)", o.memory, err)
	}
	return answer, nil
}

func openFile(flag, path string) (*os.File, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, usagef("%s: %v", flag, err)
	}
	st, err := f.Stat()
	if err == nil && (!st.Mode().IsRegular() || st.Size() == 0) {
		err = fmt.Errorf("%s: an empty file, or none", path)
	}
	if err != nil {
		f.Close()
		return nil, 0, usagef("%s: %v", flag, err)
	}
	return f, st.Size(), nil
}

// printable keeps what a guest calls its things from writing lines or terminal commands of its own.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// printer prints an answer; the first error stays.
type printer struct {
	w   *tabwriter.Writer
	err error
}

func (p *printer) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}

func (p *printer) damage(text string) {
	if text != "" {
		p.line("damaged: %s", printable(text))
	}
}

func (a *app) printAnswer(x *inspect.Answer) error {
	p := &printer{w: tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)}
	if x.Kernel != nil {
		p.kernel(x.Kernel)
	}
	if x.Modules != nil {
		p.modules(x.Modules)
	}
	if x.Tasks != nil {
		p.tasks(x.Tasks)
	}
	if x.IMA != nil {
		p.ima(x.IMA)
	}
	if p.err != nil {
		return p.err
	}
	return p.w.Flush()
}

func (p *printer) modules(f *inspect.ModuleFacts) {
	p.line("MODULE\tTEXT\tSIZE\tSTATE\tSIGNED")
	for _, m := range f.Modules {
		signed := "–"
		if m.Signed != nil {
			signed = map[bool]string{true: "yes", false: "no"}[*m.Signed]
		}
		p.line("%s\t%#x\t%d\t%s\t%s", printable(m.Name), m.Text, m.Size, m.State, signed)
	}
	for _, c := range f.Unlisted {
		what := "of no module in the list"
		if c.Holds != "" {
			what = c.Holds
		}
		p.line("executable: %d bytes at %#x: %s", c.Size, c.Address, printable(what))
	}
	p.damage(f.Damage)
}

func (p *printer) tasks(f *inspect.TaskFacts) {
	p.line("PID\tPARENT\tUID\tNAME")
	for _, t := range f.Tasks {
		name := printable(t.Name)
		if t.Kernel {
			name = "[" + name + "]"
		}
		if t.Ended {
			name += " (ended)"
		}
		p.line("%d\t%d\t%d\t%s", t.PID, t.Parent, t.UID, name)
	}
	p.damage(f.Damage)
}

func (p *printer) ima(l *ima.List) {
	if l.Missing != "" {
		p.line("no list: %s", printable(l.Missing))
		return
	}
	all, err := ima.Parse(l.List)
	if err != nil && l.Error == "" {
		l.Error = err.Error()
	}
	p.line("ENTRY\tPCR\tTEMPLATE\tMEASURED")
	for i := range all {
		f, err := all[i].File()
		text := f.String()
		switch {
		case err != nil:
			text = err.Error()
		case all[i].Violation():
			text = "(violation: read while it was written)  " + f.Path
		}
		p.line("%d\t%d\t%s\t%s", l.After+i+1, all[i].PCR, printable(all[i].Template), printable(text))
	}
	p.damage(l.Error)
}

func (p *printer) kernel(k *inspect.KernelFacts) {
	p.line("kernel\t%s", printable(k.Version))
	p.line("lies at\t%#x", k.Physical)
	p.line("seen at\t%#x (moved by %#x)", k.Virtual, k.Offset)
	p.line("page tables\t%d levels", k.Levels)
	p.table("system calls", k.SystemCalls)
	p.table("interrupts", k.Interrupts)
	if t := k.Text; t != nil {
		p.line("text\t%d bytes: %d compared, %d checked, %d that the kernel patches not compared", t.Bytes, t.Compared, t.Checked, t.Skipped)
		p.line("\timage   %s", t.Image)
		p.line("\tmemory  %s", t.Memory)
		for _, d := range t.Differences {
			kind := ""
			if d.Kind != "" {
				kind = fmt.Sprintf(" (%s)", d.Kind)
			}
			p.line("differs\t%#x %s%s: %d bytes: %s, not %s", d.Address, printable(d.Symbol), kind, d.Length, d.Got, d.Want)
		}
		if t.More > 0 {
			p.line("\tand %d more", t.More)
		}
	}
	for _, d := range k.Damage {
		p.damage(d)
	}
}

func (p *printer) table(name string, t *integrity.Table) {
	if t == nil {
		return
	}
	p.line("%s\t%d entries, %d lead elsewhere", name, t.Entries, len(t.Hooks))
	for _, h := range t.Hooks {
		to := fmt.Sprintf("%#x", h.Target)
		if h.Symbol != "" {
			to += " (" + printable(h.Symbol) + ")"
		}
		p.line("hook\tentry %d leads to %s, not to %s", h.Entry, to, printable(h.Want))
	}
}
