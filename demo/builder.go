package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/services"
)

const (
	builderDeaths = 3
	secondsAfter  = 2 // of the guest's after each
)

// builder kills the Builder under the guest that works on its disk.
func (d *demo) builder(ctx context.Context) error {
	policy := d.path("stored-policy.yaml")
	if _, err := d.run(ctx, "attest", stored, "--save-policy", policy); err != nil {
		return err
	}
	before, err := d.made(ctx)
	if err != nil {
		return err
	}
	var harmed ioSeconds
	var away time.Duration // the longest that nobody answered
	for range builderDeaths {
		pid, err := d.builderPID()
		if err != nil {
			return err
		}
		d.say("  $ kill -9 %d    # redoubt-builder", pid)
		begin := time.Now()
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			return err
		}
		after, err := d.made(ctx) // answered by the next one
		if err != nil {
			return err
		}
		away = max(away, time.Since(begin))
		if after != before {
			return fmt.Errorf("the guest was made of processes %s and is made of %s", before, after)
		}
		if err := d.goesOn(ctx, &harmed); err != nil {
			return err
		}
	}
	d.quote(fmt.Sprintf("%d × killed: %d MiB written and verified in %d s, longest pause %v, no error", builderDeaths, harmed.bytes>>20, harmed.seconds, harmed.longest))
	d.quote(fmt.Sprintf("the next one answered after %v at most; the guest is still %s", away.Round(time.Millisecond), before))
	if harmed.longest > pauseBound {
		return fmt.Errorf("a pause of %v", harmed.longest)
	}
	_, err = d.run(ctx, "attest", stored, "--policy", policy)
	return err
}

// goesOn reads what the guest tells of its disk from now on.
func (d *demo) goesOn(ctx context.Context, s *ioSeconds) error {
	past, err := d.redoubt(ctx, "logs", stored)
	if err != nil {
		return err
	}
	console, end, err := d.lines(ctx, "logs", stored, "--follow")
	if err != nil {
		return err
	}
	defer end()
	if err := new(ioSeconds).read(console, strings.Count(past, "\nIO ")); err != nil {
		return err
	}
	return s.read(console, secondsAfter)
}

// made are the processes that the guest is made of.
func (d *demo) made(ctx context.Context) (string, error) {
	all, err := d.listed(ctx)
	if err != nil {
		return "", err
	}
	var made []string
	for _, p := range all {
		if (p.Service == services.Emulator || p.Service == services.QEMU) && strings.HasSuffix(p.Label, "-"+stored) {
			made = append(made, fmt.Sprintf("%s %d", p.Service, p.PID))
		}
	}
	if made == nil {
		return "", errors.New("the guest does not run")
	}
	return strings.Join(made, ", "), nil
}

// builderPID finds the Builder, the Supervisor's child.
func (d *demo) builderPID() (int, error) {
	lock, err := os.ReadFile(d.path("run", services.LockFile))
	if err != nil {
		return 0, err
	}
	children, err := filepath.Glob(fmt.Sprintf("/proc/%s/task/*/children", strings.TrimSpace(string(lock))))
	if err != nil {
		return 0, err
	}
	for _, c := range children {
		pids, err := os.ReadFile(c)
		if err != nil {
			return 0, err
		}
		for p := range strings.FieldsSeq(string(pids)) {
			var pid int
			if _, err := fmt.Sscan(p, &pid); err != nil {
				return 0, err
			}
			if program, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); filepath.Base(program) == "redoubt-builder" {
				return pid, nil
			}
		}
	}
	return 0, errors.New("no Builder runs")
}
