// Command peers builds the monitors that `make bench` compares Redoubt with.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/peers"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	root, err := debian.Open()
	if err == nil {
		err = peers.Build(ctx, root)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		os.Exit(1)
	}
}
