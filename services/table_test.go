package services_test

import (
	"flag"
	"os"
	"slices"
	"testing"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/services"
)

var rewrite = flag.Bool("rewrite", false, "write the generated pages of docs anew")

// The page of the documentation is what the table says.
// uid is of nobody on the machine.
const uid = 0x52450020

func TestPage(t *testing.T) { samePage(t, "../docs/SERVICES-TABLE.md", services.Page()) }

// samePage holds a generated page against what lies in docs.
func samePage(t *testing.T, file, want string) {
	t.Helper()
	if *rewrite {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != want {
		t.Errorf("%s is out of date: go test ./services -rewrite", file)
	}
}

// Every service is declared whole, its creator and peers are known, and a connection between two
// services is declared by both.
func TestTable(t *testing.T) {
	outside := []string{services.Builder, "xenstore clients of root", "redoubt (the operator)"}
	names := map[string]*services.Service{}
	for i := range services.Table {
		s := &services.Table[i]
		if names[s.Name] != nil {
			t.Errorf("%s is there twice", s.Name)
		}
		names[s.Name] = s
		for field, v := range map[string]string{
			"program": s.Program, "seed": s.Seed, "purpose": s.Purpose, "creator": s.Creator,
			"count": string(s.Count), "lifetime": s.Lifetime, "reset": string(s.Reset), "tag": string(s.Tag),
		} {
			if v == "" {
				t.Errorf("%s: no %s", s.Name, field)
			}
		}
		if s.Policy == nil || s.Memory == 0 || len(s.Peers) == 0 {
			t.Errorf("%s: without a list, a memory limit or a peer", s.Name)
		}
		if (len(s.Share) == 0) != (s.ShareWhy == "") {
			t.Errorf("%s: shares namespaces without a reason, or has a reason without sharing", s.Name)
		}
	}
	for _, s := range names {
		for _, name := range append([]string{s.Creator}, s.DependsOn...) {
			if name != services.Builder && names[name] == nil {
				t.Errorf("%s names %q, which is not there", s.Name, name)
			}
		}
		for _, p := range s.Peers {
			if slices.Contains(outside, p.Service) {
				continue
			}
			other := names[p.Service]
			if other == nil {
				t.Errorf("%s talks to %q, which is not there", s.Name, p.Service)
				continue
			}
			if !slices.ContainsFunc(other.Peers, func(q services.Peer) bool { return q.Service == s.Name }) {
				t.Errorf("%s talks to %s, which does not know", s.Name, p.Service)
			}
		}
	}
}

// A sandbox can be made for every service, and one with or without a directory is not mistaken for
// the other.
func TestSandboxes(t *testing.T) {
	tools, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("REDOUBT_TOOLS", tools.Tools())
	ns, err := network.NewNamespace()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ns.Close() }()
	for i := range services.Table {
		s := &services.Table[i]
		in := services.Instance{Label: s.Name, UID: uid}
		if s.State == services.ReadWrite {
			in.StateDir = t.TempDir()
		}
		if s.Network {
			in.Network = ns.File()
		}
		spec, err := s.Sandbox(in)
		if err != nil {
			t.Errorf("%s: %v", s.Name, err)
			continue
		}
		if spec.UID != uid || spec.GID != uid || spec.Memory != s.Memory {
			t.Errorf("%s: %+v", s.Name, spec)
		}
		if in.StateDir == "" {
			in.StateDir = t.TempDir()
		} else {
			in.StateDir = ""
		}
		if _, err := s.Sandbox(in); err == nil {
			t.Errorf("%s: a directory too many or too few is no error", s.Name)
		}
		if in.Network = ns.File(); s.Network {
			in.Network = nil
		}
		if _, err := s.Sandbox(in); err == nil {
			t.Errorf("%s: a network namespace too many or too few is no error", s.Name)
		}
		in.KVM = true
		if _, err := s.Sandbox(in); err == nil && s.Name != services.QEMU {
			t.Errorf("%s: got /dev/kvm by name", s.Name)
		}
	}
}
