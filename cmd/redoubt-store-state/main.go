// Command redoubt-store-state is the store: it owns the contents and the sockets of clients.
package main

import (
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/store"
)

func main() { process.Main("redoubt-store-state", store.Serve) }
