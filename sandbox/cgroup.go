package sandbox

// The memory limit. Written here, not taken from a library: it is two files per cgroup version,
// and the libraries bring systemd's and every other controller.

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A Cgroup is a memory cgroup beneath which groups for processes can be made.
type Cgroup struct {
	dir string
	v2  bool
}

// Dir is its directory.
func (c *Cgroup) Dir() string { return c.dir }

// FindCgroup is the running process's own memory cgroup, of version 1 or 2. In version 2 a group
// with processes cannot limit children (cgroups(7), "no internal processes"): if this process
// is alone in its group, as in a systemd unit with Delegate=yes, it moves into a child group.
func FindCgroup() (*Cgroup, error) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	c, err := locateCgroup(string(own), string(mounts))
	if err != nil {
		return nil, err
	}
	if err := unix.Access(c.dir, unix.W_OK); err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", c.dir, err)
	}
	if c.v2 {
		if filepath.Base(c.dir) == ownGroup { // it has moved, or its parent process has
			c.dir = filepath.Dir(c.dir)
		}
		return c, c.delegate()
	}
	return c, nil
}

// ownGroup is the group into which a process moves so that its last one can have children.
const ownGroup = "redoubt-main"

var errNoCgroup = errors.New("no cgroup file system with this process's memory group is mounted")

// locateCgroup finds the directory of the memory controller from /proc/self/cgroup and mountinfo.
func locateCgroup(own, mounts string) (*Cgroup, error) {
	paths := map[string]string{} // "memory" or "" for version 2
	for line := range strings.Lines(own) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		for k := range strings.SplitSeq(f[1], ",") {
			paths[k] = f[2]
		}
	}
	var v2 *Cgroup
	for line := range strings.Lines(mounts) {
		m, ok := parseMount(line)
		if !ok {
			continue
		}
		key := "memory"
		if m.Type == "cgroup2" {
			key = ""
		} else if m.Type != "cgroup" || !hasOption(m.superOptions, "memory") {
			continue
		}
		p, ok := paths[key]
		if !ok {
			continue
		}
		rel, err := filepath.Rel(m.root, p)
		if err != nil || strings.HasPrefix(rel, "..") {
			continue // the mount does not show our group
		}
		c := &Cgroup{filepath.Join(m.Target, rel), key == ""}
		if !c.v2 {
			return c, nil
		}
		v2 = c
	}
	if v2 == nil {
		return nil, errNoCgroup
	}
	return v2, nil
}

// delegate makes children of a version 2 group have the memory controller.
func (c *Cgroup) delegate() error {
	has := func(file string) bool {
		b, _ := os.ReadFile(filepath.Join(c.dir, file))
		return bytes.Contains(append(append([]byte(" "), bytes.TrimSpace(b)...), ' '), []byte(" memory "))
	}
	if has("cgroup.subtree_control") {
		return nil
	}
	if !has("cgroup.controllers") {
		return fmt.Errorf("cgroup %s: its memory controller is not enabled from above", c.dir)
	}
	enable := func() error {
		return writeControl(c.dir, "cgroup.subtree_control", "+memory")
	}
	err := enable()
	if !errors.Is(err, unix.EBUSY) {
		return err
	}
	own := filepath.Join(c.dir, ownGroup)
	if err := os.Mkdir(own, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := writeControl(own, "cgroup.procs", "0"); err != nil {
		return err
	}
	if err := enable(); err != nil {
		// Back: somebody else lives here.
		return fmt.Errorf("cgroup %s is not ours alone (in a systemd unit: Delegate=yes): %w", c.dir,
			errors.Join(err, writeControl(c.dir, "cgroup.procs", "0"), os.Remove(own)))
	}
	return nil
}

// writeControl writes a control file, which exists or the kernel lacks it.
func writeControl(dir, file, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(value)
	return err
}

// A group holds one process and what it starts.
type group struct {
	dir string
	v2  bool
}

var groups atomic.Uint64

// groupPrefix begins groups' names. The rest is the process's name, and the number of who made it and its own there.
const groupPrefix = "redoubt-"

// Sweep removes groups that processes made which were killed: who makes one removes it in the end. It returns how many. Those in which
// something runs stay.
func (c *Cgroup) Sweep() (n int) {
	entries, _ := os.ReadDir(c.dir) // what is not seen stays
	for _, e := range entries {
		f := strings.Split(e.Name(), "-")
		if !strings.HasPrefix(e.Name(), groupPrefix) || len(f) < 4 {
			continue
		}
		maker, err := strconv.Atoi(f[len(f)-2])
		if err != nil || maker <= 0 || !errors.Is(unix.Kill(maker, 0), unix.ESRCH) {
			continue
		}
		if unix.Rmdir(filepath.Join(c.dir, e.Name())) == nil {
			n++
		}
	}
	return n
}

// child makes a group with a limit.
func (c *Cgroup) child(name string, limit uint64) (*group, error) {
	g := &group{v2: c.v2}
	for {
		g.dir = filepath.Join(c.dir, fmt.Sprintf("%s%s-%d-%d", groupPrefix, name, os.Getpid(), groups.Add(1)))
		err := os.Mkdir(g.dir, 0o755)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrExist) { // else it is left of a process that had this one's number
			return nil, fmt.Errorf("memory cgroup: %w", err)
		}
	}
	// Swap would make the limit one of speed, and puts guests' secrets on disk.
	files := []string{"memory.limit_in_bytes", "memory.memsw.limit_in_bytes"}
	values := []string{strconv.FormatUint(limit, 10), strconv.FormatUint(limit, 10)}
	if c.v2 {
		files, values = []string{"memory.max", "memory.swap.max"}, []string{values[0], "0"}
	}
	for i, f := range files {
		err := writeControl(g.dir, f, values[i])
		if err != nil && (i == 0 || !errors.Is(err, os.ErrNotExist)) { // a kernel may not account swap
			return nil, errors.Join(fmt.Errorf("memory cgroup: %w", err), g.remove())
		}
	}
	return g, nil
}

// grow raises the limit. What may be swapped with version 1 is raised first: it is never below.
func (g *group) grow(limit uint64) error {
	files := []string{"memory.memsw.limit_in_bytes", "memory.limit_in_bytes"}
	if g.v2 {
		files = []string{"memory.max"}
	}
	for i, f := range files {
		err := writeControl(g.dir, f, strconv.FormatUint(limit, 10))
		if err != nil && (i == len(files)-1 || !errors.Is(err, os.ErrNotExist)) {
			return fmt.Errorf("memory cgroup: %w", err)
		}
	}
	return nil
}

func (g *group) add(pid int) error {
	if err := writeControl(g.dir, "cgroup.procs", strconv.Itoa(pid)); err != nil {
		return fmt.Errorf("memory cgroup: %w", err)
	}
	return nil
}

// oomKills is how many processes of the group its limit has killed.
func (g *group) oomKills() int {
	file := "memory.oom_control"
	if g.v2 {
		file = "memory.events"
	}
	b, _ := os.ReadFile(filepath.Join(g.dir, file))
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(v))
			return n
		}
	}
	return 0
}

// remove ends the group; its processes are gone.
func (g *group) remove() error {
	if err := unix.Rmdir(g.dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("memory cgroup %s: %w", g.dir, err)
	}
	return nil
}

// limitMemory makes a cgroup, or where the Spec allows that, a limit of data instead.
func (g *Guard) limitMemory(h *Host, s *launchSpec) error {
	parent, err := h.Cgroup, error(nil)
	if parent == nil {
		parent, err = FindCgroup()
	}
	if err == nil {
		g.group, err = parent.child(g.spec.Name, g.spec.Memory)
	}
	if err != nil {
		if !g.spec.optional(MemoryCgroup) {
			return err
		}
		s.DataLimit = g.spec.Memory + goReserve
	}
	return nil
}

// goReserve is what a Go program maps before it uses any of it: RLIMIT_DATA counts private
// writable mappings as soon as they are made (getrlimit(2)), and the runtime maps its heap by
// 64 MiB.
const goReserve = 128 << 20

func (g *Guard) dropGroup() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.group == nil {
		return nil
	}
	err := g.group.remove()
	g.group = nil
	return err
}

// GrowMemory raises the limit of a running process to that many bytes, for one that is given memory
// of others to share: a page counts as that process's which touches it first. The Spec's own
// limit stays what [Spec.Declared] says.
func (g *Guard) GrowMemory(limit uint64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.group == nil || limit <= g.limit {
		return nil // shared memory counts for a limit of data not at all
	}
	if err := g.group.grow(limit); err != nil {
		return fmt.Errorf("sandbox of %s: %w", g.spec.Name, err)
	}
	g.limit = limit
	return nil
}

// ErrMemory is the end of a process by its memory limit.
var ErrMemory = errors.New("was killed by its memory limit")
