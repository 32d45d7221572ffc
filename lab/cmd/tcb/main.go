// Command tcb prints how many lines of code run with all of Redoubt's privileges.
package main

import (
	"context"
	"fmt"
	"os"

	"redoubt.dev/redoubt/lab/tcb"
)

func main() {
	all, err := tcb.Count(context.Background(), ".")
	if err != nil {
		fmt.Fprintln(os.Stderr, "tcb:", err)
		os.Exit(1)
	}
	tcb.Print(os.Stdout, all)
}
