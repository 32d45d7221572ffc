package emulator

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"

	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/vhostuser"
)

// relayNICs gives QEMU a way to each NIC: QEMU comes in by a door, because its network devices
// take no connected socket. ended is to be called when QEMU has ended.
func (g *guest) relayNICs(ctx context.Context) (nics []qemu.NIC, ended func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	ended = func() { cancel(); wg.Wait() }
	doors, entrances := g.files[protocol.FileDoor], g.files[protocol.FileEntrance]
	if len(doors) != len(g.nics) || len(entrances) != len(g.nics) {
		return nil, ended, fmt.Errorf("%d NICs with %d doors and %d entrances", len(g.nics), len(doors), len(entrances))
	}
	memory, err := one(g.files, protocol.FileMemory).Stat()
	if err != nil {
		return nil, ended, err
	}
	for i, front := range g.nics {
		l, err := unixListener(entrances[i])
		if err != nil {
			ended()
			return nil, ended, fmt.Errorf("nics[%d]: %w", i, err)
		}
		n := qemu.NIC{Door: doors[i]}
		front.ReadConfig(0, n.MAC[:])
		nics = append(nics, n)
		wg.Go(func() {
			stop := context.AfterFunc(ctx, func() { l.Close() })
			c, err := l.AcceptUnix()
			if stop() {
				l.Close()
			}
			if err == nil {
				err = vhostuser.Relay(ctx, c, front, vhostuser.RelayOptions{Memory: vhostuser.Whitelist{memory}, OwnConfig: true})
			}
			if err != nil && ctx.Err() == nil {
				g.service.log.Warn("nic", "index", i, "err", err)
			}
		})
	}
	return nics, ended, nil
}

// unixListener takes f over.
func unixListener(f *os.File) (*net.UnixListener, error) {
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("not a Unix socket")
	}
	return u, nil
}
