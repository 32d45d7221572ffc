package services

import (
	"fmt"
	"slices"
	"strings"
)

// Page is the table as a page of the documentation, in Markdown.
func Page() string {
	var b strings.Builder
	b.WriteString(`# The table of services

Made from services/table.go by ` + "`go test ./services -rewrite`" + `; do not edit. The Builder makes every
sandbox from the same table, and ` + "`redoubt services`" + ` holds it against what is in force. The Builder itself is
not in it: it makes the others and nothing confines it; nor is the Supervisor, which keeps the Builder running.

All of them: a user of their own, no_new_privs, a list of system calls, Landlock, limits, an empty read-only root but
for what is named here, and namespaces of their own but for those named here. None opens a network but ` + "`netback`" + `, its
tenant's.

## Who creates whom

`)
	b.WriteString("```\n")
	b.WriteString(tree(Builder, "", map[string]bool{}))
	b.WriteString("```\n\nThe Builder starts each process; a service's creator is the one that asks for it.\n\n## Who talks to whom\n\n```\n")
	b.WriteString(talks())
	b.WriteString("```\n\nNobody else has a descriptor of the other. An arrow goes both ways.\n")
	for i := range Table {
		s := &Table[i]
		fmt.Fprintf(&b, "\n## %s\n\n%s.\n\n| | |\n|---|---|\n", s.Name, s.Purpose)
		row := func(what, text string) {
			if text != "" {
				fmt.Fprintf(&b, "| %s | %s |\n", what, text)
			}
		}
		row("program", "`"+s.Program+"`")
		row("in Xoar", s.Seed)
		row("how many", string(s.Count))
		row("shared by", string(s.Tag))
		row("asked for by", s.Creator)
		row("needs", strings.Join(s.DependsOn, ", "))
		row("lives", s.Lifetime)
		row("replaced", string(s.Reset))
		if s.Outlives() {
			row("when the Builder dies", "goes on")
		}
		row("holds", strings.Join(s.Holds, "; "))
		row("root", strings.Join(s.files(), ", "))
		if s.Network {
			row("network namespace", "its tenant's, of Redoubt's own, with taps, bridges and filter; the Builder holds it and it outlives the process")
		}
		row("capabilities", s.capabilities())
		if len(s.Share) > 0 {
			names := make([]string, len(s.Share))
			for i, n := range s.Share {
				names[i] = string(n)
			}
			row("namespaces of the host", strings.Join(names, ", ")+": "+s.ShareWhy)
		}
		memory := fmt.Sprintf("%d MiB", s.Memory/mib)
		switch {
		case s.GuestMemory && s.Tag != OneGuest:
			memory += " and its guests'"
		case s.GuestMemory:
			memory += " and its guest's"
		}
		row("memory", memory)
		row("system calls", fmt.Sprintf("list `%s`", s.Policy.Name))
	}
	return b.String()
}

// files are what a service's root holds, in words.
func (s *Service) files() []string {
	var out []string
	if s.State == ReadWrite {
		out = append(out, "its own directory at "+StateDir+" (writable)")
	}
	out = append(out, s.Devices...)
	if s.Packages != nil {
		out = append(out, "its package's program, libraries and data (read-only)")
	}
	if s.Proc {
		out = append(out, "/proc of its own processes")
	}
	if out == nil {
		out = []string{"nothing"}
	}
	return out
}

func (s *Service) capabilities() string {
	if len(s.Capabilities) == 0 {
		return "none"
	}
	names := make([]string, len(s.Capabilities))
	for i, c := range s.Capabilities {
		names[i] = c.String()
	}
	return strings.Join(names, ", ")
}

// tree draws who asks for whom, from a service down.
func tree(name, indent string, seen map[string]bool) string {
	out := indent + name
	for i := range Table {
		if s := &Table[i]; s.Name == name && s.Count != One {
			out += " (" + string(s.Count) + ")"
		}
	}
	out += "\n"
	if seen[name] {
		return out
	}
	seen[name] = true
	for i := range Table {
		if Table[i].Creator == name {
			out += tree(Table[i].Name, indent+"    ", seen)
		}
	}
	return out
}

// talks lists each connection once.
func talks() string {
	var lines []string
	seen := map[string]bool{}
	for i := range Table {
		s := &Table[i]
		for _, p := range s.Peers {
			ends := []string{s.Name, p.Service}
			slices.Sort(ends)
			if key := strings.Join(ends, " "); !seen[key] {
				seen[key] = true
				lines = append(lines, fmt.Sprintf("%-12s <-> %-26s %s\n", s.Name, p.Service, p.Over))
			}
		}
	}
	return strings.Join(lines, "")
}
