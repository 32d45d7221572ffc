package ipc

import (
	"context"
	"net"
	"os"
)

// Refuse closes every connection that comes to a listening socket, so that nobody waits there for an answer, until ctx ends.
func Refuse(ctx context.Context, listening *os.File) error {
	l, err := net.FileListener(listening)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		c.Close()
	}
}
