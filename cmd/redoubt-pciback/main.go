// Command redoubt-pciback assigns one guest's PCI bus and leaves.
package main

import (
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/pciback"
)

func main() { process.Main("redoubt-pciback", pciback.Serve) }
