package cli

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// usageError is the caller's mistake: exit status 2.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// names checks the number of arguments; cobra's own messages do not say the mend.
func names(n int, what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != n {
			return usagef("%s: give %s: see `%s --help`", c.CommandPath(), what, c.CommandPath())
		}
		return nil
	}
}

// usages makes usage errors, for a command and all below it, of what cobra has other words for: of a wrong number of arguments
// plain errors, and of a word that is no command nothing, where there is nothing but commands: it prints help, with status 0.
func usages(c *cobra.Command) {
	for _, below := range c.Commands() {
		usages(below)
	}
	switch {
	case c.HasParent() && c.Parent() == c.Root() && c.Name() == "help": // cobra's own
		c.Args = func(c *cobra.Command, args []string) error {
			of, rest, _ := c.Root().Find(args)
			return noCommand(of, rest)
		}
	case c.HasSubCommands() && !c.Runnable():
		c.Args = noCommand
		c.RunE = func(c *cobra.Command, _ []string) error {
			if !c.HasParent() {
				return c.Help()
			}
			return usagef("%s: give %s: see `%s --help`", c.CommandPath(), commands(c), c.CommandPath())
		}
	}
	check := c.Args
	if check == nil {
		return
	}
	c.Args = func(c *cobra.Command, args []string) error {
		err := check(c, args)
		var usage usageError
		if err == nil || errors.As(err, &usage) {
			return err
		}
		return usagef("%s: %v: see `%s --help`", c.CommandPath(), err, c.CommandPath())
	}
}

// noCommand says that a word where a command should be is none, and which may have been meant.
func noCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	c.SuggestionsMinimumDistance = 2 // cobra's own, where it looks for them itself
	mend := ""
	if like := c.SuggestionsFor(args[0]); len(like) > 0 {
		mend = "did you mean " + either(like) + "? "
	} else if c.HasParent() && c.HasSubCommands() {
		mend = "give " + commands(c) + ": "
	}
	return usagef("%s: no command %q: %ssee `%s --help`", c.CommandPath(), args[0], mend, c.CommandPath())
}

func commands(c *cobra.Command) string {
	var all []string
	for _, below := range c.Commands() {
		if below.IsAvailableCommand() {
			all = append(all, below.Name())
		}
	}
	return either(all)
}

func either(all []string) string {
	last := len(all) - 1
	if last < 1 {
		return strings.Join(all, "")
	}
	return strings.Join(all[:last], ", ") + " or " + all[last]
}

// maxDuration is the longest that the API has numbers for.
const maxDuration = math.MaxUint32 * time.Millisecond

// milliseconds is a flag's duration as the API has it.
func milliseconds(flag string, d time.Duration) (uint32, error) {
	if d < 0 || d > maxDuration {
		return 0, usagef("--%s %v: use 0s to %v", flag, d, maxDuration)
	}
	return uint32(d.Milliseconds()), nil
}
