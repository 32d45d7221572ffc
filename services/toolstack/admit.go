package toolstack

import (
	"context"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
	"redoubt.dev/redoubt/services/protocol"
)

// Bounds of requests, in bytes, when they are unpacked.
const (
	maxRequest = 256 << 10 // of any call but Validate: a spec has 64 KiB
	maxLarge   = protocol.MaxSeen + 64<<10
)

// maxLargeAtOnce is how many large requests there are at a time, and softMemory where the garbage they leave, which is as much
// again, is collected. Two and what the Builder is given of them then took 390 MiB at most, of the 512 that the toolstack has.
const (
	maxLargeAtOnce = 2
	softMemory     = 300 << 20
)

// maxSending is how long the caller may take to send a large request, while it keeps others waiting.
const maxSending = time.Minute

// bounds are what the API takes of a call.
func bounds(of connect.Spec) []connect.HandlerOption {
	if of.Procedure == redoubtv1connect.GuestServiceValidateProcedure {
		return []connect.HandlerOption{connect.WithReadMaxBytes(maxLarge)}
	}
	return []connect.HandlerOption{connect.WithReadMaxBytes(maxRequest)}
}

// admit has next serve who may make a call. Who may not is answered before anything of the request's body is read, since to
// unpack and decode it costs memory, and even to throw it away costs time that the caller chooses. Large requests wait for one another.
func admit(r *roles, sending time.Duration, next http.Handler) http.Handler {
	refusal := connect.NewErrorWriter()
	large := make(chan struct{}, maxLargeAtOnce)
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body := http.NewResponseController(w)
		if err := r.check(req.Context(), req.URL.Path); err != nil {
			// The server does not wait for the rest of it, either.
			_ = body.SetReadDeadline(time.Now())
			_ = refusal.Write(w, req, err) // fails where the caller has gone
			return
		}
		if req.URL.Path == redoubtv1connect.GuestServiceValidateProcedure {
			select {
			case large <- struct{}{}:
			case <-req.Context().Done():
				return
			}
			_ = body.SetReadDeadline(time.Now().Add(sending))
			leave := sync.OnceFunc(func() { <-large })
			defer leave() // not before: what was sent is in memory for so long
			req = req.WithContext(context.WithValue(req.Context(), placeKey{}, leave))
		}
		next.ServeHTTP(w, req)
	})
}

type placeKey struct{}

// small gives back the place among large requests that one had which, now that it is read, is none.
func small(ctx context.Context) {
	if leave, ok := ctx.Value(placeKey{}).(func()); ok {
		leave()
	}
}
