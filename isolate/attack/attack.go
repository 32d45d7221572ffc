// Package attack has the kernel modules that tests of module isolation attack a guest's kernel with, as source and built.
//
// Two modules, for a guest with busybox and nothing else: attack does what rootkits do, one thing at a time, for each name
// that is written to /proc/attack (or that its parameter what gives it at its start). victim is what some attacks aim at,
// and says of all of them whether they had an effect: /proc/victim is a line KEY=VALUE for each, as the kernel finds it in
// its memory and registers when the file is read. The attacker's own word, a line "ATTACK name done" in the kernel's log,
// only says that its code went through. dummy is attack under the name of a module that a tenant may trust.
//
// Every attack leaves an unprotected guest running, its effect in place and apart from all others', so one guest tries them
// all (TestAttacksWin: every one of them wins there). Where one is stopped by killing who asked for it, the attacker's module
// goes on, and the next may be tried; but it can no longer be removed. Two names are no attacks: none makes the calls that
// attacks make and that a module may make, die is killed.
//
// dma is a driver that has its device write where it should not; what writes a device's registers itself, attack "device" stands for.
// The others are no attackers, but what isolation has to bear with: several vCPUs, nine pages of code, a static key.
package attack

import (
	"context"
	"embed"
	"strings"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/kmod"
)

//go:embed module
var source embed.FS

// Kernels are those that the modules are built for by `make fetch`, as package debian names them.
var Kernels = []string{"6.1-cloud", "6.12-cloud", "6.12"}

// Modules are the files that Build returns: victim first, on which the others depend.
var Modules = []string{"victim", "attack", "dummy", "several", "dma", "nine", "keyed"}

// Build returns the modules' files by name, for a kernel of Kernels.
func Build(ctx context.Context, root *debian.Root, kernel string) (map[string]string, error) {
	var all []kmod.Module
	for _, name := range Modules {
		dir := name
		if name == "dummy" {
			dir = "attack"
		}
		m, err := kmod.FromFS(source, "module/"+dir, name)
		if err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	return kmod.Build(ctx, root, kernel, all...)
}

// An Attack is one of those that /proc/attack knows.
type Attack struct {
	Name  string
	Needs []string // symbols of /proc/kallsyms whose addresses the attacker is given
	Check string   // the line of /proc/victim that tells what came of it
	Won   string   // what that line says when the attack has won
	Never string   // the exported function that it needs and that no module may call, if any
	// Endured says that nothing is to be stopped: it wins where the guest, and its host, live through it. (How many calls
	// a flood has is the parameter flood_calls.)
	Endured bool
}

// All are the attacks. What each does is told with its function in module/attack.
var All = []Attack{
	// On what the kernel has made read-only.
	{Name: "syscall-table", Needs: []string{"sys_call_table"}, Check: "syscall", Won: "changed"},
	{Name: "kernel-text", Needs: []string{"__x64_sys_vhangup"}, Check: "text", Won: "changed"},
	{Name: "wp", Needs: []string{"linux_proc_banner"}, Check: "procbanner", Won: "changed"},
	{Name: "page-table", Needs: []string{"linux_banner"}, Check: "banner", Won: "changed"},
	{Name: "exec-page", Check: "execpage", Won: "run"},
	{Name: "exec-data", Needs: []string{"set_memory_x"}, Check: "execdata", Won: "run"},
	{Name: "cr3", Needs: []string{"__x64_sys_pivot_root"}, Check: "cr3text", Won: "changed"},
	// On the processor and on devices.
	{Name: "idt", Check: "idt", Won: "changed"},
	{Name: "idt-table", Needs: []string{"idt_table"}, Check: "idttable", Won: "changed"},
	{Name: "idt-own", Check: "idtr", Won: "moved"},
	{Name: "lstar", Needs: []string{"entry_SYSCALL_64"}, Check: "lstar", Won: "changed"},
	{Name: "device", Check: "device", Won: "changed"},
	// On the kernel's data, and by its own functions.
	{Name: "cred-write", Check: "cred", Won: "0"},
	{Name: "cred-call", Check: "cred", Won: "0", Never: "prepare_kernel_cred"},
	{Name: "memcpy-gadget", Needs: []string{"modprobe_path"}, Check: "modprobe", Won: "changed"},
	{Name: "alias", Needs: []string{"core_pattern"}, Check: "core", Won: "changed"},
	{Name: "superblock", Check: "superblock", Won: "changed"},
	{Name: "unexported", Needs: []string{"kallsyms_lookup_name"}, Check: "address", Won: "found"},
	{Name: "flood", Check: "calls", Won: "100000", Endured: true},
	// On another module.
	{Name: "ops-pointer", Check: "ops", Won: "taken"},
	{Name: "foreign-data", Check: "data", Won: "changed"},
	{Name: "foreign-code", Check: "code", Won: "entered"},
	// On the flow of control.
	{Name: "middle", Needs: []string{"_stext"}, Check: "gadget", Won: "run"},
	{Name: "forged-return", Check: "return", Won: "forged"},
	{Name: "frame", Needs: []string{"vfs_write", "do_init_module"}, Check: "frame", Won: "changed"},
	{Name: "thread-stack", Check: "thread", Won: "changed"},
	{Name: "pivot", Check: "stack", Won: "moved"},
	{Name: "pivot-interrupt", Check: "ground", Won: "changed"},
	// Last: /proc/modules no longer has the attacker.
	{Name: "hide", Needs: []string{"modules"}, Check: "list", Won: "hidden"},
}

// Calls are the functions that attack, under either name, calls and that a profile may well allow: what any module calls,
// and the victim's. The functions of attacks are not among them, but memcpy, which is judged by what it would write.
var Calls = []string{
	"__check_object_size", "_copy_from_user", "_printk", "jiffies_to_msecs", "memcpy", "proc_create", "remove_proc_entry",
	"victim_expect", "victim_look", "victim_tell",
}

// VictimCalls are those that victim calls.
var VictimCalls = []string{
	"from_kuid", "native_read_msr_safe", "proc_create_single_data", "remove_proc_entry", "seq_printf", "strcmp",
}

// Script is for a guest's sh, with busybox's applets in its path, a writable /etc and the modules in /mod: it defines
//
//	attack_load attack|dummy [PARAMETER=VALUE...]  loads victim, if it is not there, and the attacker
//	attack NAME KEY                                tries an attack as nobody: prints "CHECK NAME BEFORE AFTER"
//
// where BEFORE and AFTER are what /proc/victim said of KEY. AFTER is killed where that was asked of the process that did not
// survive the attack: no other has its credentials.
var Script = `
attack_load() {
	grep -q ^nobody: /etc/passwd 2>/dev/null || echo nobody:x:65534:65534::/:/bin/sh >>/etc/passwd
	[ -n "$attack_at" ] || attack_at=$(awk 'BEGIN { n = split("` + strings.Join(symbols(), " ") + `", a); for (i in a) want[a[i]] = 1 }
		$3 in want { print $3 "=0x" $1; delete want[$3]; if (!--n) exit }' /proc/kallsyms)
	[ -e /proc/victim ] || insmod /mod/victim.ko $attack_at
	attack_ko=$1; shift
	insmod /mod/$attack_ko.ko $attack_at victim_inside=$(sed -n 's/^inside=//p' /proc/victim) "$@"
}
attack() {
	set -- $1 $2 $(su -s /bin/sh nobody -c "sed -n 's/^$2=//p' /proc/victim; echo $1 >/proc/attack; sed -n 's/^$2=//p' /proc/victim")
	if [ -z "$4" ]; then # killed
		case $2 in
		cred) set -- $1 $2 $3 killed ;;
		*) set -- $1 $2 $3 $(sed -n "s/^$2=//p" /proc/victim) ;;
		esac
	fi
	echo "CHECK $1 $3 $4"
}
`

// symbols are all that the two modules are given the addresses of.
func symbols() []string {
	var all []string
	for _, a := range All {
		all = append(all, a.Needs...)
	}
	return all
}
