package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/answer"
	"redoubt.dev/redoubt/services/protocol"
)

// serviceReport is a process, what is declared for it and what is in force.
type serviceReport struct {
	protocol.RunningService
	InForce     *sandbox.State `json:"inForce,omitempty"` // none if it has ended meanwhile
	Differences []string       `json:"differences,omitempty"`
}

func (a *app) servicesCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "services",
		Short: "List the services' processes and whether their sandboxes are as declared",
		Long: `Lists the processes of all services with what the kernel says is in force for each, and holds
that against what the table of services declares (docs/SERVICES-TABLE.md). The exit status is 1 where
anything differs. Lists of system calls and Landlock rules are in force or not; the kernel does not tell
what is in them.`,
		Example: "  sudo redoubt services\n  sudo redoubt services --json | jq '.[] | select(.differences)'",
		Args:    names(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			all, err := a.services(c.Context())
			if err != nil {
				return err
			}
			bad := false
			for _, s := range all {
				bad = bad || len(s.Differences) > 0
			}
			if a.json {
				err = a.printJSON(all)
			} else {
				err = a.printServices(all)
			}
			if err == nil && bad {
				err = exitError(1)
			}
			return err
		},
	}
}

func (a *app) resetCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reset SERVICE [GUEST]",
		Short: "Replace a service's processes under their guests, now",
		Long: `Replaces the processes of a service, those of all guests or of one, as the timer of
` + "`redoubt up --reset`" + ` does. Guests see a pause of milliseconds. A toolstack and a
netback are those of all guests of a tenant. With the builder all services are replaced but
emulators and TPMs; consoles that are attached end, and commands that are under way are made again.

GUEST is one of --tenant's; TENANT.GUEST, as ` + "`redoubt services`" + ` names it, is one of that tenant's.`,
		Example: "  sudo redoubt reset blkback\n  sudo redoubt reset blkback web1\n  sudo redoubt --tenant acme reset blkback web1    # the same as acme.web1\n  sudo redoubt reset netback\n  sudo redoubt reset builder",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 1 || len(args) > 2 {
				return usagef("reset: give a service and at most one guest: see `redoubt reset --help`")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			in := protocol.Reset{Service: args[0]}
			if len(args) == 2 {
				in.Guest = args[1]
				if !strings.Contains(in.Guest, ".") { // the Builder knows guests by their names on this host
					in.Guest = services.GuestName(a.tenant, in.Guest)
				}
			}
			var done protocol.ResetDone
			if err := a.askBuilder(c.Context(), protocol.MethodReset, in, &done); err != nil {
				return fmt.Errorf("reset: %w", err)
			}
			if in.Guest != "" && done.Replaced == 0 {
				return fmt.Errorf("reset: no guest %q with a %s runs", in.Guest, in.Service)
			}
			return a.say(map[string]any{"replaced": done.Replaced}, "%d replaced\n", done.Replaced)
		},
	}
}

// services asks the Builder what runs and the kernel what is in force.
func (a *app) services(ctx context.Context) ([]serviceReport, error) {
	var running []protocol.RunningService
	if err := a.askBuilder(ctx, protocol.MethodServices, struct{}{}, &running); err != nil {
		return nil, fmt.Errorf("services: %w", err)
	}
	all := make([]serviceReport, len(running))
	for i, r := range running {
		all[i].RunningService = r
		now, err := sandbox.Observe(r.PID)
		switch {
		case errors.Is(err, os.ErrNotExist): // a worker that was replaced, a guest that ended
		case err != nil:
			return nil, fmt.Errorf("services: %s: %w", r.Label, err)
		default:
			all[i].InForce, all[i].Differences = &now, r.Declared.Differences(now)
		}
	}
	return all, nil
}

// askBuilder makes a call on the Builder's own socket, which is root's alone; again, where a Builder is
// replaced over it. All that a Builder is asked may be carried out twice.
func (a *app) askBuilder(ctx context.Context, method string, in, out any) error {
	for range maxBuilders {
		err := a.askOnce(ctx, method, in, out)
		if !errors.Is(err, rpc.ErrGone) {
			return err
		}
		if r, ok := in.(protocol.Reset); ok && r.Service == services.Builder {
			// That was the answer. The next one's is that it serves.
			if done, ok := out.(*protocol.ResetDone); ok {
				done.Replaced = 1
			}
			method, in, out = protocol.MethodServices, struct{}{}, &[]protocol.RunningService{}
		}
	}
	return errors.New("the Builder dies again and again: see the services' log")
}

// maxBuilders may die over a call.
const maxBuilders = 8

func (a *app) askOnce(ctx context.Context, method string, in, out any) error {
	path := filepath.Join(a.runDir, services.AdminSocket)
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	switch {
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s is root's alone: use sudo", path)
	case err != nil:
		return fmt.Errorf("nothing runs on %s: start it with `redoubt up`", a.runDir)
	}
	f, err := c.File()
	err = errors.Join(err, c.Close())
	if err != nil {
		return err
	}
	conn, err := ipc.FromFile(f)
	if err != nil {
		return err
	}
	peer := rpc.New(conn, nil)
	done := make(chan struct{})
	go func() { // ends with Close
		defer close(done)
		_ = peer.Run(context.Background())
	}()
	var long protocol.Answered
	into := out
	if method == protocol.MethodServices {
		into = &long
	}
	files, err := peer.Call(ctx, method, in, into)
	_ = peer.Close()
	<-done
	defer ipc.CloseAll(files)
	if err != nil || into == out {
		return err
	}
	b, _, err := answer.Read(files, long)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, out)
}

func (a *app) printServices(all []serviceReport) error {
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PROCESS\tPID\tUSER\tHOST'S NAMESPACES\tCAPABILITIES\tMEMORY\tSANDBOX")
	for _, s := range all {
		state := "as declared"
		if len(s.Differences) > 0 {
			state = "DIFFERS"
		}
		if s.InForce == nil {
			fmt.Fprintf(w, "%s\t%d\t\t\t\t\tended\n", s.Label, s.PID)
			continue
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%s\t%s\t%s\n", s.Label, s.PID, s.InForce.UID, shared(*s.InForce), capabilities(*s.InForce), mebibytes(s.InForce.Memory), state)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, s := range all {
		for _, d := range s.Differences {
			fmt.Fprintf(a.out, "%s: %s\n", s.Label, d)
		}
	}
	return nil
}

// shared are the namespaces that are the host's.
func shared(s sandbox.State) string {
	own := map[sandbox.Namespace]bool{}
	for _, n := range s.Own {
		own[n] = true
	}
	var out []string
	for _, n := range sandbox.Namespaces() {
		if !own[n] {
			out = append(out, string(n))
		}
	}
	if out == nil {
		return "none"
	}
	return strings.Join(out, ",")
}

func capabilities(s sandbox.State) string {
	var out []string
	for _, c := range s.Capabilities {
		out = append(out, c.String())
	}
	if out == nil {
		return "none"
	}
	return strings.Join(out, ",")
}

func mebibytes(n uint64) string {
	if n == 0 {
		return "no limit"
	}
	return fmt.Sprintf("%d MiB", n>>20)
}
