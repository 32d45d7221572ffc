package emulator

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/bits"
	"strings"
	"unicode"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/monitor"
	"redoubt.dev/redoubt/services/protocol"
)

// modules is what is to be done about the guest's modules; nil: nothing.
func (g *guest) modules() (*isolate.Modules, error) {
	in := g.in.Modules
	if in == nil {
		return nil, nil
	}
	m := &isolate.Modules{Default: isolate.Verdict(in.Default), Trusted: in.Trusted, Mode: policy.Mode(in.Mode)}
	f := one(g.files, protocol.FileProfile)
	if f == nil {
		return m, nil
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	// At offsets: the emulator before a reboot has read it to its end by the same open file.
	if m.Profiles, err = policy.Read(io.NewSectionReader(f, 0, st.Size())); err != nil {
		return nil, rpc.Errorf(rpc.Invalid, "modules.profile: %v", err)
	}
	return m, nil
}

// maxModuleEvents is how many events of modules are told one by one, of those that were refused and of the others: then only
// each one whose number is a power of two, so that no module fills its guest's timeline. The last ones, and how many there
// were, are in the report.
const maxModuleEvents = 32

// moduleEvents tells of events of modules. One vCPU's goroutine at a time calls it, in its turn at the fence.
type moduleEvents struct {
	tell           func(text string)
	halt           func(text string) // is called for what was refused, and returns at once; nil: it is only told
	refused, other uint64
}

func (m *moduleEvents) event(e isolate.Event) {
	n := &m.refused
	if e.Allowed {
		n = &m.other
	}
	*n++
	if m.halt != nil && !e.Allowed && e.Kind != isolate.Loaded && e.Kind != isolate.Unloaded {
		m.halt(strings.Map(printable, strings.TrimPrefix(e.String(), "module ")))
	}
	if *n > maxModuleEvents && bits.OnesCount64(*n) != 1 {
		return
	}
	text := strings.TrimPrefix(e.String(), "module ")
	switch {
	case e.Kind == isolate.Loaded || e.Kind == isolate.Unloaded:
	case e.Allowed:
		text += ": allowed"
	default:
		text += ": refused"
	}
	if *n > maxModuleEvents {
		text += fmt.Sprintf(" (%d such so far)", *n)
	}
	m.tell(strings.Map(printable, text))
}

// halts pauses the guest for what its modules were refused, until the operator has it go on; what is refused on the way there
// is no reason to pause it again.
func (n *nativeMachine) halts(ctx context.Context, reasons <-chan string) {
	for {
		select {
		case why := <-reasons:
			if err := n.g.service.holdFor(protocol.HolderModules); err != nil {
				n.g.service.log.Error("the guest is not paused", "err", err)
				continue
			}
			n.g.service.event(protocol.EventHeld, "by its modules' response, until `redoubt resume`: "+why)
		case <-ctx.Done():
			return
		}
	}
}

// printable keeps what a guest calls its things from writing lines or terminal commands of its own.
func printable(r rune) rune {
	if unicode.IsPrint(r) {
		return r
	}
	return unicode.ReplacementChar
}

var errNotIsolated = rpc.Errorf(rpc.Unavailable, "the guest's modules are not isolated: give its spec a section modules")

// Modules implements machine.
func (n *nativeMachine) Modules() (report []byte, err error) {
	err = n.with(func(m *monitor.Machine) error {
		r, ok := m.Fenced()
		if !ok {
			return errNotIsolated
		}
		report, err = json.Marshal(r)
		return err
	})
	return report, err
}

// Modules implements machine.
func (m *qemuMachine) Modules() ([]byte, error) { return nil, errNotIsolated }
