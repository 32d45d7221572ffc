// Command redoubt-vtpm is the vTPM manager and back end.
package main

import (
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/vtpm"
)

func main() { process.Main("redoubt-vtpm", vtpm.Serve) }
