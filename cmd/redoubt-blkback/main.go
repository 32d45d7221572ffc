// Command redoubt-blkback serves the disks of one guest.
package main

import (
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/blkback"
)

func main() { process.Main("redoubt-blkback", blkback.Serve) }
