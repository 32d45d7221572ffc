// Command redoubt-netback serves the network devices of the host's guests.
package main

import (
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/netback"
)

func main() { process.Main("redoubt-netback", netback.Serve) }
