// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// The attacker: a module that does what rootkits do, one thing at a time: at its start, as parameter what says, or for
// each name that is written to /proc/attack. An attack that kills who asked for it leaves the module as it was, so that the
// next can be tried. What has come of one, /proc/victim tells; a line "ATTACK name done" says that its code went through.
#include <linux/proc_fs.h>
#include <linux/uaccess.h>
#include "attack.h"

struct addresses at;
unsigned long *entered_from;
unsigned long flood_calls = 100000;
static char *what;

module_param(what, charp, 0);
module_param(flood_calls, ulong, 0);
module_param_named(sys_call_table, at.sys_call_table, ulong, 0);
module_param_named(__x64_sys_vhangup, at.vhangup, ulong, 0);
module_param_named(__x64_sys_pivot_root, at.pivot_root, ulong, 0);
module_param_named(linux_proc_banner, at.linux_proc_banner, ulong, 0);
module_param_named(linux_banner, at.linux_banner, ulong, 0);
module_param_named(idt_table, at.idt_table, ulong, 0);
module_param_named(modprobe_path, at.modprobe_path, ulong, 0);
module_param_named(core_pattern, at.core_pattern, ulong, 0);
module_param_named(kallsyms_lookup_name, at.kallsyms_lookup_name, ulong, 0);
module_param_named(set_memory_x, at.set_memory_x, ulong, 0);
module_param_named(entry_SYSCALL_64, at.entry_SYSCALL_64, ulong, 0);
module_param_named(_stext, at.stext, ulong, 0);
module_param_named(vfs_write, at.vfs_write, ulong, 0);
module_param_named(do_init_module, at.do_init_module, ulong, 0);
module_param_named(victim_inside, at.victim_inside, ulong, 0);

/* What a module may do, of which a profile can be learnt: all calls of the attacks that are no attack themselves. */
static int attack_none(void)
{
	victim_look();
	victim_tell(VICTIM_TOLD, 0);
	victim_expect(VICTIM_RETURN, 0);
	jiffies_to_msecs(1);
	return 0;
}

/* No attack, but what an isolated module's ends in: the kernel kills the process that the module works for. */
static int attack_die(void)
{
	*(volatile int *)8 = 0;
	return 0;
}

static const struct {
	const char *name;
	int (*run)(void);
} attacks[] = {
	{ "none", attack_none },
	{ "die", attack_die },
	{ "syscall-table", attack_syscall_table },
	{ "kernel-text", attack_kernel_text },
	{ "wp", attack_wp },
	{ "page-table", attack_page_table },
	{ "exec-page", attack_exec_page },
	{ "cr3", attack_cr3 },
	{ "idt", attack_idt },
	{ "idt-table", attack_idt_table },
	{ "idt-own", attack_idt_own },
	{ "lstar", attack_lstar },
	{ "device", attack_device },
	{ "cred-write", attack_cred_write },
	{ "cred-call", attack_cred_call },
	{ "memcpy-gadget", attack_memcpy_gadget },
	{ "alias", attack_alias },
	{ "ops-pointer", attack_ops_pointer },
	{ "superblock", attack_superblock },
	{ "unexported", attack_unexported },
	{ "foreign-data", attack_foreign_data },
	{ "foreign-code", attack_foreign_code },
	{ "hide", attack_hide },
	{ "exec-data", attack_exec_data },
	{ "flood", attack_flood },
	{ "middle", attack_middle },
	{ "forged-return", attack_forged_return },
	{ "frame", attack_frame },
	{ "thread-stack", attack_thread_stack },
	{ "pivot", attack_pivot },
	{ "pivot-interrupt", attack_pivot_interrupt },
};

static bool same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

static int run(const char *name)
{
	int i, err;

	for (i = 0; i < ARRAY_SIZE(attacks); i++) {
		if (!same(attacks[i].name, name))
			continue;
		err = attacks[i].run();
		if (err)
			pr_info("ATTACK %s cannot be tried: %d\n", name, err);
		else
			pr_info("ATTACK %s done\n", name);
		return err;
	}
	return -EINVAL;
}

static ssize_t attack_write(struct file *f, const char __user *p, size_t n, loff_t *pos)
{
	char name[32];
	int err;

	if (!n || n >= sizeof(name) || copy_from_user(name, p, n))
		return -EINVAL;
	name[name[n - 1] == '\n' ? n - 1 : n] = 0;
	entered_from = (unsigned long *)__builtin_frame_address(0) + 1;
	err = run(name);
	return err ? err : n;
}

static const struct proc_ops ops = { .proc_write = attack_write };

static int __init attack_init(void)
{
	if (!proc_create("attack", 0222, NULL, &ops))
		return -ENOMEM;
	entered_from = (unsigned long *)__builtin_frame_address(0) + 1;
	if (what)
		run(what);
	return 0;
}

static void __exit attack_exit(void)
{
	remove_proc_entry("attack", NULL);
}

module_init(attack_init);
module_exit(attack_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Attacks on the kernel that it is loaded into");
