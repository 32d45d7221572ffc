package main

import (
	"context"
	"fmt"
	"os"
	"strings"
)

// The guests, and what is special about each.
const (
	reference = "web-1"
	ungated   = "no-gate"
	gated     = "late"
	cmdlined  = "cmdline"
	kerneled  = "kernel"
	stored    = "stored"
)

// The good command line and the good kernel, of the flavour that boots soonest; and another kernel.
const (
	cmdline     = "console=ttyS0"
	kernel      = "6.1-cloud"
	otherKernel = "6.12-cloud"
)

// writeSpec writes NAME.yaml and returns its text.
func (d *demo) writeSpec(name, kernel, cmdline string) (string, error) {
	vmlinuz, err := d.cache.Vmlinuz(kernel)
	if err != nil {
		return "", err
	}
	// Names without directories: the spec reads better, and the CLI looks beside the spec.
	link := "vmlinuz-" + kernel
	if err := os.Symlink(vmlinuz, d.path(link)); err != nil && !os.IsExist(err) {
		return "", err
	}
	text := fmt.Sprintf("name: %s\nmemory: 256MiB\nboot:\n  kernel: %s\n  initrd: initrd\n  cmdline: %s\n", name, link, cmdline)
	return text, os.WriteFile(d.path(name+".yaml"), []byte(text), 0o600)
}

// A boot is a guest on its way to ready.
type boot struct {
	done    chan struct{} // closed when it is ready or was given up
	console string
	err     error
}

// follow waits for a started guest in a goroutine of its own, which ends with ctx at the
// latest; tidy waits for it.
func (d *demo) follow(ctx context.Context, name string) *boot {
	b := &boot{done: make(chan struct{})}
	d.wg.Go(func() {
		defer close(b.done)
		b.console, b.err = d.console(ctx, name, ready)
	})
	if d.boots == nil {
		d.boots = map[string]*boot{}
	}
	d.boots[name] = b
	return b
}

// await returns what the guest told once it was ready.
func (d *demo) await(name string) (told, error) {
	b := d.boots[name]
	if b == nil {
		return told{}, fmt.Errorf("guest %s was not started", name)
	}
	<-b.done
	if b.err != nil {
		return told{}, b.err
	}
	return listen(b.console), nil
}

// told is what the guest's init said.
type told struct {
	kernel    string
	log       []string // of its kernel, about the TPM
	aggregate string   // boot_aggregate, as ALGORITHM:DIGEST
	pcrs      map[string]string
}

func listen(console string) told {
	t := told{pcrs: map[string]string{}}
	for l := range strings.Lines(console) {
		l, ok := strings.CutPrefix(strings.TrimSpace(l), mark)
		if !ok {
			continue
		}
		word, rest, _ := strings.Cut(l, " ")
		switch word {
		case "kernel":
			t.kernel = rest
		case "log":
			t.log = append(t.log, rest)
		case "aggregate":
			t.aggregate = rest
		case "pcr":
			n, v, _ := strings.Cut(rest, " ")
			t.pcrs[n] = strings.ToLower(v)
		}
	}
	return t
}

// bypassed reports whether the kernel gave its TPM up.
func (t told) bypassed() bool { return strings.Contains(strings.Join(t.log, "\n"), "TPM-bypass") }

// trusted reports whether IMA measured the boot: boot_aggregate is a digest of real registers.
func (t told) trusted() bool {
	_, digest, _ := strings.Cut(t.aggregate, ":")
	return !t.bypassed() && len(digest) >= 40 && strings.Trim(digest, "0") != ""
}

// view shows a guest as it sees itself.
func (d *demo) view(t told) {
	d.say("  inside the guest, %s:", t.kernel)
	d.quote(strings.Join(t.log, "\n"))
	d.quote("boot_aggregate " + t.aggregate)
	if len(t.pcrs) == 0 {
		d.quote("no TPM: nothing to seal to, nothing to attest")
		return
	}
	for _, p := range registers {
		d.quote(fmt.Sprintf("tpm2_pcrread: PCR %s %s", p.number, t.pcrs[p.number]))
	}
}

// registers are those that hold what the Builder measured of the boot.
var registers = []struct{ number, what string }{
	{"0", "monitor"}, {"1", "machine"}, {"4", "kernel"}, {"8", "command line"}, {"9", "initrd"},
}
