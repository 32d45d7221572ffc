// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// Attacks on the processor's registers and on devices. objtool, which checks what compilers make, wonders about such code.
#include <asm/desc_defs.h>
#include <asm/segment.h>
#include "attack.h"

struct table {
	u16 limit;
	unsigned long base;
} __packed;

static struct table idtr(void)
{
	struct table t;

	asm volatile("sidt %0" : "=m"(t));
	return t;
}

static void set_idtr(struct table t)
{
	asm volatile("lidt %0" : : "m"(t) : "memory");
}

/* Vectors that are nobody's: both vendors keep them for themselves. */
#define NOBODYS 31
#define NOBODYS_TOO 27

static void gate(gate_desc *g, unsigned long to)
{
	gate_desc d = {
		.offset_low = to, .segment = __KERNEL_CS, .bits = { .type = GATE_INTERRUPT, .dpl = 3, .p = 1 },
		.offset_middle = to >> 16, .offset_high = to >> 32,
	};

	((volatile u64 *)g)[0] = ((u64 *)&d)[0];
	((volatile u64 *)g)[1] = ((u64 *)&d)[1];
}

/*
 * own_gate is where an exception of the module's own goes: it skips the instruction, of two bytes, and says that it has been
 * there. cr3_write(root, to, what) writes a byte on other page tables; it uses no stack meanwhile and lies within a page.
 */
void own_gate(void);
void cr3_write(unsigned long root, unsigned long to, unsigned char what);
unsigned long own_gate_was_used;

asm(".pushsection .text\n"
    ".type own_gate, @function\n"
    "own_gate:\n"
    "	addq $2, (%rsp)\n"
    "	incq own_gate_was_used(%rip)\n"
    "	iretq\n"
    ".size own_gate, . - own_gate\n"
    ".balign 64\n"
    ".type cr3_write, @function\n"
    ".globl cr3_write\n"
    "cr3_write:\n"
    "	mov %cr3, %rax\n"
    "	mov %rdi, %cr3\n"
    "	mov %dl, (%rsi)\n"
    "	mov %rax, %cr3\n"
    "	jmp __x86_return_thunk\n"
    ".size cr3_write, . - cr3_write\n"
    ".popsection\n");

/* The kernel's table of interrupts, where the processor says that it is. */
int attack_idt(void)
{
	unsigned long flags = quiet(), was = cr0();

	set_cr0(was & ~X86_CR0_WP);
	gate((gate_desc *)idtr().base + NOBODYS, (unsigned long)own_gate);
	set_cr0(was);
	loud(flags);
	return 0;
}

/* And where its symbol says. */
int attack_idt_table(void)
{
	unsigned long flags, was;

	if (!at.idt_table)
		return -ENOENT;
	flags = quiet();
	was = cr0();
	set_cr0(was & ~X86_CR0_WP);
	gate((gate_desc *)at.idt_table + NOBODYS_TOO, (unsigned long)own_gate);
	set_cr0(was);
	loud(flags);
	return 0;
}

/* A table of the module's own: an exception is raised and handled without the kernel, which then looks. */
static gate_desc own[256] __aligned(4096);

int attack_idt_own(void)
{
	const struct table t = { sizeof(own) - 1, (unsigned long)own };
	unsigned long flags;
	struct table was;

	gate(&own[6], (unsigned long)own_gate);
	flags = quiet();
	was = idtr();
	set_idtr(t);
	asm volatile("ud2" : : : "memory");
	victim_look();
	set_idtr(was);
	loud(flags);
	return own_gate_was_used ? 0 : -EIO;
}

/* Where system calls go: for a moment without any. */
#define MSR_LSTAR 0xc0000082
int attack_lstar(void)
{
	unsigned long flags, was = at.entry_SYSCALL_64;

	if (!was)
		return -ENOENT;
	flags = quiet();
	asm volatile("wrmsr" : : "a"((u32)was + 16), "d"((u32)(was >> 32)), "c"(MSR_LSTAR) : "memory");
	victim_look();
	asm volatile("wrmsr" : : "a"((u32)was), "d"((u32)(was >> 32)), "c"(MSR_LSTAR) : "memory");
	loud(flags);
	return 0;
}

/* A device's register: the first serial port's scratch register, which keeps what is written. */
int attack_device(void)
{
	asm volatile("outb %b0, %w1" : : "a"(0x5a), "d"(0x3ff));
	return 0;
}
