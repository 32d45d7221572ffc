// Command redoubt-store-logic is a worker of the store: it parses what clients ask and holds
// nothing. Its control connection, descriptor 3, carries requests and answers (package logic).
package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/store/logic"
)

// control is the descriptor that package process gives a child. The rest of that package stays
// out: a worker lives for one response, and what it links is what its start costs.
const control = 3

func main() {
	unix.CloseOnExec(control)
	if err := logic.Serve(control); err != nil {
		fmt.Fprintf(os.Stderr, "redoubt-store-logic: %v (it is started by redoubt-builder, not by hand)\n", err)
		os.Exit(1)
	}
}
