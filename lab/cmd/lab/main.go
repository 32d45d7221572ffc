// Command lab fetches what tests need and runs commands in the nested test machine.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:]))
}

func run(ctx context.Context, args []string) int {
	if len(args) == 1 && args[0] == "fetch" {
		_, err := debian.Fetch(ctx, os.Stderr)
		if errors.Is(err, debian.ErrUnsupported) {
			fmt.Fprintf(os.Stderr, "lab: %v; needed:\n%s", err, debian.List())
			return 2
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "lab:", err)
			return 1
		}
		return 0
	}
	fmt.Fprintln(os.Stderr, "usage: lab fetch")
	return 2
}
