package builder

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/launch"
	"redoubt.dev/redoubt/services/protocol"
	vtpm "redoubt.dev/redoubt/services/vtpm/kept"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
)

// startVTPM starts the vTPM manager, which is kept running.
func (b *Builder) startVTPM(ctx context.Context, fatal context.CancelCauseFunc) error {
	dir := b.vtpmDir()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	lost := func(err error) { fatal(fmt.Errorf("vTPM manager: %w", err)) }
	b.vtpm = vtpm.New(vtpm.Options{
		Log: b.log, Journal: b.journal, Every: b.cfg.Resets[services.VTPM],
		Start: func() (keeper.Process, error) {
			return b.procs.Start(services.VTPM, launch.Order{StateDir: dir})
		},
		Configure: func(ctx context.Context, i *keeper.Instance) error {
			err := b.configureVTPM(ctx, i, lost)
			if err != nil {
				err = fmt.Errorf("vTPM manager: %w", err)
			}
			return err
		},
		Handler: b.fromVTPM, Kept: b.kept, Left: b.devices,
		Guests: func() []string { return b.names(func(g *guest) bool { return !g.Build.Spec.TPM.Disabled }) },
		Leftovers: func(ctx context.Context, kept []int) error {
			return b.procs.AwaitOthers(ctx, services.SWTPM, kept)
		},
		Again: b.provisionAgain,
		Gone: func(uuid string) {
			if g := b.guest(uuid); g != nil {
				b.wg.Go(g.vtpmGone) // an emulator that takes nothing must not hold up the others
			}
		},
		Fail: func(uuid, reason string) {
			if g := b.guest(uuid); g != nil {
				g.vtpmFailed(reason)
			}
		},
		Lost: lost,
	})
	return b.vtpm.Begin(ctx)
}

// configureVTPM tells a vTPM manager where its things are.
func (b *Builder) configureVTPM(ctx context.Context, i *keeper.Instance, lost func(error)) error {
	sock, number, err := b.store.Connect(ctx, server.VTPM)
	if err != nil {
		return err
	}
	files := []*os.File{sock}
	defer func() { ipc.CloseAll(files) }()
	msg := protocol.ConfigureVTPM{StateDir: services.StateDir, HostTPM: b.cfg.HostTPM, Files: protocol.Files{protocol.FileStore}}
	if b.cfg.HostTPM != "" {
		tpm, err := openHostTPM(b.cfg.HostTPM)
		if err != nil {
			return fmt.Errorf("the host's TPM %s: %w", b.cfg.HostTPM, err)
		}
		files, msg.Files = append(files, tpm), append(msg.Files, protocol.FileHostTPM)
	}
	if _, err := i.Peer.Call(ctx, protocol.MethodConfigure, msg, nil, files...); err != nil {
		return err
	}
	b.store.Hold(server.VTPM, number, i.Peer, lost)
	return nil
}

// vtpmDir is the vTPM service's directory.
func (b *Builder) vtpmDir() string { return filepath.Join(b.cfg.StateDir, "vtpm") }

// vtpmGone tells the guest's emulator, which may have to hold the guest still.
func (g *guest) vtpmGone() {
	g.mu.Lock()
	r := g.run
	g.mu.Unlock()
	if r != nil {
		_ = r.peer.Notify(protocol.NoticeVTPMLost, struct{}{}) // or it is gone, too
	}
}

// provisionAgain gives a guest that was not let in yet its vTPM anew: the manager died.
func (b *Builder) provisionAgain(uuid string, d tree.Domain) {
	g := b.guest(uuid)
	if g == nil {
		return
	}
	b.wg.Go(func() {
		if err := b.provision(context.Background(), g, d); err != nil {
			g.vtpmFailed(err.Error())
		}
	})
}
