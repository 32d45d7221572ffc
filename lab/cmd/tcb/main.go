// Command tcb prints how many lines of code run with all of Redoubt's privileges. Its exit status is
// 1 where the Builder has more of its own than it may have.
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
	if n := tcb.Own(all); n > tcb.Most {
		fmt.Fprintf(os.Stderr, "tcb: the Builder has %d lines of code of its own, it may have %d\n", n, tcb.Most)
		os.Exit(1)
	}
}
