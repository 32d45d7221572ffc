package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A State is what is in force for a process, as the kernel reports it in /proc, or what a Spec
// declares, in the same form. (Landlock domains are not reported by the kernel.)
type State struct {
	UID, GID     uint32 // on the host
	Groups       []uint32
	Capabilities []Capability // in any of the five sets of any thread
	NoNewPrivs   bool
	Seccomp      string // "filter", "strict" or "off"
	Umask        int
	Init         bool // process 1 of its PID namespace
	Own          []Namespace
	Network      string // its network namespace, as /proc/PID/ns/net names it; declared only for a given one
	Mounts       []MountPoint
	Files        uint64
	Processes    uint64
	Core         uint64
	Memory       uint64 // of its cgroup; 0: no limit
	// Uneven names what is not the same for all threads; it is never declared.
	Uneven []string
}

func (s *Spec) umask() int {
	if s.GroupReads {
		return 0o027
	}
	return 0o077
}

// Unlimited is a limit that is none.
const Unlimited = ^uint64(0)

// Declared is the State that the Spec asks for.
func (s *Spec) Declared() State {
	d := State{
		UID: s.UID, GID: s.GID, Groups: slices.Sorted(slices.Values(s.Groups)),
		Capabilities: slices.Sorted(slices.Values(s.Capabilities)),
		NoNewPrivs:   true, Umask: s.umask(), Seccomp: "filter", Init: !s.shares(PID),
		Files: orDefault(s.Files, DefaultFiles), Processes: orDefault(s.Processes, DefaultProcesses),
		Memory: WholePages(s.Memory),
	}
	for _, n := range namespaces {
		if !s.shares(n) {
			d.Own = append(d.Own, n)
		}
	}
	if s.NetworkNamespace != nil {
		d.Network, _ = networkName(s.NetworkNamespace)
	}
	whole := false
	for _, b := range s.Root {
		if b.Link != "" {
			continue
		}
		m := MountPoint{Target: b.target(), Options: []string{"nosuid"}}
		whole = whole || m.Target == "/"
		for option, set := range map[string]bool{"ro": !b.Writable, "nodev": !b.Device, "noexec": b.NoExec} {
			if set {
				m.Options = append(m.Options, option)
			}
		}
		d.Mounts = append(d.Mounts, m)
	}
	if !whole {
		d.Mounts = append(d.Mounts, MountPoint{Target: "/", Options: []string{"ro", "nosuid", "nodev", "noexec"}})
	}
	if s.Proc {
		d.Mounts = append(d.Mounts, MountPoint{Target: "/proc", Options: []string{"nosuid", "nodev", "noexec"}})
	}
	return d
}

// WholePages is a limit of memory as the kernel keeps it.
func WholePages(limit uint64) uint64 { return limit &^ uint64(os.Getpagesize()-1) }

// networkName is a network namespace as links in /proc name it, namespaces(7).
func networkName(f *os.File) (string, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return "", err
	}
	var st unix.Stat_t
	if cerr := raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) }); cerr != nil {
		return "", cerr
	}
	return fmt.Sprintf("net:[%d]", st.Ino), err
}

// Observe reads what is in force for a process. The observer is outside of its sandbox and may
// trace it.
func Observe(pid int) (State, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	s, err := observe(dir)
	if ended(dir) { // then or meanwhile: what was read says nothing
		s, err = State{}, os.ErrNotExist
	}
	if err != nil {
		return s, fmt.Errorf("process %d: %w", pid, err)
	}
	return s, nil
}

// ended reports whether no thread of a process runs any more, though nobody may have waited for it yet.
func ended(dir string) bool {
	tasks, _ := filepath.Glob(filepath.Join(dir, "task", "*", "stat")) // the pattern is a good one
	for _, task := range tasks {
		text, err := os.ReadFile(task)
		if err != nil {
			continue
		}
		// Its name, in parentheses, may hold anything.
		if i := bytes.LastIndexByte(text, ')'); i >= 0 && i+2 < len(text) && text[i+2] != 'Z' && text[i+2] != 'X' {
			return false
		}
	}
	return true
}

func observe(dir string) (s State, err error) {
	tasks, err := filepath.Glob(filepath.Join(dir, "task", "*"))
	if err != nil || len(tasks) == 0 {
		return s, errors.Join(err, os.ErrNotExist)
	}
	seen := 0
	for _, task := range tasks {
		var t State
		text, err := os.ReadFile(filepath.Join(task, "status"))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread has ended
		}
		if err == nil && !strings.Contains(string(text), "\nUmask:") {
			continue // it ends: exit(2) has taken its file system state, in which that is, and more
		}
		if err == nil {
			err = t.status(string(text))
		}
		if err != nil {
			return s, err
		}
		if seen++; seen == 1 {
			s = t
			continue
		}
		for _, d := range s.Differences(t) {
			s.Uneven = append(s.Uneven, fmt.Sprintf("thread %s: %s", filepath.Base(task), d))
		}
	}
	if seen == 0 {
		return s, os.ErrNotExist
	}
	for _, n := range namespaces {
		theirs, err := os.Readlink(filepath.Join(dir, "ns", string(n)))
		if err != nil {
			return s, err
		}
		ours, err := os.Readlink(filepath.Join("/proc/self/ns", string(n)))
		if err != nil {
			return s, err
		}
		if theirs != ours {
			s.Own = append(s.Own, n)
		}
		if n == Net {
			s.Network = theirs
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "mountinfo"))
	if err != nil {
		return s, err
	}
	for line := range strings.Lines(string(text)) {
		if m, ok := parseMount(line); ok {
			s.Mounts = append(s.Mounts, m)
		}
	}
	if text, err = os.ReadFile(filepath.Join(dir, "limits")); err != nil {
		return s, err
	}
	if err := s.limits(string(text)); err != nil {
		return s, err
	}
	s.Memory, err = memoryLimit(dir)
	return s, err
}

// status reads /proc/PID/status.
func (s *State) status(text string) error {
	f := map[string]string{}
	for line := range strings.Lines(text) {
		k, v, _ := strings.Cut(line, ":")
		f[k] = strings.TrimSpace(v)
	}
	ids := func(key string) (uint32, error) {
		all := strings.Fields(f[key]) // real, effective, saved, file system
		if len(all) != 4 {
			return 0, fmt.Errorf("status: %s: %q", key, f[key])
		}
		if slices.Sort(all); all[0] != all[3] {
			return 0, fmt.Errorf("status: %s: %s: its ids differ", key, f[key])
		}
		n, err := strconv.ParseUint(all[0], 10, 32)
		return uint32(n), err
	}
	var err error
	if s.UID, err = ids("Uid"); err != nil {
		return err
	}
	if s.GID, err = ids("Gid"); err != nil {
		return err
	}
	for _, g := range strings.Fields(f["Groups"]) {
		n, err := strconv.ParseUint(g, 10, 32)
		if err != nil {
			return err
		}
		s.Groups = append(s.Groups, uint32(n))
	}
	slices.Sort(s.Groups)
	var all uint64
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		n, err := strconv.ParseUint(f[set], 16, 64)
		if err != nil {
			return fmt.Errorf("status: %s: %w", set, err)
		}
		all |= n
	}
	for c := Capability(0); c < 64; c++ {
		if all>>c&1 != 0 {
			s.Capabilities = append(s.Capabilities, c)
		}
	}
	s.NoNewPrivs = f["NoNewPrivs"] == "1"
	umask, err := strconv.ParseUint(f["Umask"], 8, 16)
	if err != nil {
		return fmt.Errorf("status: Umask: %w", err)
	}
	s.Umask = int(umask)
	switch f["Seccomp"] {
	case "0":
		s.Seccomp = "off"
	case "1":
		s.Seccomp = "strict"
	case "2":
		s.Seccomp = "filter"
	}
	pids := strings.Fields(f["NSpid"])
	tgids := strings.Fields(f["NStgid"])
	s.Init = len(pids) > 1 && len(tgids) > 0 && tgids[len(tgids)-1] == "1"
	return nil
}

// limits reads /proc/PID/limits, whose columns are fixed.
func (s *State) limits(text string) error {
	want := map[string]*uint64{
		"Max open files": &s.Files, "Max processes": &s.Processes, "Max core file size": &s.Core,
	}
	for line := range strings.Lines(text) {
		if len(line) < 68 {
			continue
		}
		p := want[strings.TrimSpace(line[:26])]
		if p == nil {
			continue
		}
		delete(want, strings.TrimSpace(line[:26]))
		hard := strings.Fields(line[46:])[0]
		if hard == "unlimited" {
			*p = Unlimited
			continue
		}
		n, err := strconv.ParseUint(hard, 10, 64)
		if err != nil {
			return fmt.Errorf("limits: %w", err)
		}
		*p = n
	}
	if len(want) > 0 {
		return fmt.Errorf("limits: no %v", slices.Collect(maps.Keys(want)))
	}
	return nil
}

// memoryLimit is the limit of a process's memory cgroup; 0 if there is none.
func memoryLimit(dir string) (uint64, error) {
	own, err := os.ReadFile(filepath.Join(dir, "cgroup"))
	if err != nil {
		return 0, err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return 0, err
	}
	c, err := locateCgroup(string(own), string(mounts))
	if errors.Is(err, errNoCgroup) {
		return 0, nil // no limit is in force
	}
	if err != nil {
		return 0, err
	}
	file := "memory.limit_in_bytes"
	if c.v2 {
		file = "memory.max"
	}
	b, err := os.ReadFile(filepath.Join(c.dir, file))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil // the root group of version 2 has no limit
	}
	if err != nil {
		return 0, err
	}
	v := string(bytes.TrimSpace(b))
	n, err := strconv.ParseUint(v, 10, 64)
	if v == "max" || n >= 1<<62 { // version 1 says "none" by the largest number of pages
		return 0, nil
	}
	return n, err
}

// Differences says in words where other is not what s is; nil if it is.
func (s State) Differences(other State) (out []string) {
	differ := func(what string, a, b any) {
		if x, y := fmt.Sprint(a), fmt.Sprint(b); x != y {
			out = append(out, fmt.Sprintf("%s: %s, not %s", what, y, x))
		}
	}
	differ("user", s.UID, other.UID)
	differ("group", s.GID, other.GID)
	differ("groups", s.Groups, other.Groups)
	differ("capabilities", s.Capabilities, other.Capabilities)
	differ("no_new_privs", s.NoNewPrivs, other.NoNewPrivs)
	differ("umask", fmt.Sprintf("%04o", s.Umask), fmt.Sprintf("%04o", other.Umask))
	differ("seccomp", s.Seccomp, other.Seccomp)
	differ("init of its PID namespace", s.Init, other.Init)
	differ("own namespaces", s.Own, other.Own)
	if s.Network != "" {
		differ("network namespace", s.Network, other.Network)
	}
	differ("descriptors", s.Files, other.Files)
	differ("processes", s.Processes, other.Processes)
	differ("core dumps", s.Core, other.Core)
	differ("memory", s.Memory, other.Memory)
	differ("mounts", mountList(s.Mounts), mountList(other.Mounts))
	for _, u := range other.Uneven {
		out = append(out, "uneven: "+u)
	}
	return out
}

// mountList is the comparable part of mounts: what can be written, executed and raised where.
func mountList(mounts []MountPoint) []string {
	var out []string
	for _, m := range mounts {
		kept := []string{}
		for _, o := range []string{"ro", "nosuid", "nodev", "noexec"} {
			if hasOption(m.Options, o) {
				kept = append(kept, o)
			}
		}
		out = append(out, m.Target+"("+strings.Join(kept, ",")+")")
	}
	slices.Sort(out)
	return out
}
