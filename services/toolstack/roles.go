package toolstack

import (
	"context"
	"fmt"
	"net/http"
	"path"
	"slices"

	"connectrpc.com/connect"

	"redoubt.dev/redoubt/services/protocol"
)

// roles say who may do what with a tenant's guests. Root may do everything.
type roles struct {
	tenant             string
	operators, viewers []uint32
	denied             func(protocol.Denied) // told of each call that is turned away
}

// looks are the calls of the API that change nothing: a viewer may make them, too.
var looks = []string{"List", "Get", "Logs", "Events", "Quote", "Validation", "GetBaseline"}

// check refuses a call that its caller may not make.
func (r *roles) check(ctx context.Context, procedure string) error {
	who, call := caller(ctx), path.Base(procedure)
	if who.UID == 0 || slices.Contains(r.operators, who.UID) {
		return nil
	}
	viewer := slices.Contains(r.viewers, who.UID)
	if viewer && slices.Contains(looks, call) {
		return nil
	}
	r.denied(protocol.Denied{Method: call, Caller: who})
	reason := fmt.Sprintf("user %d has no part in tenant %s: have root give it one (`redoubt tenant set %s --viewer %d`)", who.UID, r.tenant, r.tenant, who.UID)
	if viewer {
		reason = fmt.Sprintf("user %d may look at tenant %s only: have root make it an operator (`redoubt tenant set %s --operator %d`)", who.UID, r.tenant, r.tenant, who.UID)
	}
	return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("%s: %s", call, reason))
}

// gate is check before anything of a request is unpacked or decoded: that costs memory, whoever asks for it.
func (r *roles) gate(ctx context.Context, of connect.Spec, _ connect.Peer, _ http.Header) (context.Context, error) {
	return ctx, r.check(ctx, of.Procedure)
}
