// Command redoubt-toolstack serves the outer API.
package main

import (
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/toolstack"
)

func main() { process.Main("redoubt-toolstack", toolstack.Serve) }
