package foreign

import (
	"encoding/json"
	"os"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/sandbox"
)

// Files are the descriptors of a [Request].
type Files struct {
	Lifeline, Output *os.File
	Program          []*os.File
}

// Take sorts the descriptors of a request. They are the caller's to close also after an error.
func Take(r *rpc.Request) (q Request, f Files, err error) {
	if err := r.Decode(&q); err != nil {
		return q, f, err
	}
	if len(r.Files) < 2 {
		return q, f, rpc.Errorf(rpc.Invalid, "%s: %d descriptors", Method, len(r.Files))
	}
	return q, Files{Lifeline: r.Files[0], Output: r.Files[1], Program: r.Files[2:]}, nil
}

// Keep sees a started program through: it takes the owner's wishes from the lifeline and tells its
// end there. It returns when the program has ended. lifeline is closed.
func Keep(g *sandbox.Guard, state func() *os.ProcessState, lifeline *os.File) {
	defer lifeline.Close()
	listened := make(chan struct{})
	go func() { // ends with either half of the lifeline, which is shut below
		defer close(listened)
		b := make([]byte, 1)
		for {
			n, err := lifeline.Read(b)
			switch {
			case err != nil || n == 0:
				_ = g.Signal(unix.SIGKILL)
				return
			case b[0] == terminate:
				_ = g.Signal(unix.SIGTERM)
			}
		}
	}()
	err := g.Wait()
	e := ended{Exit: "how it ended is not known"}
	if s := state(); s != nil {
		e.Exit = s.String()
	}
	if err != nil {
		e.Error = err.Error()
	}
	if text, err := json.Marshal(e); err == nil {
		_, _ = lifeline.Write(text) // an owner that is gone wants no word
	}
	_ = unix.Shutdown(int(lifeline.Fd()), unix.SHUT_RDWR)
	<-listened
}
