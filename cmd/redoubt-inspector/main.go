// Command redoubt-inspector answers one question about a guest from its memory and leaves.
package main

import (
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/inspector"
)

func main() { process.Main("redoubt-inspector", inspector.Serve) }
