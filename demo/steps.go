package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// steps is the demo, in order.
func steps() []step {
	return []step{
		{name: "doctor", title: "What this host can do", do: (*demo).doctor},
		{name: "up", needs: []string{"doctor"}, title: "Redoubt's services start", do: (*demo).up},
		{
			name: "boot", needs: []string{"up"}, do: (*demo).boot,
			title: "A trusted guest boots from one command, its vTPM made beside the running kernel",
		},
		{
			name: "attest", needs: []string{"boot"}, do: (*demo).attest,
			title: "Attestation: what runs is proved to the operator, and saved as what is good",
		},
		{
			name: "lost", needs: []string{"boot"}, do: (*demo).withoutGate,
			title: "Without the gate, a vTPM that comes late: the guest's trust is lost, silently",
		},
		{
			name: "kept", needs: []string{"lost"}, do: (*demo).withGate,
			title: "The same with the gate: the guest waits at its first TPM access, its trust is kept",
		},
		{
			name: "late-attest", needs: []string{"attest", "kept"}, do: (*demo).attestLate,
			title: "The guest whose vTPM was late passes the policy too",
		},
		{
			name: "cmdline", needs: []string{"attest", "lost"}, do: func(d *demo, ctx context.Context) error { return d.changed(ctx, cmdlined, "PCR 8") },
			title: "A guest with another command line fails, and the report says where",
		},
		{
			name: "kernel", needs: []string{"attest", "lost"}, do: func(d *demo, ctx context.Context) error { return d.changed(ctx, kerneled, "PCR 4") },
			title: "A guest with another kernel fails, and the report says where",
		},
		{
			name: "replay", needs: []string{"late-attest"}, do: (*demo).replay,
			title: "The event log adds up to what the guest's own TPM holds",
		},
		{
			name: "attacks", needs: []string{"up"}, do: (*demo).attacks,
			title: "What a service that was taken over cannot do: every attack in the sandbox of every service",
		},
		{
			name: "load", needs: []string{"attacks"}, do: (*demo).load,
			title: "BlkBack is killed and replaced while its guest writes and verifies its disk",
		},
		{
			name: "builder", needs: []string{"load"}, do: (*demo).builder,
			title: "The Builder, which has all privileges, is killed under the same guest: the next one goes on",
		},
		{
			name: "validated", needs: []string{"load"}, do: (*demo).validated,
			title: "A file in a running guest's /usr/bin is changed: the host finds it, the guest goes into quarantine",
		},
		{
			name: "rootkit", needs: []string{"load"}, do: (*demo).unfenced,
			title: "A kernel module that is a rootkit: the guest's kernel is its",
		},
		{
			name: "fenced", needs: []string{"rootkit"}, do: (*demo).fenced,
			title: "The same guest with its modules isolated: the rootkit is stopped, and named",
		},
		{name: "down", needs: []string{"up"}, title: "All goes down, nothing is left behind", do: (*demo).down},
	}
}

func (d *demo) doctor(ctx context.Context) error {
	out, err := d.run(ctx, "doctor")
	for l := range strings.Lines(out) {
		if !strings.Contains(l, " mend: ") { // a newcomer's host needs no mending here
			d.quote(l)
		}
	}
	return err
}

func (d *demo) up(ctx context.Context) error {
	out, err := d.run(ctx, "up", "--host-tpm", "none")
	d.quote(out)
	return err
}

func (d *demo) boot(ctx context.Context) error {
	if err := buildInitrd(d.cache, d.path("initrd")); err != nil {
		return err
	}
	d.beginFenced(ctx) // for long: meanwhile the other steps go on
	text, err := d.writeSpec(reference, kernel, cmdline)
	if err != nil {
		return err
	}
	d.say("  %s.yaml:", reference)
	d.quote(text)
	out, err := d.run(ctx, "run", reference+".yaml")
	d.quote(out)
	if err != nil {
		return err
	}
	d.follow(ctx, reference)
	t, err := d.await(reference)
	if err != nil {
		return err
	}
	if err := d.timeline(ctx, reference); err != nil {
		return err
	}
	d.view(t)
	if !t.trusted() {
		return fmt.Errorf("the guest's trust is lost: boot_aggregate %s", t.aggregate)
	}
	g, err := d.show(ctx, reference)
	if err != nil {
		return err
	}
	access, ok := g.at("tpm-first-access")
	if !ok {
		return errors.New("the timeline tells of no TPM access")
	}
	// What follows runs two guests at once, perhaps beside other work: late enough for that, too.
	d.late = (3*access + 3*time.Second).Round(time.Second)
	return nil
}

// timeline shows a guest's start.
func (d *demo) timeline(ctx context.Context, name string) error {
	out, err := d.run(ctx, "show", name)
	if err != nil {
		return err
	}
	_, start, ok := strings.Cut(out, "\nstart")
	if !ok {
		return errors.New("show: no timeline")
	}
	_, start, _ = strings.Cut(start, "\n")
	for l := range strings.Lines(start) {
		d.quote(strings.TrimPrefix(l, "    "))
	}
	return nil
}

func (d *demo) attest(ctx context.Context) error {
	out, err := d.run(ctx, "attest", reference, "--save-policy", "good.yaml")
	d.quote(out)
	if err != nil {
		return err
	}
	return d.passes(ctx, reference, "--policy", "good.yaml")
}

// passes shows an attestation whose verdict must be good.
func (d *demo) passes(ctx context.Context, name string, args ...string) error {
	out, err := d.run(ctx, append([]string{"attest", name}, args...)...)
	if err != nil {
		d.quote(out)
		return err
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	d.quote(strings.Join(lines[max(0, len(lines)-2):], "\n")) // the policy and the verdict
	if lines[len(lines)-1] != "trusted" {
		return errors.New("not trusted")
	}
	return nil
}

// withoutGate starts both late guests: the second one waits while the first is looked at.
func (d *demo) withoutGate(ctx context.Context) error {
	late := []string{"--unsafe-vtpm-delay", d.late.String()}
	for _, g := range []struct {
		name string
		run  func(context.Context, ...string) (string, error)
		args []string
	}{{ungated, d.run, append(late, "--unsafe-no-gate")}, {gated, d.redoubt, late}} {
		if _, err := d.writeSpec(g.name, kernel, cmdline); err != nil {
			return err
		}
		if _, err := g.run(ctx, append([]string{"run", g.name + ".yaml"}, g.args...)...); err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		d.follow(ctx, g.name)
	}
	t, err := d.await(ungated)
	if err != nil {
		return err
	}
	if err := d.timeline(ctx, ungated); err != nil {
		return err
	}
	d.view(t)
	if !t.bypassed() || t.trusted() {
		return errors.New("the guest kept its trust: its vTPM was not late enough; is this machine very busy?")
	}
	d.say("  => the guest runs, and looks well; its boot can never be proved")
	// The processors are free while the other one waits: the next two boot meanwhile.
	return d.startChanged(ctx)
}

func (d *demo) startChanged(ctx context.Context) error {
	for _, g := range []struct{ name, kernel, cmdline string }{
		{cmdlined, kernel, cmdline + " apparmor=0"}, {kerneled, otherKernel, cmdline},
	} {
		if _, err := d.writeSpec(g.name, g.kernel, g.cmdline); err != nil {
			return err
		}
		if _, err := d.redoubt(ctx, "run", g.name+".yaml"); err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		d.follow(ctx, g.name)
	}
	return nil
}

func (d *demo) withGate(ctx context.Context) error {
	d.say("  $ redoubt run %s.yaml --unsafe-vtpm-delay %v    # started with the one before", gated, d.late)
	t, err := d.await(gated)
	if err != nil {
		return err
	}
	if err := d.timeline(ctx, gated); err != nil {
		return err
	}
	d.view(t)
	if !t.trusted() {
		return fmt.Errorf("the guest's trust is lost: boot_aggregate %s", t.aggregate)
	}
	g, err := d.show(ctx, gated)
	if err != nil {
		return err
	}
	if _, waited := g.at("gate-waited"); !waited {
		return errors.New("the guest did not wait: its vTPM was not late enough; is this machine very busy?")
	}
	return nil
}

func (d *demo) attestLate(ctx context.Context) error {
	return d.passes(ctx, gated, "--policy", "good.yaml", "--out", "evidence")
}

// changed shows an attestation that must fail and name the register.
func (d *demo) changed(ctx context.Context, name, pcr string) error {
	t, err := d.await(name)
	if err != nil {
		return err
	}
	switch name {
	case cmdlined:
		d.say("  %s.yaml says `cmdline: %s apparmor=0`", name, cmdline)
	case kerneled:
		d.say("  %s.yaml says `kernel: vmlinuz-%s`; the guest runs %s", name, otherKernel, t.kernel)
	}
	out, err := d.run(ctx, "attest", name, "--policy", "good.yaml")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	verdict := lines[len(lines)-1]
	d.quote(verdict)
	var failed *statusError
	switch {
	case err == nil:
		return errors.New("it passed")
	case !errors.As(err, &failed) || failed.status != 1 || failed.text != "":
		return err
	case !strings.HasPrefix(verdict, "not trusted: policy") || !strings.Contains(verdict, pcr):
		return fmt.Errorf("the verdict does not name %s", pcr)
	}
	return nil
}

func (d *demo) replay(ctx context.Context) error {
	args := []string{"attest", "replay", "--event-log", "evidence/eventlog.bin"}
	d.say("  $ redoubt %s", strings.Join(args, " "))
	out, err := d.redoubt(ctx, append(args, "--json")...)
	if err != nil {
		return err
	}
	var r struct {
		PCRs []struct {
			Bank string            `json:"bank"`
			PCRs map[string]string `json:"pcrs"`
		} `json:"pcrs"`
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return err
	}
	t, err := d.await(gated)
	if err != nil {
		return err
	}
	same := 0
	for _, b := range r.PCRs {
		if b.Bank != "sha256" {
			continue
		}
		for _, p := range registers {
			verdict := "is what tpm2_pcrread printed in the guest"
			if v := b.PCRs[p.number]; v == "" || v != t.pcrs[p.number] {
				verdict = "is NOT what the guest has: " + t.pcrs[p.number]
			} else {
				same++
			}
			d.quote(fmt.Sprintf("PCR %s (%s) %.16s… %s", p.number, p.what, b.PCRs[p.number], verdict))
		}
	}
	if same != len(registers) {
		return fmt.Errorf("%d of %d registers agree", same, len(registers))
	}
	return nil
}

func (d *demo) down(ctx context.Context) error {
	out, err := d.run(ctx, "ps")
	d.quote(out)
	if err != nil {
		return err
	}
	before, err := d.processes()
	if err != nil {
		return err
	}
	if out, err = d.run(ctx, "down", "--grace", "0s"); err != nil {
		return err
	}
	d.quote(out)
	var left []string
	for _, p := range before {
		if p.lives() {
			left = append(left, fmt.Sprintf("%s (%d)", p.name, p.pid))
		}
	}
	if len(before) == 0 || len(left) > 0 {
		return fmt.Errorf("of %d processes these are left: %s", len(before), strings.Join(left, ", "))
	}
	d.quote(fmt.Sprintf("%d processes ran, none is left", len(before)))
	return nil
}
