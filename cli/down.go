package cli

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/api"
	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/pidfd"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/trust"
)

func (a *app) downCommand() *cobra.Command {
	var grace, limit time.Duration
	c := &cobra.Command{
		Use:   "down",
		Short: "Stop all guests and Redoubt's services",
		Long: `Stops every guest, all tenants' (the power button, then, after the grace period, without its help), and
ends the services. It returns when all is down.`,
		Example: "  redoubt down\n  redoubt down --grace 0s --timeout 5s",
		Args:    names(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			ms, err := milliseconds("grace", grace)
			if err == nil {
				_, err = milliseconds("timeout", limit)
			}
			if err == nil && limit == 0 {
				err = usagef("--timeout 0s: nothing ends in no time: use more")
			}
			if err != nil {
				return err
			}
			return a.down(c.Context(), ms, limit)
		},
	}
	c.Flags().DurationVar(&grace, "grace", defaultGrace, "how long guests may take to power off")
	c.Flags().DurationVar(&limit, "timeout", servicesTimeout, "how long the services may take to answer, beside that, and to end")
	return c
}

func (a *app) down(ctx context.Context, graceMs uint32, limit time.Duration) error {
	pid, err := a.running()
	if err != nil {
		return err
	}
	if pid == 0 {
		if err := a.autogroup().turnBack(); err != nil {
			return fmt.Errorf("down: %w", err)
		}
		return a.say(map[string]any{"running": false}, "Redoubt does not run\n")
	}
	supervisor, err := pidfd.Open(pid)
	if err != nil {
		return fmt.Errorf("down: %w", err)
	}
	defer supervisor.Close()
	a.stopAll(ctx, graceMs, limit)
	if err := ctx.Err(); err != nil {
		return err
	}
	a.progress("ending Redoubt's services")
	defer a.progressEnd()
	if err := pidfd.Signal(supervisor, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("down: process %d: %w", pid, err)
	}
	end, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := pidfd.Await(end, supervisor); errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("down: process %d has not ended in %v: see %s, or end all at once with `kill -KILL %d`", pid, limit, filepath.Join(a.runDir, services.LogDir), pid)
	} else if err != nil {
		return err
	}
	a.progressEnd()
	if err := a.autogroup().turnBack(); err != nil {
		return fmt.Errorf("down: all is down, but the host's scheduling is not as it was: %w", err)
	}
	return a.say(map[string]any{"running": false}, "Redoubt is down\n")
}

// stopAll asks all tenants' guests to power off, all at once. What fails here, the Builder's own end
// does without asking; so does what nobody answers in time, as where there is no Builder.
func (a *app) stopAll(ctx context.Context, graceMs uint32, limit time.Duration) {
	s := stopping{a: a, graceMs: graceMs, limit: time.Duration(graceMs)*time.Millisecond + limit}
	ctx, cancel := context.WithTimeout(ctx, s.limit)
	defer cancel()
	var tenants []trust.Tenant
	if err := a.askBuilder(ctx, protocol.MethodTenants, struct{}{}, &tenants); err != nil {
		s.failed(ctx, "guests are not asked to power off", err)
		return
	}
	var all sync.WaitGroup
	for _, t := range tenants {
		all.Go(func() { s.tenant(ctx, t.Name) })
	}
	all.Wait()
}

// stopping is guests that are asked to power off: none waits for another one, nor for another one's tenant.
type stopping struct {
	a       *app
	graceMs uint32
	limit   time.Duration

	mu     sync.Mutex // of what is said
	guests []string
}

func (s *stopping) tenant(ctx context.Context, tenant string) {
	c := api.Dial(services.APIPath(s.a.runDir, tenant))
	list, err := c.List(ctx, &v1.ListRequest{})
	if err != nil {
		s.failed(ctx, fmt.Sprintf("tenant %s's guests are not asked to power off", tenant), err)
		return
	}
	var all sync.WaitGroup
	for _, g := range list.Guests {
		if down(g) {
			continue
		}
		all.Go(func() {
			name := services.GuestName(tenant, g.Name)
			s.begun(name)
			if _, err := c.Stop(ctx, &v1.StopRequest{Name: g.Name, GraceMs: s.graceMs}); err != nil {
				s.failed(ctx, name, err)
			}
		})
	}
	all.Wait()
}

func (s *stopping) begun(guest string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.guests = append(s.guests, guest)
	s.a.progress("stopping %s", strings.Join(s.guests, ", "))
}

func (s *stopping) failed(ctx context.Context, what string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	why := oneLine(s.a.explain(err))
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return // who interrupted it knows
	case ctx.Err() != nil:
		why = fmt.Sprintf("no answer in %v: what is left ends with the services", s.limit)
	}
	s.a.progressEnd()
	fmt.Fprintf(s.a.err, "redoubt: down: %s: %s\n", what, why)
}
