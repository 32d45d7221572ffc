// Package rpctest is what tests of handlers share.
package rpctest

import (
	"context"
	"testing"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
)

// Serve has a handler served to a peer, by which the returned function calls it. Both end with the
// test.
func Serve(t testing.TB, h rpc.Handler) func(method string, in any) error {
	t.Helper()
	a, b, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := rpc.New(a, nil), rpc.New(b, h)
	done := make(chan struct{}, 2)
	for _, p := range []*rpc.Peer{ours, theirs} {
		go func() { _ = p.Run(context.Background()); done <- struct{}{} }()
	}
	t.Cleanup(func() { ours.Close(); theirs.Close(); <-done; <-done })
	return func(method string, in any) error {
		_, err := ours.Call(t.Context(), method, in, nil)
		return err
	}
}
