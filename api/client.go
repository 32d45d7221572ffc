// Package api reaches the outer API.
package api

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
)

// Dial makes a client of the API on a Unix socket. Nothing is sent before the first call. A call that may be
// made twice is made again where who served it was replaced over it; the next one has the same socket. A guest that is
// being stopped has its grace period once.
func Dial(socket string) redoubtv1connect.GuestServiceClient {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	t := &http.Transport{
		Protocols: &p,
		HTTP2:     &http.HTTP2Config{MaxReadFrameSize: 1 << 20}, // a long answer is not cut into a hundred
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	return redoubtv1connect.NewGuestServiceClient(&http.Client{Transport: t}, "http://redoubt",
		connect.WithInterceptors(connect.UnaryInterceptorFunc(again)),
		connect.WithAcceptCompression("gzip", nil, nil)) // what it costs is more than a socket of this host does
}

// repeatable are the calls that may be made twice.
var repeatable = []string{
	redoubtv1connect.GuestServiceListProcedure, redoubtv1connect.GuestServiceGetProcedure, redoubtv1connect.GuestServiceStopProcedure,
	redoubtv1connect.GuestServiceQuoteProcedure, redoubtv1connect.GuestServiceActivateCredentialProcedure,
	redoubtv1connect.GuestServiceInspectProcedure, redoubtv1connect.GuestServiceModulesProcedure,
	redoubtv1connect.GuestServicePauseProcedure, redoubtv1connect.GuestServiceResumeProcedure, redoubtv1connect.GuestServiceQuarantineProcedure,
	redoubtv1connect.GuestServiceReleaseProcedure, redoubtv1connect.GuestServiceValidateProcedure, redoubtv1connect.GuestServiceValidationProcedure,
	redoubtv1connect.GuestServiceCreateBaselineProcedure, redoubtv1connect.GuestServiceGetBaselineProcedure,
	redoubtv1connect.GuestServiceAcceptBaselineProcedure,
}

// maxTries are made of one call: services that die more often are sick.
const maxTries = 8

func again(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (out connect.AnyResponse, err error) {
		began := time.Now()
		var grace uint32
		stop, stops := r.Any().(*v1.StopRequest)
		if stops {
			grace = stop.GraceMs
			defer func() { stop.GraceMs = grace }() // the caller's
		}
		for range maxTries {
			if stops {
				stop.GraceMs = uint32(max(0, int64(grace)-time.Since(began).Milliseconds()))
			}
			out, err = next(ctx, r)
			if !Replaced(err) || ctx.Err() != nil || !slices.Contains(repeatable, r.Spec().Procedure) {
				break
			}
		}
		return out, err
	}
}

// Replaced says of a call's error that who served it was replaced over it: it may have been carried out.
func Replaced(err error) bool {
	if err == nil {
		return false
	}
	if code := connect.CodeOf(err); code == connect.CodeAborted || connect.IsWireError(err) {
		return code == connect.CodeAborted || code == connect.CodeCanceled
	}
	var dial *net.OpError
	if errors.As(err, &dial) && dial.Op == "dial" {
		return false // there is nobody
	}
	// A stream that is cut off in the middle ends as its connection did.
	var ce *connect.Error
	cut := errors.As(err, &ce) && (errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET))
	return cut || connect.CodeOf(err) == connect.CodeUnavailable
}
