package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/kvm"
	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/sandbox"
)

// A finding is one thing this host can or cannot do.
type finding struct {
	What   string `json:"what"`
	OK     bool   `json:"ok"`
	Needed bool   `json:"needed"` // without it Redoubt runs no guest at all
	Detail string `json:"detail"` // what was found, or why not
	Mend   string `json:"mend,omitempty"`
}

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "doctor",
		Short:   "Say what this host can do, and why not the rest",
		Long:    "Looks at this host and says what Redoubt can do on it, and why not the rest. The exit status is\n1 where something is missing that no guest can do without.",
		Example: "  redoubt doctor\n  redoubt doctor --json",
		Args:    names(0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			all := a.examine()
			bad := false
			for _, f := range all {
				bad = bad || (f.Needed && !f.OK)
			}
			if a.json {
				if err := a.printJSON(all); err != nil {
					return err
				}
			} else {
				for _, f := range all {
					mark := "yes"
					if !f.OK {
						mark = "no "
					}
					fmt.Fprintf(a.out, "%s  %-28s %s\n", mark, f.What, f.Detail)
					if !f.OK && f.Mend != "" {
						fmt.Fprintf(a.out, "     %-28s mend: %s\n", "", f.Mend)
					}
				}
			}
			if bad {
				return exitError(1)
			}
			return nil
		},
	}
}

func (a *app) examine() []finding {
	root := os.Geteuid() == 0
	all := []finding{{
		What: "run as root", OK: root, Needed: true, Detail: fmt.Sprintf("effective user %d", os.Geteuid()), Mend: "use sudo",
	}}
	accel, why := qemu.ChooseAccel()
	native := finding{What: "native monitor (KVM)", OK: accel == qemu.KVM, Detail: why}
	if !native.OK {
		native.Mend = "load kvm_intel or kvm_amd on a processor with VT-x or AMD-V (and nested virtualisation inside another machine); meanwhile guests run under QEMU"
	}
	all = append(all, native, modules(native.OK))
	qemuAt := program("qemu-system-x86_64", "QEMU back end", false, "install qemu-system-x86")
	if qemuAt.OK && accel != qemu.KVM {
		qemuAt.Detail += ", software emulation: about ten times slower than KVM, and a guest's processors take turns on one"
	}
	if !native.OK {
		qemuAt.Needed = true
	}
	all = append(all, qemuAt,
		program("swtpm", "vTPM engine", true, "install swtpm"),
		file("SeaBIOS guests", qemu.FirmwareImage(qemu.SeaBIOS), "install seabios"),
		file("OVMF guests", qemu.FirmwareImage(qemu.OVMF), "install ovmf"),
	)
	tpm := finding{What: "host TPM for the root key", Detail: "/dev/tpmrm0", Mend: "without one the root key is a 0600 file in the state directory"}
	if _, err := os.Stat("/dev/tpmrm0"); err != nil {
		tpm.Detail = err.Error()
	} else {
		tpm.OK, tpm.Mend = true, ""
	}
	all = append(all, tpm, hugePages(), scheduling(a.autogroup()), sandboxes())
	for _, d := range []struct{ what, dir string }{{"run directory", a.runDir}, {"state directory", a.stateDir}} {
		all = append(all, directory(d.what, d.dir))
	}
	running := finding{What: "services running", Mend: "redoubt up"}
	if pid, err := a.running(); err != nil {
		running.Detail, running.Mend = err.Error(), ""
	} else if pid != 0 {
		running.OK, running.Detail, running.Mend = true, fmt.Sprintf("process %d", pid), ""
	} else {
		running.Detail = "not started on " + a.runDir
	}
	return append(all, running)
}

// modules: what the native monitor isolates a guest's kernel modules with.
func modules(native bool) finding {
	f := finding{What: "isolation of kernel modules", Mend: "a kernel from 5.14 on; guests without `modules:` in their spec need none of it"}
	if !native {
		f.Detail, f.Mend = "only guests of the native monitor", ""
		return f
	}
	s, err := kvm.Open()
	if err != nil {
		f.Detail = err.Error()
		return f
	}
	if err := errors.Join(isolate.Supported(s), s.Close()); err != nil {
		f.Detail = err.Error()
		return f
	}
	f.OK, f.Detail, f.Mend = true, "guests with a TPM", ""
	return f
}

// sandboxes: without any part of them no service starts.
func sandboxes() finding {
	f := finding{What: "sandboxes for services", OK: true, Needed: true, Detail: "user namespaces, seccomp, Landlock, mounts, memory cgroup"}
	var lacks []string
	for _, l := range sandbox.Check() {
		lacks = append(lacks, l.Error())
	}
	if lacks != nil {
		f.OK, f.Detail = false, strings.Join(lacks, "; ")
		f.Mend = "a kernel from 5.19 on with CONFIG_USER_NS, CONFIG_SECCOMP_FILTER, CONFIG_SECURITY_LANDLOCK (lsm=landlock) and a memory cgroup that may be delegated"
	}
	return f
}

// hugePages: nested page faults are most of what a start costs; the monitor asks for huge
// pages (MADV_HUGEPAGE), which shared memory gets only where the host allows it.
func hugePages() finding {
	const path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
	f := finding{What: "huge pages for guests", Mend: "echo advise > " + path}
	b, err := os.ReadFile(path)
	if err != nil {
		f.Detail, f.Mend = err.Error(), ""
		return f
	}
	_, chosen, _ := strings.Cut(string(b), "[")
	chosen, _, _ = strings.Cut(chosen, "]")
	f.Detail = "shared memory: " + chosen
	switch chosen {
	case "always", "within_size", "advise", "force":
		f.OK, f.Mend = true, ""
	}
	return f
}

func program(name, what string, needed bool, mend string) finding {
	f := finding{What: what, Needed: needed, Mend: mend}
	path, err := programs.Find(name)
	if err != nil {
		f.Detail = err.Error()
		return f
	}
	f.OK, f.Detail, f.Mend = true, path, ""
	return f
}

func file(what, path, mend string) finding {
	f := finding{What: what, Detail: path, Mend: mend}
	if _, err := os.Stat(path); err != nil {
		f.Detail = err.Error()
		return f
	}
	f.OK, f.Mend = true, ""
	return f
}

// directory: it need not exist, but its nearest parent must be writable and have room.
func directory(what, dir string) finding {
	f := finding{What: what, Needed: true, Mend: "use another directory, or make room"}
	at := dir
	for at != "/" {
		if _, err := os.Stat(at); err == nil {
			break
		}
		at = filepath.Dir(at)
	}
	if err := unix.Access(at, unix.W_OK); err != nil {
		f.Detail = fmt.Sprintf("%s: %v", at, err)
		return f
	}
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil {
		f.Detail = fmt.Sprintf("%s: %v", at, err)
		return f
	}
	free := st.Bavail * uint64(st.Bsize) >> 20
	f.Detail = fmt.Sprintf("%s, %d MiB free", dir, free)
	if f.OK = free >= 16; f.OK {
		f.Mend = ""
	}
	return f
}
