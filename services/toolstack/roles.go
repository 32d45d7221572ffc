package toolstack

import (
	"context"
	"fmt"
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

// knows says whether a user has any part in the tenant.
func (r *roles) knows(uid uint32) bool {
	return uid == 0 || slices.Contains(r.operators, uid) || slices.Contains(r.viewers, uid)
}

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
