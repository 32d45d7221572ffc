// Command redoubt is the operator's command line.
package main

import (
	"os"

	"redoubt.dev/redoubt/cli"
)

func main() { os.Exit(cli.Main(os.Args[1:])) }
