package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// An autogroup is the host's setting by which the kernel shares processors among sessions instead of among threads
// (sched(7), "The autogroup feature"). A session whose vCPUs are always at work has then used up its share whenever one of
// its other threads wakes: on a host with more to do than processors QEMU's main loop waits up to a second before it
// completes a guest's TPM command, for which Linux waits 0.75 s. By itself such a thread runs within milliseconds.
type autogroup struct {
	setting string // the file that holds 0 or 1; kernels without the feature have none
	mark    string // a file that exists while the setting is off because `up` turned it off
}

func (a *app) autogroup() autogroup {
	return autogroup{"/proc/sys/kernel/sched_autogroup_enabled", filepath.Join(a.runDir, "autogroup-was-on")}
}

// on reports whether sessions are scheduled as groups.
func (g autogroup) on() (bool, error) {
	b, err := os.ReadFile(g.setting)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return strings.TrimSpace(string(b)) == "1", err
}

// turnOff turns it off until turnBack, and reports whether it was on.
func (g autogroup) turnOff() (bool, error) {
	on, err := g.on()
	if err != nil || !on {
		return false, err
	}
	if err := os.WriteFile(g.mark, nil, 0o600); err != nil {
		return true, err
	}
	err = os.WriteFile(g.setting, []byte("0\n"), 0) // it exists
	if err != nil {
		err = errors.Join(err, os.Remove(g.mark)) // nothing is to be turned back
	}
	return true, err
}

// turnBack turns it on where turnOff turned it off.
func (g autogroup) turnBack() error {
	if _, err := os.Stat(g.mark); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errors.Join(os.WriteFile(g.setting, []byte("1\n"), 0), os.Remove(g.mark))
}

// scheduleApart turns it off for as long as Redoubt is up. Where it can't, guests run all the same, so that is no error.
func (a *app) scheduleApart(g autogroup) {
	switch was, err := g.turnOff(); {
	case err != nil:
		fmt.Fprintf(a.err, "redoubt: up: devices of guests may answer late while the host is busy: %v: mend: sysctl kernel.sched_autogroup_enabled=0\n", err)
	case was:
		fmt.Fprintln(a.err, "redoubt: up: kernel.sched_autogroup_enabled is 0 until `redoubt down`, so that guests' devices answer in time (--keep-autogroup leaves it)")
	}
}

// scheduling: what a busy host does to the devices of QEMU's guests.
func scheduling(g autogroup) finding {
	f := finding{What: "threads scheduled one by one", Mend: "`redoubt up` does it"}
	on, err := g.on()
	switch {
	case err != nil:
		f.Detail = err.Error()
	case on:
		f.Detail = "autogroup is on: by sessions, so devices of QEMU's guests answer late while the host is busy"
	default:
		f.OK, f.Detail, f.Mend = true, "autogroup is off", ""
	}
	return f
}
