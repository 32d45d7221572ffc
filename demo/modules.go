package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/attack"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/initramfs"
)

// rootkit is a guest whose kernel loads a module that attacks it.
const rootkit = "rootkit"

// rootkitAttacks are those that are shown: what each does, and what of the kernel is then refused to it.
var rootkitAttacks = []struct{ name, what, object string }{
	{"syscall-table", "the table of system calls is changed", "sys_call_table"},
	{"cred-write", "a process of nobody's becomes root's", ""},
	{"alias", "what runs when a program crashes is changed, by another address of it", "core_pattern"},
}

func rootkitInit() string {
	s := `#!/bin/sh
export PATH=/bin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
exec </dev/console >/dev/console 2>&1
dmesg -n 1
` + attack.Script + "attack_load attack\n"
	for _, a := range rootkitAttacks {
		s += "attack " + a.name + " " + find(a.name).Check + " | sed 's/^CHECK/DEMO rootkit/'\n"
	}
	return s + "echo DEMO READY\nwhile :; do sleep 1000; done\n"
}

func find(name string) attack.Attack {
	return attack.All[slices.IndexFunc(attack.All, func(a attack.Attack) bool { return a.Name == name })]
}

// infect starts the guest, with more of its spec.
func (d *demo) infect(ctx context.Context, more string) error {
	modules, err := attack.Build(ctx, d.cache, kernel)
	if err != nil {
		return err
	}
	image := initramfs.New(d.cache.Path("bin/busybox"), rootkitInit())
	for _, m := range []string{"victim", "attack"} {
		image.HostFile(modules[m], "mod/"+m+".ko")
	}
	if err := image.WriteFile(d.path("initrd-" + rootkit)); err != nil {
		return err
	}
	text, err := d.writeSpec(rootkit, kernel, cmdline)
	if err != nil {
		return err
	}
	text = strings.Replace(text, "initrd: initrd", "initrd: initrd-"+rootkit, 1) + more
	if err := os.WriteFile(d.path(rootkit+".yaml"), []byte(text), 0o600); err != nil {
		return err
	}
	if _, err := d.redoubt(ctx, "run", rootkit+".yaml"); err != nil {
		return err
	}
	d.follow(ctx, rootkit)
	return nil
}

// infected says of each attack whether it has won.
func (d *demo) infected() (won map[string]bool, err error) {
	if _, err := d.await(rootkit); err != nil {
		return nil, err
	}
	won = map[string]bool{}
	for l := range strings.Lines(d.boots[rootkit].console) {
		words := strings.Fields(l)
		if len(words) == 5 && words[0]+" "+words[1] == mark+"rootkit" {
			won[words[2]] = words[4] == find(words[2]).Won
		}
	}
	for _, a := range rootkitAttacks {
		w, tried := won[a.name]
		if !tried {
			return nil, fmt.Errorf("attack %s was not tried:\n%s", a.name, d.boots[rootkit].console)
		}
		d.say("  %-14s %s: %s", a.name, a.what, map[bool]string{true: "it is", false: "no"}[w])
	}
	return won, nil
}

// unfenced shows the module in a guest whose modules are the kernel's.
func (d *demo) unfenced(ctx context.Context) error {
	d.say("  $ redoubt run %s.yaml    # started when BlkBack was first killed", rootkit)
	won, err := d.infected()
	if err != nil {
		return err
	}
	for _, a := range rootkitAttacks {
		if !won[a.name] {
			return fmt.Errorf("attack %s should have won", a.name)
		}
	}
	_, err = d.redoubt(ctx, "stop", rootkit, "--grace", "0s")
	return err
}

// A performance is a part of the demo in the lab.
type performance struct {
	done chan struct{} // closed when it is over
	out  bytes.Buffer
	err  error
}

// fencedTime bounds it; it takes a third of that on two processors that do little else.
const fencedTime = 4 * time.Minute

// beginFenced begins the part that needs KVM in the lab, where this host's KVM cannot run guests.
func (d *demo) beginFenced(ctx context.Context) {
	if lab.KVM() {
		return
	}
	p := &performance{done: make(chan struct{})}
	d.fence = p
	d.wg.Go(func() {
		defer close(p.done)
		ctx, cancel := context.WithTimeoutCause(ctx, fencedTime, fmt.Errorf("it took more than %v: is this machine very busy?", fencedTime))
		defer cancel()
		self, err := os.Executable()
		if err != nil {
			p.err = err
			return
		}
		status, err := lab.Run(ctx, lab.Job{Args: []string{self, "-bin", d.bin, "-part", "fenced"}, Output: &p.out})
		if p.err = err; err == nil && status != 0 {
			p.err = errors.New("it went wrong there")
		}
	})
}

// fenced shows the same guest with its modules isolated.
func (d *demo) fenced(ctx context.Context) error {
	if lab.KVM() {
		return d.isolated(ctx)
	}
	if d.fence == nil {
		return errNotReached
	}
	<-d.fence.done
	d.say("  (this host's KVM runs no guests: in an emulated machine that has one)")
	for l := range strings.Lines(d.fence.out.String()) {
		if l = strings.TrimRight(l, "\r\n"); strings.HasPrefix(l, "  ") && !strings.HasPrefix(l, "  ok ") {
			d.say("%s", l)
		}
	}
	return d.fence.err
}

// isolated shows it where KVM is.
func (d *demo) isolated(ctx context.Context) error {
	var b bytes.Buffer
	if err := policy.Write(&b, []policy.Profile{{Module: "attack", Calls: attack.Calls}, {Module: "victim", Calls: attack.VictimCalls, Reads: []string{"attack"}}}); err != nil {
		return err
	}
	if err := os.WriteFile(d.path("profile.yaml"), b.Bytes(), 0o600); err != nil {
		return err
	}
	const more = "emulator: native\nmodules:\n  default: isolate\n  profile: profile.yaml\n"
	d.quote(more)
	d.say("  $ redoubt run %s.yaml", rootkit)
	if err := d.infect(ctx, more); err != nil {
		return err
	}
	won, err := d.infected()
	if err != nil {
		return err
	}
	d.say("  $ redoubt modules %s", rootkit)
	out, err := d.redoubt(ctx, "modules", rootkit, "--json")
	if err != nil {
		return err
	}
	var r isolate.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return err
	}
	named := map[string]bool{}
	for _, e := range r.Events {
		if !e.Allowed && e.Module == "attack" {
			d.quote("refused: " + e.String())
			name, _, _ := strings.Cut(e.Symbol, "+")
			named[name] = true
		}
	}
	for _, a := range rootkitAttacks {
		switch {
		case won[a.name]:
			return fmt.Errorf("attack %s has won", a.name)
		case a.object != "" && !named[a.object]:
			return fmt.Errorf("attack %s: nothing names %s", a.name, a.object)
		}
	}
	return nil
}

// fencedSteps are those of the part that the lab performs.
func fencedSteps() []step {
	return []step{
		{name: "up", title: "Redoubt's services start", do: (*demo).up},
		{name: "isolated", needs: []string{"up"}, title: "The guest's modules are isolated", do: (*demo).isolated},
	}
}
