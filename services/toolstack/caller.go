package toolstack

import (
	"context"
	"math"
	"net"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/services/protocol"
)

// Who calls is known by the credentials that the kernel keeps of the API's connection: those of
// the process that connected (unix(7), SO_PEERCRED). They go with each request to the Builder. The
// process number is 0 where the caller is not in the toolstack's PID namespace, as in its sandbox.

type callerKey struct{}

// nobody is a caller whose credentials could not be had: no user has this number.
var nobody = protocol.Caller{UID: math.MaxUint32}

// withCaller is http.Server's ConnContext.
func withCaller(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, callerKey{}, credentials(c))
}

func credentials(c net.Conn) protocol.Caller {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nobody
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nobody
	}
	who := nobody
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			who = protocol.Caller{UID: cred.Uid, PID: int(cred.Pid)}
		}
	})
	return who
}

// caller is who made the request that ctx is of.
func caller(ctx context.Context) protocol.Caller {
	if c, ok := ctx.Value(callerKey{}).(protocol.Caller); ok {
		return c
	}
	return nobody
}
