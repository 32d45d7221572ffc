package toolstack

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// A guest's console, byte channel and the console's spool are handed over by the Builder, which keeps
// them too: a toolstack that takes a guest over goes on where the last one stopped reading.

// ends are the toolstack's ends of what connects it to a guest.
type ends struct {
	console, channel *net.UnixConn
	spool            *spool
}

// takeEnds takes the descriptors of an answer or a call; they are its own then, also after an error.
func takeEnds(files []*os.File) (e ends, err error) {
	if len(files) != 5 {
		closeFiles(files)
		return e, fmt.Errorf("console: %d descriptors", len(files))
	}
	if e.console, err = ipc.Socket(files[0]); err != nil {
		closeFiles(files[1:])
		return e, err
	}
	if e.channel, err = ipc.Socket(files[1]); err != nil {
		closeFiles(files[2:])
		return ends{}, errors.Join(err, e.close())
	}
	if e.spool, err = newSpool(e.console, files[2], [2]*os.File(files[3:])); err != nil {
		return ends{}, errors.Join(err, e.close())
	}
	return e, nil
}

func (e ends) close() error {
	var errs []error
	for _, c := range []*net.UnixConn{e.console, e.channel} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	if e.spool != nil {
		errs = append(errs, e.spool.Close())
	}
	return errors.Join(errs...)
}

// connect makes a guest's console and channel those; begun says that its first program was seen.
func (t *Toolstack) connect(g *guest, e ends, begun bool) {
	moment := func(kind string) {
		t.event(protocol.Event{UUID: g.saved.UUID, Kind: kind, Time: time.Now()})
	}
	if begun {
		moment = nil
	}
	g.channel.attach(e.channel, nil, nil)
	g.console.attach(e.console, e.spool, moment)
}

// adopt takes over a guest that runs.
func (t *Toolstack) adopt(r *rpc.Request) error {
	var in protocol.Adopt
	if err := r.Decode(&in); err != nil {
		closeFiles(r.Files)
		return err
	}
	t.mu.Lock()
	g := t.byUUID[in.UUID]
	t.mu.Unlock()
	if g == nil {
		// Its record is gone or could not be read: the Builder still ends it with Redoubt.
		closeFiles(r.Files)
		t.log.Error("a guest runs that there is no record of", "uuid", in.UUID)
		return nil
	}
	g.mu.Lock()
	if g.up() {
		g.mu.Unlock()
		closeFiles(r.Files)
		return nil
	}
	g.timeline, g.starts, g.told = nil, 0, 0
	g.domain, g.emulator = uint32(in.Domain), in.Emulator
	g.set(Starting, "")
	g.mu.Unlock()
	e, err := takeEnds(r.Files)
	if err != nil {
		return err
	}
	t.connect(g, e, slices.ContainsFunc(in.Events, func(e protocol.Event) bool { return e.Kind == protocol.EventInit }))
	for _, e := range in.Events {
		t.event(e)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case in.Stopping:
		g.before = ""
		g.set(Stopping, "")
	case g.saved.Spec.TPM.Disabled && g.state == Starting:
		g.set(Running, "")
	}
	return nil
}
