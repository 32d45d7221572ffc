// Command redoubt-emulator runs one guest, once.
package main

import (
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/emulator"
)

func main() { process.Main("redoubt-emulator", emulator.Serve) }
