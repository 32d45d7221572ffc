package rpc

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"

	"redoubt.dev/redoubt/ipc"
)

// Serve serves whoever connects to a socket that ipc.ListenMessages made, at most so many at once. serve does
// until ctx ends; it must be called. The file stays the caller's.
func Serve(socket *os.File, most int, h Handler) (serve func(ctx context.Context), err error) {
	all, err := net.FileListener(socket)
	if err != nil {
		return nil, err
	}
	l, ok := all.(*net.UnixListener)
	if !ok {
		all.Close()
		return nil, fmt.Errorf("%s is no Unix socket", socket.Name())
	}
	l.SetUnlinkOnClose(false)
	return func(ctx context.Context) {
		defer context.AfterFunc(ctx, func() { l.Close() })()
		var conns sync.WaitGroup
		defer conns.Wait()
		places := make(chan struct{}, most)
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			places <- struct{}{}
			conns.Go(func() {
				defer func() { <-places }()
				f, err := c.File()
				_ = c.Close()
				if err != nil {
					return
				}
				if conn, err := ipc.FromFile(f); err == nil {
					_ = New(conn, h).Run(ctx)
				}
			})
		}
	}, nil
}
