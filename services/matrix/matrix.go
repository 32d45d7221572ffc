// Package matrix tries the attacks of package attack in the sandboxes of all services. It is used by
// tests and by the demo; no program of Redoubt has it.
package matrix

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/sandbox/attack"
	"redoubt.dev/redoubt/services"
)

// uid is of nobody on the machine.
const uid = 0x52450020

// A Field is where attacks are tried: a program that attacks and launches itself into sandboxes
// (sandbox/attack/probe), and a victim, a process that has what is attacked.
type Field struct {
	program string
	host    sandbox.Host
	command *exec.Cmd
	in      io.Closer
	victim  string
	network *network.Namespace // such as NetBack's
}

// New starts the victim, whose files are in dir, in the host's network. Close ends it.
func New(program, dir string) (*Field, error) {
	return newField(program, dir, func(start func() error) error { return start() })
}

// newField starts the victim by do.
func newField(program, dir string, do func(func() error) error) (*Field, error) {
	ns, err := network.NewNamespace()
	if err != nil {
		return nil, err
	}
	f := &Field{program: program, host: sandbox.Host{Launcher: program}, command: exec.Command(program, "victim", dir), network: ns}
	var out io.Reader
	if f.in, err = f.command.StdinPipe(); err == nil {
		out, err = f.command.StdoutPipe()
	}
	if err == nil {
		err = do(f.command.Start)
	}
	if err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(line), &attack.Victim{})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("victim: %w", err), f.Close())
	}
	f.victim = strings.TrimSpace(line)
	return f, nil
}

// Close ends the victim.
func (f *Field) Close() error {
	_ = f.in.Close()
	return errors.Join(f.command.Wait(), f.network.Close())
}

// A Result is what became of an attack.
type Result struct {
	Succeeded   bool
	Unavailable bool   // this kernel lacks what is attacked
	Text        string // what the attacker said, or how it ended
}

func result(out string, err error) Result {
	out = strings.TrimSpace(out)
	r := Result{Text: out}
	if err != nil {
		r.Text = strings.TrimSpace(fmt.Sprintf("%s (%v)", out, err))
		return r
	}
	r.Succeeded, r.Unavailable = out == "allowed", strings.HasPrefix(out, "unavailable: ")
	return r
}

// Outside tries an attack without a sandbox.
func (f *Field) Outside(a attack.Attack) Result {
	out, err := exec.Command(f.program, "attack", a.Name, f.victim).CombinedOutput()
	return result(string(out), err)
}

// Inside tries an attack in the sandbox of a service. state is a directory for one that has one,
// which is made its user's. An error says that there was no sandbox to try it in.
func (f *Field) Inside(s *services.Service, state string, a attack.Attack) (Result, error) {
	spec, err := f.spec(s, state)
	if err != nil {
		return Result{}, err
	}
	return f.inside(spec, "attack", a.Name, f.victim)
}

// spec is the sandbox of a service, for the attacking program.
func (f *Field) spec(s *services.Service, state string) (*sandbox.Spec, error) {
	in := services.Instance{Label: s.Name, UID: uid, Memory: 64 << 20}
	if s.State == services.ReadWrite {
		in.StateDir = state
		if err := os.Chown(state, uid, uid); err != nil {
			return nil, err
		}
	}
	if s.Network {
		in.Network = f.network.File()
	}
	in.NICs = s.Name == services.QEMU // which adds to its calls
	spec, err := s.Sandbox(in)
	if err != nil {
		return nil, err
	}
	if s.Foreign() {
		// The program is in Go: it has the calls of the service's and its own runtime's.
		list := "include " + s.Policy.Name + "\ninclude go\n"
		if in.NICs {
			list = "include qemu-nics\n" + list
		}
		if spec.Policy, err = sandbox.ParsePolicy(s.Name, []byte(list)); err != nil {
			return nil, err
		}
	}
	return spec, nil
}

// inside runs the program in a sandbox.
func (f *Field) inside(spec *sandbox.Spec, args ...string) (Result, error) {
	cmd := exec.Command(f.program, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	g, err := f.host.Prepare(cmd, spec)
	if err != nil {
		return Result{}, err
	}
	start := g.Start
	if spec.NetworkNamespace != nil {
		start = func() error { return f.network.Do(g.Start) }
	}
	if err := start(); err != nil {
		return Result{}, err
	}
	err = g.Wait()
	return result(out.String(), err), nil
}

// Declared says why an attack is none for a service, because what it does is declared for it; "" for
// all others.
func Declared(service, attack string) string {
	if service == services.QEMU && attack == "executable memory" {
		return "with TCG it executes what it writes; on KVM it may not"
	}
	if service == services.NetBack && attack == "netlink socket" {
		return "by netlink it makes bridges and filter, in Redoubt's own network namespace"
	}
	return ""
}
