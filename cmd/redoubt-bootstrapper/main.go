// Command redoubt-bootstrapper has the services started, each as soon as what it needs is there,
// and leaves.
package main

import (
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/bootstrapper"
)

func main() { process.Main("redoubt-bootstrapper", bootstrapper.Serve) }
