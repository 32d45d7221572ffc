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
	s, err := observe(filepath.Join("/proc", strconv.Itoa(pid)))
	if err != nil {
		return s, fmt.Errorf("process %d: %w", pid, err)
	}
	return s, nil
}

// ending reports whether a thread has begun to end: of one that has, its umask, its namespaces and its cgroup are taken one
// after another, in an order that is the kernel's own. Its flags say so first (proc_pid_stat(5); PF_EXITING of linux/sched.h).
func ending(task string) bool {
	const exiting = 4
	text, err := os.ReadFile(filepath.Join(task, "stat"))
	if err != nil {
		return true
	}
	// Its name, in parentheses, may hold anything; its state, four numbers and another are before the flags.
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(f) < 7 {
		return true
	}
	flags, err := strconv.ParseUint(f[6], 10, 64)
	return err != nil || flags&exiting != 0
}

// observe reads what is in force for the threads of a process, and for the process as one of them has it that did not begin to
// end meanwhile: of one that did, what was read says nothing.
func observe(dir string) (s State, err error) {
	tasks, err := filepath.Glob(filepath.Join(dir, "task", "*"))
	if err != nil {
		return s, err
	}
	var alive []string
	for _, task := range tasks {
		var t State
		text, err := os.ReadFile(filepath.Join(task, "status"))
		if ending(task) {
			continue
		}
		if err == nil {
			err = t.status(string(text))
		}
		if err != nil {
			return s, err
		}
		if alive = append(alive, task); len(alive) == 1 {
			s = t
			continue
		}
		for _, d := range s.Differences(t) {
			s.Uneven = append(s.Uneven, fmt.Sprintf("thread %s: %s", filepath.Base(task), d))
		}
	}
	for _, task := range alive {
		whole := s
		err := whole.shared(task)
		if !ending(task) {
			return whole, err
		}
	}
	return State{}, os.ErrNotExist
}

// shared reads what the threads of a process have in common, as one has it.
func (s *State) shared(task string) error {
	for _, n := range namespaces {
		theirs, err := os.Readlink(filepath.Join(task, "ns", string(n)))
		if err != nil {
			return err
		}
		ours, err := os.Readlink(filepath.Join("/proc/self/ns", string(n)))
		if err != nil {
			return err
		}
		if theirs != ours {
			s.Own = append(s.Own, n)
		}
		if n == Net {
			s.Network = theirs
		}
	}
	text, err := os.ReadFile(filepath.Join(task, "mountinfo"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if m, ok := parseMount(line); ok {
			s.Mounts = append(s.Mounts, m)
		}
	}
	if text, err = os.ReadFile(filepath.Join(task, "limits")); err != nil {
		return err
	}
	if err := s.limits(string(text)); err != nil {
		return err
	}
	s.Memory, err = memoryLimit(task)
	return err
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

// memoryLimit is the limit of a thread's memory cgroup; 0 if there is none.
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
