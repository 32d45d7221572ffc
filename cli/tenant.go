package cli

import (
	"context"
	"fmt"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/trust"
)

func (a *app) tenantCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "tenant",
		Short: "Make, change, list and remove tenants",
		Long: `A tenant has guests of its own, which its toolstack acts on and no other tenant's can see. The
tenant "default" is always there. Other commands act on the tenant of --tenant.`,
	}
	c.AddCommand(a.tenantSetCommand(), a.tenantListCommand(), a.tenantRemoveCommand())
	return c
}

func (a *app) tenantSetCommand() *cobra.Command {
	var pool string
	var operators, viewers []string
	c := &cobra.Command{
		Use:   "set NAME",
		Short: "Make a tenant, or change what is given of one",
		Long: `Makes a tenant, or changes what is given of one that is there. Operators may do everything with
its guests, viewers may look; root may do everything. Its guests' kernels and disks must lie beneath its
pool, and no symbolic link leads out of it.`,
		Example: "  sudo redoubt tenant set acme --pool /srv/acme --operator alice --viewer bob\n" +
			"  sudo redoubt tenant set default --operator carol\n  redoubt --tenant acme ps",
		Args: names(1, "the tenant's name"),
		RunE: func(c *cobra.Command, args []string) error {
			var all []trust.Tenant
			if err := a.askBuilder(c.Context(), protocol.MethodTenants, struct{}{}, &all); err != nil {
				return fmt.Errorf("tenant set: %w", err)
			}
			t := trust.Tenant{Name: args[0]}
			for _, x := range all {
				if x.Name == args[0] {
					t = x
				}
			}
			if pool != "" {
				path, err := filepath.Abs(pool)
				if err == nil {
					path, err = filepath.EvalSymlinks(path)
				}
				if err != nil {
					return usagef("tenant set: --pool: %v", err)
				}
				t.Pool = path
			}
			if t.Pool == "" {
				return usagef("tenant set: a new tenant needs a --pool")
			}
			var err error
			if c.Flags().Changed("operator") {
				if t.Operators, err = userIDs(operators); err != nil {
					return usagef("tenant set: --operator: %v", err)
				}
			}
			if c.Flags().Changed("viewer") {
				if t.Viewers, err = userIDs(viewers); err != nil {
					return usagef("tenant set: --viewer: %v", err)
				}
			}
			if err := a.askBuilder(c.Context(), protocol.MethodSetTenant, t, nil); err != nil {
				return fmt.Errorf("tenant set: %w", err)
			}
			if a.json {
				return a.printJSON(t)
			}
			return nil
		},
	}
	c.Flags().StringVar(&pool, "pool", "", "directory beneath which its kernels and disks lie")
	c.Flags().StringSliceVar(&operators, "operator", nil, "user who may do everything: name or number; all of them, in place of those before")
	c.Flags().StringSliceVar(&viewers, "viewer", nil, "user who may look; all of them, in place of those before")
	return c
}

// userIDs are the numbers of users given by name or number.
func userIDs(names []string) ([]uint32, error) {
	out := []uint32{}
	for _, n := range names {
		if n == "" {
			continue
		}
		text := n
		if u, err := user.Lookup(n); err == nil {
			text = u.Uid
		}
		id, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("there is no user %q", n)
		}
		out = append(out, uint32(id))
	}
	return out, nil
}

func (a *app) tenantListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List tenants",
		Example: "  sudo redoubt tenant list --json",
		Args:    names(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			var all []trust.Tenant
			if err := a.askBuilder(c.Context(), protocol.MethodTenants, struct{}{}, &all); err != nil {
				return fmt.Errorf("tenant list: %w", err)
			}
			if a.json {
				return a.printJSON(all)
			}
			w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "TENANT\tPOOL\tOPERATORS\tVIEWERS")
			for _, t := range all {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", t.Name, t.Pool, userNames(t.Operators), userNames(t.Viewers))
			}
			return w.Flush()
		},
	}
}

func userNames(ids []uint32) string {
	var out []string
	for _, id := range ids {
		name := strconv.FormatUint(uint64(id), 10)
		if u, err := user.LookupId(name); err == nil {
			name = u.Username
		}
		out = append(out, name)
	}
	if out == nil {
		return "-"
	}
	return strings.Join(out, ",")
}

func (a *app) tenantRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "rm NAME",
		Short:   "Remove a tenant that has no guests",
		Example: "  sudo redoubt tenant rm acme",
		Args:    names(1, "the tenant's name"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.removeTenant(c.Context(), args[0])
		},
	}
}

func (a *app) removeTenant(ctx context.Context, name string) error {
	if err := a.askBuilder(ctx, protocol.MethodRemoveTenant, trust.Tenant{Name: name}, nil); err != nil {
		return fmt.Errorf("tenant rm: %w", err)
	}
	return a.say(map[string]any{"removed": name}, "tenant %s is removed\n", name)
}
