// Package server says who the store's clients are and which names are whose (identity.go), and
// runs a store within the process, in memory: what tests of its users need. The store service
// is package services/store.
package server

import (
	"context"
	"log/slog"

	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
)

// Server is a store. Run owns it.
type Server struct{ s *state.State }

// A Client is a new connection and who is at its other end.
type Client = state.Client

// New makes a store with the reserved names.
func New(log *slog.Logger, reserved ...tree.Reserved) *Server {
	return &Server{state.New(log, state.Options{Tree: tree.New(reserved...)})}
}

// Run serves until ctx ends and then closes every connection. accept yields new connections
// with their identity.
func (s *Server) Run(ctx context.Context, accept <-chan Client) { s.s.Run(ctx, accept) }
