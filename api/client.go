// Package api reaches the outer API.
package api

import (
	"context"
	"net"
	"net/http"

	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
)

// Dial makes a client of the API on a Unix socket. Nothing is sent before the first call.
func Dial(socket string) redoubtv1connect.GuestServiceClient {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	t := &http.Transport{
		Protocols: &p,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	return redoubtv1connect.NewGuestServiceClient(&http.Client{Transport: t}, "http://redoubt")
}
