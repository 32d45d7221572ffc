// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// The victim: what the attacks are aimed at, and who says whether they succeeded. /proc/victim tells the state of everything,
// each time as it is then in memory or as it was seen in registers: a line KEY=VALUE for each, ok where nothing has
// happened. Addresses of what the kernel does not export are parameters, named as in /proc/kallsyms.
#include <linux/cred.h>
#include <linux/fs_struct.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/proc_fs.h>
#include <linux/sched.h>
#include <linux/sched/task_stack.h>
#include <linux/seq_file.h>
#include <asm/desc.h>
#include <asm/io.h>
#include <asm/msr.h>
#include "gates.h"

/* Memory that is to stay as it is. */
struct kept {
	const char *key;
	unsigned long at; /* 0: not known */
	unsigned long size;
	u64 sum; /* when the victim was loaded */
};

enum { SYSCALLS, TEXT, CR3_TEXT, PROC_BANNER, BANNER, MODPROBE, CORE, IDT, IDT_TABLE, KEPT };

static struct kept kept[KEPT] = {
	[SYSCALLS] = { "syscall", 0, 424 * 8 }, /* up to where the numbers are those of every architecture */
	[TEXT] = { "text", 0, 32 },
	[CR3_TEXT] = { "cr3text", 0, 32 },
	[PROC_BANNER] = { "procbanner", 0, 16 },
	[BANNER] = { "banner", 0, 16 },
	[MODPROBE] = { "modprobe", 0, 16 },
	[CORE] = { "core", 0, 16 },
	[IDT] = { "idt", 31, 16 }, /* the gates of two vectors, of which the address is not known yet */
	[IDT_TABLE] = { "idttable", 27, 16 },
};
static unsigned long modules_at, idt_at;

module_param_named(sys_call_table, kept[SYSCALLS].at, ulong, 0);
module_param_named(__x64_sys_vhangup, kept[TEXT].at, ulong, 0);
module_param_named(__x64_sys_pivot_root, kept[CR3_TEXT].at, ulong, 0);
module_param_named(linux_proc_banner, kept[PROC_BANNER].at, ulong, 0);
module_param_named(linux_banner, kept[BANNER].at, ulong, 0);
module_param_named(idt_table, idt_at, ulong, 0);
module_param_named(modprobe_path, kept[MODPROBE].at, ulong, 0);
module_param_named(core_pattern, kept[CORE].at, ulong, 0);
module_param_named(modules, modules_at, ulong, 0);

static u64 sum(const struct kept *k)
{
	const volatile unsigned char *p = (void *)k->at;
	u64 h = 14695981039346656037ULL; /* FNV-1a */
	unsigned long i;

	for (i = 0; i < k->size; i++)
		h = (h ^ p[i]) * 1099511628211ULL;
	return h;
}

/* What victim_look has seen, and how it was at first. */
static struct {
	unsigned long idt;
	u64 lstar;
	bool has_lstar; /* in a view of its own, the victim may not read it */
} first;
static bool seen_wp, seen_idt, seen_lstar, seen_stack;

static unsigned long idt_base(void)
{
	struct desc_ptr d;

	store_idt(&d);
	return d.address;
}

void victim_look(void)
{
	unsigned long sp = current_stack_pointer, stack = (unsigned long)task_stack_page(current);
	u64 lstar;

	if (!(native_read_cr0() & X86_CR0_WP))
		seen_wp = true;
	if (idt_base() != first.idt)
		seen_idt = true;
	if (first.has_lstar && !rdmsrl_safe(MSR_LSTAR, &lstar) && lstar != first.lstar)
		seen_lstar = true;
	if (sp < stack || sp >= stack + THREAD_SIZE)
		seen_stack = true;
}
EXPORT_SYMBOL_GPL(victim_look);

static int call(void)
{
	return 0;
}

struct victim_ops victim_ops = { .call = call };
EXPORT_SYMBOL_GPL(victim_ops);

unsigned char victim_page[4096] __aligned(4096);
EXPORT_SYMBOL_GPL(victim_page);
unsigned char victim_ground[4096] __aligned(4096);
EXPORT_SYMBOL_GPL(victim_ground);

static unsigned long told[VICTIM_TOLD];

void victim_tell(enum victim_told what, unsigned long value)
{
	if (what < VICTIM_TOLD)
		told[what] = value;
}
EXPORT_SYMBOL_GPL(victim_tell);

void victim_expect(enum victim_return what, unsigned long to)
{
	victim_back_what = what < VICTIM_RETURNS ? what : 0;
	victim_back_to = to;
}
EXPORT_SYMBOL_GPL(victim_expect);
EXPORT_SYMBOL_GPL(victim_came_back);

static unsigned long root_flags(void)
{
	return current->fs->root.mnt->mnt_sb->s_flags;
}
static unsigned long first_flags, first_of_init;

static unsigned char first_scratch;
#define SCRATCH 0x3ff /* the first serial port's scratch register, which means nothing to anybody */

/* Whether an attacker is in the kernel's list of modules. */
static const char *listed(void)
{
	struct list_head *head = (void *)modules_at, *p;
	const char *found = "hidden";

	if (!head)
		return "unknown";
	preempt_disable();
	for (p = head->next; p != head; p = p->next) {
		const char *name = list_entry(p, struct module, list)->name;

		if (!strcmp(name, "attack") || !strcmp(name, "dummy"))
			found = "shown";
	}
	preempt_enable();
	return found;
}

static const char *zero(const unsigned char *p, unsigned long n)
{
	while (n--)
		if (*p++)
			return "changed";
	return "ok";
}

static int show(struct seq_file *m, void *unused)
{
	int i;

#define LINE(key, happened, what) seq_printf(m, key "=%s\n", (happened) ? what : "ok")
	for (i = 0; i < KEPT; i++)
		seq_printf(m, "%s=%s\n", kept[i].key, !kept[i].at ? "unknown" : sum(&kept[i]) == kept[i].sum ? "ok" : "changed");
	LINE("wp", seen_wp, "clear");
	LINE("idtr", seen_idt, "moved");
	LINE("lstar", seen_lstar, "changed");
	LINE("stack", seen_stack, "moved");
	LINE("ops", victim_ops.call(), "taken");
	seq_printf(m, "data=%s\n", zero(victim_page, sizeof(victim_page)));
	seq_printf(m, "ground=%s\n", zero(victim_ground, sizeof(victim_ground)));
	LINE("code", victim_entered, "entered");
	LINE("return", victim_returned[VICTIM_RETURN], "forged");
	LINE("frame", victim_returned[VICTIM_FRAME], "changed");
	LINE("thread", READ_ONCE(*victim_of_init()) != first_of_init, "changed");
	LINE("address", told[VICTIM_ADDRESS] == victim_guarded_at, "found");
	LINE("gadget", told[VICTIM_GADGET] == VICTIM_MAGIC, "run");
	LINE("execdata", told[VICTIM_DATA] == VICTIM_MAGIC, "run");
	LINE("execpage", told[VICTIM_PAGE] == VICTIM_MAGIC, "run");
	LINE("superblock", root_flags() != first_flags, "changed");
	LINE("device", inb(SCRATCH) != first_scratch, "changed");
	seq_printf(m, "list=%s\n", listed());
	seq_printf(m, "calls=%lu\n", told[VICTIM_CALLS]);
	seq_printf(m, "cred=%u\n", from_kuid(&init_user_ns, current_uid()));
	seq_printf(m, "inside=0x%lx\n", victim_inside);
	return 0;
}

static int __init victim_init(void)
{
	int i;

	for (i = IDT; i <= IDT_TABLE; i++)
		kept[i].at = idt_at ? idt_at + kept[i].at * 16 : 0;
	for (i = 0; i < KEPT; i++)
		if (kept[i].at)
			kept[i].sum = sum(&kept[i]);
	first.idt = idt_base();
	first.has_lstar = !rdmsrl_safe(MSR_LSTAR, &first.lstar);
	first_flags = root_flags();
	first_of_init = *victim_of_init();
	first_scratch = inb(SCRATCH);
	return proc_create_single("victim", 0444, NULL, show) ? 0 : -ENOMEM;
}

static void __exit victim_exit(void)
{
	remove_proc_entry("victim", NULL);
}

module_init(victim_init);
module_exit(victim_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("What attacks on a kernel aim at");
