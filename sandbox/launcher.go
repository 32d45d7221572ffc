package sandbox

// The launcher: the child's side of the way into the sandbox. It runs in the new namespaces,
// before the program.

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// launcherName is argument 0 of a launcher.
const launcherName = "redoubt-launcher"

// launcherEnv keeps the Go runtime from interrupting the last steps, from making more threads than endWithParent needs, and from
// asking for its control group's processors.
var launcherEnv = []string{"GODEBUG=asyncpreemptoff=1,containermaxprocs=0,updatemaxprocs=0", "GOGC=off", "GOMAXPROCS=2"}

// Descriptors of a launcher, counted from the first that is not the program's own.
const (
	fdSync    = iota // a socket to the parent
	fdConfig         // the configuration, as JSON
	fdProgram        // what to execute
	fdBinds          // the detached mounts of the root, in order
)

// config is what the parent tells the launcher.
type config struct {
	Spec    *launchSpec
	Filter  []byte // see encodeFilter
	Args    []string
	Env     []string
	OwnUser bool // a user namespace of its own
}

// launchSpec is the part of a Spec that the launcher carries out.
type launchSpec struct {
	Root             []Bind
	Proc             bool
	UID, GID         uint32
	Groups           []uint32
	Capabilities     []Capability
	Files, Processes uint64
	DataLimit        uint64
	NoLandlock       bool
	Umask            int
	OwnUTS           bool
	OwnNet           bool
}

// Messages of the launcher to the parent.
const (
	msgFailed = 'F' // and the reason
	msgFilter = 'L' // and the number of the listening descriptor, 4 bytes
	msgExec   = 'E' // and the error of execveat, 4 bytes
	msgGo     = 'G' // of the parent: go on
)

// LauncherMain makes a process started by a [Guard] a launcher and does not return; in every
// other process it does nothing. A program that starts sandboxes with itself as the launcher
// calls it first in main.
func LauncherMain() {
	if len(os.Args) != 2 || os.Args[0] != launcherName {
		return
	}
	base, err := strconv.Atoi(os.Args[1])
	if err != nil || base < 3 {
		fmt.Fprintln(os.Stderr, launcherName+": started by hand")
		os.Exit(1)
	}
	// All that follows belongs to this thread, which becomes the program.
	runtime.LockOSThread()
	err = launch(base)
	msg := append([]byte{msgFailed}, err.Error()...)
	_, _ = unix.Write(base+fdSync, msg)
	os.Exit(1)
}

// endWithParent ends this process when its parent's end of the socket is gone, for as long as it is a launcher. The last step, execve,
// waits for the parent's word: the kernel would keep it waiting for ever, since this process itself has the listener open.
// It is another thread that reads, without a filter; execve ends it.
func endWithParent(sync int) {
	begun := make(chan struct{})
	go func() {
		close(begun)
		var b [1]byte
		_, _ = eintr.Value(func() (int, error) { return unix.Read(sync, b[:]) }) // the parent says nothing more
		os.Exit(1)
	}()
	<-begun
}

// launch does not return unless it fails.
func launch(base int) error {
	// Nothing but the program's own descriptors reaches the program, whatever the parent leaks.
	if err := unix.CloseRange(uint(base), ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close_range: %w", err)
	}
	f := os.NewFile(uintptr(base+fdConfig), "config")
	text, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	var c config
	if err := json.Unmarshal(text, &c); err != nil {
		return err
	}
	var b [1]byte
	if n, err := unix.Read(base+fdSync, b[:]); err != nil || n != 1 || b[0] != msgGo {
		return errors.New("the parent has gone")
	}
	endWithParent(base + fdSync)
	s := c.Spec
	if err := makeRoot(s, base+fdBinds); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	if s.OwnUTS {
		if err := unix.Sethostname([]byte("sandbox")); err != nil {
			return fmt.Errorf("host name: %w", err)
		}
	}
	unix.Umask(s.Umask)
	var domain int
	if !s.NoLandlock {
		// Before the capabilities go: it opens the root's entries.
		if domain, err = landlockDomain(s, base+fdProgram); err != nil {
			return fmt.Errorf("landlock: %w", err)
		}
	}
	if err := setLimits(s); err != nil {
		return err
	}
	if err := dropPrivileges(s, c.OwnUser); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	if !s.NoLandlock {
		if err := landlockRestrict(domain); err != nil {
			return fmt.Errorf("landlock: %w", err)
		}
	}
	return filterAndExec(base, c.Filter, c.Args, c.Env)
}

// makeRoot replaces the mount namespace's tree by a read-only one with s.Root in it.
func makeRoot(s *launchSpec, firstBind int) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	var root int
	var err error
	whole := len(s.Root) == 1 && s.Root[0].target() == "/"
	if whole {
		root = firstBind
	} else if root, err = newTmpfs(); err != nil {
		return err
	}
	// The new root is mounted over the old one, so that no directory is needed for it.
	if err := unix.MoveMount(root, "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	if !whole {
		for i, b := range s.Root {
			if err := addEntry(root, b, firstBind+i); err != nil {
				return fmt.Errorf("%s: %w", b.target(), err)
			}
		}
	}
	if s.Proc {
		if err := addProc(root); err != nil {
			return fmt.Errorf("/proc: %w", err)
		}
	}
	// pivot_root(2), NOTES: with "." twice the old root ends up under the new one and is
	// unmounted from there.
	if err := unix.Fchdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount of the host's tree: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if !whole {
		attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(unix.AT_FDCWD, "/", 0, attr); err != nil {
			return fmt.Errorf("read-only: %w", err)
		}
	}
	return nil
}

// newTmpfs makes a small file system that is mounted nowhere yet.
func newTmpfs() (int, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(fs)
	for _, o := range [][2]string{{"size", "256k"}, {"nr_inodes", "1024"}, {"mode", "0755"}} {
		if err := unix.FsconfigSetString(fs, o[0], o[1]); err != nil {
			return -1, fmt.Errorf("tmpfs %s: %w", o[0], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("tmpfs: %w", err)
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
}

// addEntry puts one entry into the new root.
func addEntry(root int, b Bind, mount int) error {
	name := strings.TrimPrefix(b.target(), "/")
	if err := makeDirs(root, filepath.Dir(name)); err != nil {
		return err
	}
	if b.Link != "" {
		return unix.Symlinkat(b.Link, root, name)
	}
	var st unix.Stat_t
	if err := unix.Fstat(mount, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := makeDirs(root, name); err != nil {
			return err
		}
	} else {
		fd, err := unix.Openat(root, name, unix.O_CREAT|unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o444)
		if err != nil {
			return err
		}
		unix.Close(fd)
	}
	if err := unix.MoveMount(mount, "", root, name, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	return nil
}

func makeDirs(root int, name string) error {
	if name == "." {
		return nil
	}
	if err := makeDirs(root, filepath.Dir(name)); err != nil {
		return err
	}
	if err := unix.Mkdirat(root, name, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("mkdir %s: %w", name, err)
	}
	return nil
}

// addProc mounts a proc of this PID namespace that shows processes only, proc(5).
func addProc(root int) error {
	fs, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "subset", "pid"); err != nil {
		return err
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return err
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return err
	}
	if err := makeDirs(root, "proc"); err != nil {
		return err
	}
	return unix.MoveMount(m, "", root, "proc", unix.MOVE_MOUNT_F_EMPTY_PATH)
}

func setLimits(s *launchSpec) error {
	for _, l := range []struct {
		name     string
		resource int
		value    uint64
	}{
		{"core dumps", unix.RLIMIT_CORE, 0},
		{"descriptors", unix.RLIMIT_NOFILE, s.Files},
		{"processes", unix.RLIMIT_NPROC, s.Processes},
		{"data", unix.RLIMIT_DATA, s.DataLimit},
	} {
		if l.resource == unix.RLIMIT_DATA && l.value == 0 {
			continue
		}
		var now unix.Rlimit
		if err := unix.Prlimit(0, l.resource, nil, &now); err != nil {
			return fmt.Errorf("limit of %s: %w", l.name, err)
		}
		v := min(l.value, now.Max) // a limit may be lowered by anybody, raised by CAP_SYS_RESOURCE
		if err := unix.Prlimit(0, l.resource, &unix.Rlimit{Cur: v, Max: v}, nil); err != nil {
			return fmt.Errorf("limit of %s: %w", l.name, err)
		}
	}
	return nil
}
