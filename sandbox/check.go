package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Lack is an ingredient that this host has not, and why.
type Lack struct {
	Ingredient Ingredient
	Reason     error
}

func (l Lack) Error() string { return fmt.Sprintf("no %s: %v", l.Ingredient, l.Reason) }

// Check lists what this host lacks for sandboxes. Empty means that every Spec can be carried
// out; otherwise processes whose Spec does not call the ingredient optional do not start.
func Check() []Lack {
	var out []Lack
	for _, c := range []struct {
		ingredient Ingredient
		try        func() error
	}{
		{UserNamespaces, tryUserNamespaces},
		{Seccomp, trySeccomp},
		{Landlock, func() error { _, err := landlockABI(); return err }},
		{MountAPI, tryMountAPI},
		{MemoryCgroup, func() error { _, err := FindCgroup(); return err }},
	} {
		if err := c.try(); err != nil {
			out = append(out, Lack{c.ingredient, err})
		}
	}
	return out
}

func tryUserNamespaces() error {
	if os.Geteuid() != 0 {
		return errors.New("sandboxes with users of their own are made by root")
	}
	if _, err := os.Stat("/proc/self/ns/user"); err != nil {
		return errors.New("not in this kernel (CONFIG_USER_NS)")
	}
	b, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	if err == nil && string(bytes.TrimSpace(b)) == "0" {
		return errors.New("switched off by user.max_user_namespaces=0")
	}
	// Made for a child that then finds nothing to execute: that failure is the good end.
	_, err = syscall.ForkExec("", []string{""}, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags:  allSpaces,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1, Size: 1}},
	}})
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w (the kernel makes none in a chroot, and for those who may not map users)", err)
	}
	return err
}

// tryMountAPI makes a detached mount, as for a root's entries.
func tryMountAPI() error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_tree (Linux 5.2, CAP_SYS_ADMIN): %w", err)
	}
	defer unix.Close(fd)
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, attr); err != nil {
		return fmt.Errorf("mount_setattr (Linux 5.12): %w", err)
	}
	return nil
}
