// Package cli is the operator's command line. Every command talks to the outer API only, save
// those that have nothing to talk to or must not depend on it: up, down, doctor, disk, image, audit, and inspect of a dump.
//
// Exit status: 0 done, 1 failed, 2 the command line or the spec is wrong. An error is one line
// on standard error: what failed, on what, why, and where there is one the mend.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"redoubt.dev/redoubt/api"
	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/version"
)

// app is what the commands share.
type app struct {
	runDir   string
	stateDir string
	tenant   string
	json     bool
	in       io.Reader
	out      io.Writer
	err      io.Writer
}

// exitError ends the program with a status and no further word.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// Main runs the command line and returns the exit status. The first signal has a command end in order, the next one ends the
// process: not all that a command waits for can be told of the first.
func Main(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	a := &app{in: os.Stdin, out: os.Stdout, err: os.Stderr}
	return a.main(ctx, args)
}

func (a *app) main(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(args)
	return a.end(ctx, root.ExecuteContext(ctx))
}

// end says an error, and is the exit status.
func (a *app) end(ctx context.Context, err error) int {
	var exit exitError
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return int(exit)
	case ctx.Err() != nil:
		return 130
	}
	fmt.Fprintf(a.err, "redoubt: %s\n", oneLine(a.explain(err)))
	if errors.As(err, &usage) || connect.CodeOf(err) == connect.CodeInvalidArgument {
		return 2
	}
	return 1
}

// oneLine is text as one line, which says nothing to the terminal: an error may hold what an emulator or a guest has said.
func oneLine(s string) string { return printable(strings.Join(strings.Fields(s), " ")) }

// explain says an API error as a person would.
func (a *app) explain(err error) string {
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return err.Error()
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		if a.tenant != services.DefaultTenant {
			switch pid, err := a.running(); {
			case err == nil && pid != 0:
				return fmt.Sprintf("there is no tenant %q: make it with `redoubt tenant set %s`", a.tenant, a.tenant)
			case errors.Is(err, os.ErrPermission): // only root can tell
				return fmt.Sprintf("there is no tenant %q, or Redoubt does not run on %s: ask root", a.tenant, a.runDir)
			}
		}
		return fmt.Sprintf("Redoubt does not run on %s: start it with `redoubt up`", a.runDir)
	}
	if errors.Is(err, unix.EACCES) {
		return fmt.Sprintf("%s: permission denied: run as root", services.APIPath(a.runDir, a.tenant))
	}
	if errors.Is(err, unix.EPIPE) { // nobody took the request
		return fmt.Sprintf("tenant %s's toolstack does not serve: see the log in %s", a.tenant, filepath.Join(a.runDir, services.LogDir))
	}
	if api.Replaced(err) {
		return "Redoubt's services were replaced over this: see `redoubt ps --all`, and ask again"
	}
	return ce.Message()
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "redoubt",
		Short:         "Trusted virtual machines: own TPM, measured and attested from the first instruction",
		Version:       version.Number,
		SilenceUsage:  true,
		SilenceErrors: true,
		Example: `  redoubt up
  redoubt run guest.yaml
  redoubt attest web-1
  redoubt console web-1`,
	}
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		if args := c.Flags().Args(); c.HasSubCommands() && len(args) > 0 {
			if err := c.ValidateArgs(args); err != nil { // the flag is that of a command that was mistyped
				return err
			}
		}
		return usagef("%v: see `%s --help`", err, c.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVar(&a.runDir, "run-dir", env("REDOUBT_RUN_DIR", "/run/redoubt"), "run directory (or $REDOUBT_RUN_DIR)")
	f.StringVar(&a.stateDir, "state-dir", env("REDOUBT_STATE_DIR", "/var/lib/redoubt"), "state directory (or $REDOUBT_STATE_DIR)")
	f.StringVar(&a.tenant, "tenant", env("REDOUBT_TENANT", services.DefaultTenant), "whose guests (or $REDOUBT_TENANT)")
	f.BoolVar(&a.json, "json", false, "print JSON")
	root.AddCommand(a.upCommand(), a.downCommand(), a.doctorCommand(), a.servicesCommand(), a.resetCommand(), a.runCommand(), a.psCommand(),
		a.showCommand(), a.consoleCommand(), a.logsCommand(), a.stopCommand(), a.rmCommand(),
		a.attestCommand(), a.inspectCommand(), a.modulesCommand(), a.validateCommand(), a.baselineCommand(), a.eventsCommand(), a.diskCommand(), a.imageCommand(), a.auditCommand(), a.tenantCommand())
	root.AddCommand(a.controlCommands()...)
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	usages(root)
	return root
}

func env(key, fallback string) string {
	if v := os.Getenv(key); v != "" {
		return v
	}
	return fallback
}

func (a *app) client() redoubtv1connect.GuestServiceClient {
	return api.Dial(services.APIPath(a.runDir, a.tenant))
}

// printJSON prints one value.
func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// isTerminal reports whether progress can be shown.
func (a *app) isTerminal() bool {
	f, ok := a.err.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// progress shows what a long command is doing, on a terminal only.
func (a *app) progress(format string, args ...any) {
	if a.isTerminal() && !a.json {
		fmt.Fprintf(a.err, "\r\x1b[K"+format, args...)
	}
}

func (a *app) progressEnd() { a.progress("") }
