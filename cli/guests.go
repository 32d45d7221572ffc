package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/spec"
)

// defaultGrace is how long a guest may take to power off.
const defaultGrace = 30 * time.Second

func (a *app) runCommand() *cobra.Command {
	var g spec.Guest
	var emulator, memory, firmware string
	var disks, nics []string
	var modules spec.Modules
	var verdict, mode, response string
	var wait bool
	var req v1.RunRequest
	var delay, poll time.Duration
	c := &cobra.Command{
		Use:   "run [SPEC.yaml | NAME]",
		Short: "Create a guest and start it, or start a stopped one",
		Long: `Creates the guest that the spec describes (a YAML file, its name with a dot or a slash; "-"
for standard input; or flags) and starts it; or starts the stopped guest of that name. It returns when the guest's kernel
runs; with --wait when its vTPM is ready too. A guest that runs with the same spec already is
left as it is.

The spec's schema is docs/guest.schema.json.`,
		Example: `  redoubt run web-1.yaml
  redoubt run --name web-1 --kernel /boot/vmlinuz --initrd /boot/initrd.img --cmdline "console=ttyS0 root=/dev/vda1" --disk web-1.img
  redoubt run --name web-2 --kernel vmlinuz --disk path=web-2.img,base=debian.img
  redoubt run --name web-2 --kernel vmlinuz --initrd initrd.img --nic vlan=10,address=192.0.2.2
  redoubt run --name web-3 --kernel vmlinuz --initrd initrd.img --modules isolate --modules-mode learn
  redoubt run web-1 --wait`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 1 {
				if err := specFlags(c); err != nil {
					return err
				}
			}
			g.Emulator, g.Boot.Firmware = spec.Emulator(emulator), spec.Firmware(firmware)
			for _, text := range disks {
				d, err := parseDisk(text)
				if err != nil {
					return err
				}
				g.Disks = append(g.Disks, d)
			}
			for _, text := range nics {
				n, err := spec.ParseNIC(text)
				if err != nil {
					return usagef("--nic: %v", err)
				}
				g.NICs = append(g.NICs, n)
			}
			if memory != "" {
				m, err := spec.ParseSize(memory)
				if err != nil {
					return usagef("--memory: %v", err)
				}
				g.Memory = m
			}
			modules.Default, modules.Mode = spec.Verdict(verdict), spec.ModuleMode(mode)
			modules.Response = spec.ModuleResponse(response)
			for _, name := range []string{"modules", "modules-mode", "modules-response", "modules-trusted", "modules-profile"} {
				if c.Flags().Changed(name) { // also to nothing, which is the default
					g.Modules = &modules
				}
			}
			var err error
			if req.UnsafeVtpmDelayMs, err = milliseconds("unsafe-vtpm-delay", delay); err != nil {
				return err
			}
			if req.UnsafePollMs, err = milliseconds("unsafe-poll", poll); err != nil {
				return err
			}
			if err := a.fillRequest(&req, args, &g, input{c.Context(), c.InOrStdin()}); err != nil {
				return err
			}
			return a.run(c.Context(), &req, wait)
		},
	}
	f := c.Flags()
	f.StringVar(&g.Name, "name", "", "name of the guest, instead of a spec")
	f.StringVar(&emulator, "emulator", "", "auto, native or qemu")
	f.IntVar(&g.CPUs, "cpus", 0, "1 to 8")
	f.StringVar(&memory, "memory", "", "such as 512MiB")
	f.StringVar(&g.Boot.Kernel, "kernel", "", "bzImage to boot")
	f.StringVar(&g.Boot.Initrd, "initrd", "", "initial RAM file system")
	f.StringVar(&g.Boot.Cmdline, "cmdline", "", "kernel command line")
	f.StringVar(&firmware, "firmware", "", "seabios or ovmf: boot the first disk through firmware")
	f.StringArrayVar(&disks, "disk", nil, "raw image, PATH or PATH:ro; or an overlay, path=PATH,base=PATH[,ro] (repeatable)")
	f.StringArrayVar(&nics, "nic", nil, "network device, such as vlan=10,mac=02:00:00:00:00:01,address=192.0.2.1 (repeatable; each part may be left out, address repeated)")
	f.StringVar(&verdict, "modules", "", "isolate the kernel's modules: isolate, trust or refuse those that are not trusted")
	f.StringVar(&mode, "modules-mode", "", "what is done about what a module's profile does not allow: monitor, learn or enforce")
	f.StringVar(&response, "modules-response", "", "what follows what a module was refused: refuse (nothing more) or pause (until redoubt resume)")
	f.StringSliceVar(&modules.Trusted, "modules-trusted", nil, "modules that are not isolated if their signature is valid, by name")
	f.StringVar(&modules.Profile, "modules-profile", "", "file with what isolated modules may do, as redoubt modules --learned prints it")
	f.BoolVar(&g.TPM.Disabled, "no-tpm", false, "start without a TPM")
	f.BoolVar(&wait, "wait", false, "return when the vTPM is ready")
	f.BoolVar(&req.UnsafeNoGate, "unsafe-no-gate", false, "do not gate the guest's first TPM access; it may lose its trust (for comparison only)")
	f.DurationVar(&delay, "unsafe-vtpm-delay", 0, "start the vTPM that much later (for tests only)")
	f.BoolVar(&req.UnsafeVtpmFirst, "unsafe-vtpm-first", false, "start the guest only when its vTPM is ready (for comparison only)")
	f.DurationVar(&poll, "unsafe-poll", 0, "wake the guest only at multiples of this (for comparison only)")
	for _, n := range []string{"unsafe-vtpm-delay", "unsafe-vtpm-first", "unsafe-poll"} {
		_ = f.MarkHidden(n)
	}
	return c
}

// guestFlags are those flags of run that say what a guest is.
var guestFlags = []string{
	"name", "emulator", "cpus", "memory", "kernel", "initrd", "cmdline", "firmware", "disk", "nic", "no-tpm",
	"modules", "modules-mode", "modules-response", "modules-trusted", "modules-profile",
}

// specFlags refuses them beside a spec or a guest that is there: passed over, the guest would run without what they say.
func specFlags(c *cobra.Command) error {
	if c.Flags().Changed("name") {
		return usagef("run: give a spec or --name, not both")
	}
	for _, name := range guestFlags {
		if c.Flags().Changed(name) {
			return usagef("run: --%s goes with --name: beside a spec or a guest's name, say it in the spec", name)
		}
	}
	return nil
}

// parseDisk reads --disk: PATH, PATH:ro, or path=PATH,base=PATH[,ro], whose paths hold no comma.
func parseDisk(text string) (d spec.Disk, err error) {
	if !strings.HasPrefix(text, "path=") {
		d.Path, d.ReadOnly = strings.CutSuffix(text, ":ro")
		return d, nil
	}
	for item := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(item, "=")
		switch {
		case key == "path" && d.Path == "" && value != "":
			d.Path = value
		case key == "base" && d.Base == "" && value != "":
			d.Base = value
		case item == "ro":
			d.ReadOnly = true
		default:
			return d, usagef("--disk %s: %q: use path=PATH, base=PATH and ro, each once", text, item)
		}
	}
	return d, nil
}

// fillRequest makes the request from a spec file, a name, or the flags' guest. Paths in it
// are made absolute: they are the caller's, not the service's.
func (a *app) fillRequest(req *v1.RunRequest, args []string, flags *spec.Guest, stdin io.Reader) error {
	switch {
	case len(args) == 0 && flags.Name == "":
		return usagef("run: give a spec file, a guest's name, or --name and --kernel: see `redoubt run --help`")
	case len(args) == 0:
		return encodeSpec(req, flags, "")
	}
	arg := args[0]
	// A name holds neither a dot nor a slash: what looks like one is one, whatever files are here.
	if spec.ValidName(arg) {
		req.Name = arg
		return nil
	}
	in := stdin
	base := ""
	if arg != "-" {
		f, err := os.Open(arg)
		if err != nil {
			return usagef("run: %v", err)
		}
		defer f.Close()
		in, base = f, filepath.Dir(arg)
	}
	g, err := spec.Parse(in)
	if err != nil {
		return usagef("%s: %v", arg, err)
	}
	return encodeSpec(req, g, base)
}

func encodeSpec(req *v1.RunRequest, g *spec.Guest, base string) error {
	if err := g.Complete(); err != nil {
		return usagef("run: %v", err)
	}
	paths := []*string{&g.Boot.Kernel, &g.Boot.Initrd}
	if g.Modules != nil {
		paths = append(paths, &g.Modules.Profile)
	}
	for i := range g.Disks {
		paths = append(paths, &g.Disks[i].Path, &g.Disks[i].Base)
	}
	for _, p := range paths {
		if *p == "" {
			continue
		}
		if !filepath.IsAbs(*p) {
			*p = filepath.Join(base, *p)
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		// Redoubt follows no links in names it is given: what they lead to is settled here.
		if file, err := filepath.EvalSymlinks(abs); err == nil {
			abs = file
		}
		*p = abs
	}
	b, err := yaml.Marshal(g)
	req.Spec = string(b)
	return err
}

func (a *app) run(ctx context.Context, req *v1.RunRequest, wait bool) error {
	c := a.client()
	a.progress("starting the guest")
	defer a.progressEnd()
	res, err := c.Run(ctx, req)
	if err != nil {
		return err
	}
	g := res.Guest
	if wait {
		if g, err = a.waitReady(ctx, g.Name); err != nil {
			return err
		}
	}
	a.progressEnd()
	if a.json {
		return a.printGuest(g)
	}
	_, err = fmt.Fprintf(a.out, "guest %s is %s (%s, domain %d)\n", g.Name, stateName(g.State), g.Emulator, g.Domain)
	return err
}

// waitReady follows a guest's events until it runs or is down, whoever serves them.
func (a *app) waitReady(ctx context.Context, name string) (*v1.Guest, error) {
	for {
		g, err := a.waitOnce(ctx, name)
		if g != nil || !ended(ctx, err) {
			return g, err
		}
	}
}

// waitOnce is one stream of waitReady's: it asks what the guest is before it waits for the next event, so that none is missed.
// There is neither a guest nor an error where the stream ended in order.
func (a *app) waitOnce(ctx context.Context, name string) (*v1.Guest, error) {
	c := a.client()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, err := c.Events(ctx, &v1.EventsRequest{Name: name, Follow: true})
	if err != nil {
		return nil, err
	}
	defer func() { _ = events.Close() }()
	for {
		res, err := c.Get(ctx, &v1.GetRequest{Name: name})
		if err != nil {
			return nil, err
		}
		switch {
		case res.Guest.State == v1.State_STATE_RUNNING:
			return res.Guest, nil
		case down(res.Guest):
			return nil, fmt.Errorf("guest %s is %s: %s", name, stateName(res.Guest.State), res.Guest.Reason)
		}
		if !events.Receive() {
			return nil, cmp.Or(events.Err(), ctx.Err())
		}
		a.progress("%s: %s", name, printable(events.Msg().Event.Kind))
	}
}

// down says of a guest that it does not run.
func down(g *v1.Guest) bool {
	return g.State == v1.State_STATE_STOPPED || g.State == v1.State_STATE_FAILED
}

func stateName(s v1.State) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "STATE_"))
}

// guestJSON is a guest as --json prints it.
type guestJSON struct {
	Name         string          `json:"name"`
	UUID         string          `json:"uuid"`
	State        string          `json:"state"`
	Reason       string          `json:"reason,omitempty"`
	Emulator     string          `json:"emulator,omitempty"`
	Domain       uint32          `json:"domain,omitempty"`
	Starts       uint32          `json:"starts"`
	VTPMInstance uint32          `json:"vtpmInstance,omitempty"`
	EKSHA256     string          `json:"ekSHA256,omitempty"`
	Spec         json.RawMessage `json:"spec"`
	Timeline     []eventJSON     `json:"timeline,omitempty"`
}

type eventJSON struct {
	Time  time.Time `json:"time"`
	Guest string    `json:"guest"`
	Kind  string    `json:"kind"`
	Text  string    `json:"text,omitempty"`
}

func toJSON(g *v1.Guest) guestJSON {
	j := guestJSON{
		Name: g.Name, UUID: g.Uuid, State: stateName(g.State), Reason: g.Reason, Emulator: g.Emulator,
		Domain: g.Domain, Starts: g.Starts, VTPMInstance: g.VtpmInstance, EKSHA256: g.EkSha256,
		Spec: json.RawMessage(g.SpecJson),
	}
	for _, e := range g.Timeline {
		j.Timeline = append(j.Timeline, eventToJSON(e))
	}
	return j
}

func eventToJSON(e *v1.Event) eventJSON {
	return eventJSON{time.Unix(0, e.TimeUnixNano), e.Guest, e.Kind, e.Text}
}

func (a *app) printGuest(g *v1.Guest) error { return a.printJSON(toJSON(g)) }

func (a *app) psCommand() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:     "ps",
		Short:   "List guests",
		Example: "  redoubt ps\n  redoubt ps --all --json",
		Args:    names(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			res, err := a.client().List(c.Context(), &v1.ListRequest{})
			if err != nil {
				return err
			}
			list := []guestJSON{}
			for _, g := range res.Guests {
				if all || !down(g) {
					list = append(list, toJSON(g))
				}
			}
			if a.json {
				return a.printJSON(list)
			}
			w := tabwriter.NewWriter(a.out, 0, 0, 3, ' ', 0)
			fmt.Fprintln(w, "NAME\tSTATE\tEMULATOR\tDOMAIN\tREASON")
			for _, g := range list {
				fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", g.Name, g.State, g.Emulator, g.Domain, printable(g.Reason))
			}
			return w.Flush()
		},
	}
	c.Flags().BoolVarP(&all, "all", "a", false, "guests that are down too")
	return c
}

func (a *app) showCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "show NAME",
		Short:   "Show a guest and the timeline of its start",
		Long:    "Shows a guest and its last start as a timeline. When its first program starts is read off the\nconsole: a kernel booted with `quiet` does not tell.",
		Example: "  redoubt show web-1\n  redoubt show web-1 --json",
		Args:    names(1, "a guest's name"),
		RunE: func(c *cobra.Command, args []string) error {
			res, err := a.client().Get(c.Context(), &v1.GetRequest{Name: args[0]})
			if err != nil {
				return err
			}
			if a.json {
				return a.printGuest(res.Guest)
			}
			return a.show(res.Guest)
		},
	}
}

// moments are what events are called in a timeline.
var moments = map[string]string{
	"requested": "requested", "kernel-started": "kernel started", "vtpm-asked": "vTPM asked for",
	"vtpm-started": "vTPM answered INIT", "vtpm-ready": "vTPM ready: gate open", "tpm-first-access": "first TPM access",
	"gate-wait": "gate: the guest waits", "gate-waited": "gate: the guest went on", "paused": "paused",
	"ima": "IMA measured boot_aggregate", "init": "init started", "manufactured": "vTPM keys made: attestable",
	"reboot": "reboot", "module": "module", "ended": "ended",
}

// moment says an event in a timeline's words.
func moment(e *v1.Event) string {
	what := moments[e.Kind]
	if what == "" {
		what = printable(e.Kind)
	}
	if e.Text != "" {
		what += " (" + printable(e.Text) + ")"
	}
	return what
}

func (a *app) show(g *v1.Guest) error {
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	row := func(k, format string, v ...any) { fmt.Fprintf(w, "%s\t%s\n", k, fmt.Sprintf(format, v...)) }
	row("name", "%s", g.Name)
	row("state", "%s", stateName(g.State))
	if g.Reason != "" {
		row("reason", "%s", printable(g.Reason))
	}
	row("uuid", "%s", g.Uuid)
	if g.Emulator != "" {
		row("emulator", "%s", g.Emulator)
	}
	if g.EkSha256 != "" {
		row("vTPM", "instance %d, EK sha256:%s", g.VtpmInstance, g.EkSha256)
	}
	if len(g.Timeline) > 0 {
		fmt.Fprintln(w, "start\t")
		t0 := g.Timeline[0].TimeUnixNano
		for _, e := range g.Timeline {
			row("", "%9.3f s  %s", float64(e.TimeUnixNano-t0)/1e9, moment(e))
		}
	}
	return w.Flush()
}

func (a *app) stopCommand() *cobra.Command {
	var grace time.Duration
	c := &cobra.Command{
		Use:     "stop NAME",
		Short:   "Press a guest's power button, then insist",
		Long:    "Presses the power button and, when the grace period is over, ends the guest without its help.\nIt returns when the guest is down; one that is down already is no error.",
		Example: "  redoubt stop web-1\n  redoubt stop web-1 --grace 2m\n  redoubt stop web-1 --grace 0s",
		Args:    names(1, "a guest's name"),
		RunE: func(c *cobra.Command, args []string) error {
			ms, err := milliseconds("grace", grace)
			if err != nil {
				return err
			}
			a.progress("stopping %s", args[0])
			defer a.progressEnd()
			res, err := a.client().Stop(c.Context(), &v1.StopRequest{Name: args[0], GraceMs: ms})
			if err != nil {
				return err
			}
			a.progressEnd()
			if a.json {
				return a.printGuest(res.Guest)
			}
			_, err = fmt.Fprintf(a.out, "guest %s is %s: %s\n", args[0], stateName(res.Guest.State), printable(res.Guest.Reason))
			return err
		},
	}
	c.Flags().DurationVar(&grace, "grace", defaultGrace, "how long the guest may take; 0s: at once")
	return c
}

func (a *app) rmCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "rm NAME",
		Short:   "Forget a stopped guest and destroy its vTPM",
		Long:    "Forgets a stopped guest and destroys its vTPM: what is sealed to it can never be opened again.\nIts disks stay.",
		Example: "  redoubt rm web-1",
		Args:    names(1, "a guest's name"),
		RunE: func(c *cobra.Command, args []string) error {
			if _, err := a.client().Remove(c.Context(), &v1.RemoveRequest{Name: args[0]}); err != nil {
				return err
			}
			return a.say(map[string]any{"removed": args[0]}, "guest %s is removed\n", args[0])
		},
	}
}
