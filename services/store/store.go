// Package store is the store service: it holds the tree and hands out connections only to
// those the Builder names (one program for now; state and logic part with the services).
package store

import (
	"context"
	"log/slog"
	"net"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
)

// MethodConnect is the call by which the Builder gives a connection (a stream socket beside
// it) an identity.
const MethodConnect = "connect"

// Connect is its argument.
type Connect struct {
	Domain tree.Domain `json:"domain"`
}

// Serve runs the service until its control connection or ctx ends.
func Serve(ctx context.Context, log *slog.Logger, control *ipc.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	clients := make(chan server.Client)
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.New(log, server.ReservedNames()...).Run(ctx, clients)
	}()
	err := rpc.New(control, func(ctx context.Context, r *rpc.Request) (any, error) {
		var in Connect
		if r.Method != MethodConnect || len(r.Files) != 1 {
			for _, f := range r.Files {
				f.Close()
			}
			return nil, rpc.Errorf(rpc.Invalid, "store: %s with %d descriptors", r.Method, len(r.Files))
		}
		defer r.Files[0].Close()
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		c, err := net.FileConn(r.Files[0])
		if err != nil {
			return nil, rpc.Errorf(rpc.Invalid, "store: %v", err)
		}
		select {
		case clients <- server.Client{Conn: c, Domain: in.Domain}:
			return struct{}{}, nil
		case <-ctx.Done():
			c.Close()
			return nil, ctx.Err()
		}
	}).Run(ctx)
	cancel()
	<-done
	return err
}
