// Package asked is the Builder's side of what an emulator is asked while its guest runs. An emulator faces its guest: it may be
// taken over, answer nothing or lie, which costs the answer, for its own guest's tenant.
package asked

import (
	"context"
	"errors"
	"os"
	"time"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/answer"
	"redoubt.dev/redoubt/services/protocol"
)

// limit is what an emulator may take to answer.
var limit = 10 * time.Second

// maxReason bounds what an emulator may say in place of an answer, in characters.
const maxReason = 512

// Modules has an emulator say what its guest's modules have done, as protocol.MethodModules is answered.
func Modules(ctx context.Context, emulator *rpc.Peer) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return answer.Get(services.Emulator, func(into *os.File) (protocol.Answered, error) {
		var out protocol.Answered
		files, err := emulator.Call(ctx, protocol.MethodReport, protocol.Report{Files: protocol.Files{protocol.FileAnswer}}, &out, into)
		ipc.CloseAll(files)
		switch {
		case errors.Is(err, rpc.ErrGone):
			err = rpc.Errorf(rpc.Unavailable, "the guest's emulator has ended: ask again if the guest reboots")
		case errors.Is(err, context.DeadlineExceeded):
			err = rpc.Errorf(rpc.Unavailable, "the guest's emulator does not answer: stop the guest if that stays so")
		case err != nil && ctx.Err() == nil: // its own words, which go into the log
			err = rpc.Errorf(rpc.Unavailable, "%.*s", maxReason, err.Error())
		}
		return out, err
	})
}
