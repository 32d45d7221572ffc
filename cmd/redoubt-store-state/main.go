// Command redoubt-store-state is the store.
package main

import (
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/store"
)

func main() { process.Main("redoubt-store-state", store.Serve) }
