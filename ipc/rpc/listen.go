package rpc

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"

	"redoubt.dev/redoubt/ipc"
)

// Listen makes a SOCK_SEQPACKET socket with a name, in place of one that is there, and serves whoever the
// mode lets connect, at most so many at once. serve does until ctx ends; it must be called.
func Listen(path string, mode os.FileMode, most int, h Handler) (serve func(ctx context.Context), err error) {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		return nil, err
	}
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
