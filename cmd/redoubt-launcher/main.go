// Command redoubt-launcher is what a process is between its start and its program: it puts itself into
// its sandbox (package sandbox). It is a program of its own because every process passes through it, and
// what it links is what its start costs.
package main

import (
	"fmt"
	"os"

	"redoubt.dev/redoubt/sandbox"
)

func main() {
	sandbox.LauncherMain()
	fmt.Fprintln(os.Stderr, "redoubt-launcher: this program is started by redoubt-builder, not by hand")
	os.Exit(2)
}
