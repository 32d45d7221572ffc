// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// Attacks on the flow of control. objtool, which checks what compilers make, wonders about such code.
#include "attack.h"

asm(".pushsection .text\n"
    ".type call_at, @function\n"
    ".globl call_at\n"
    "call_at:\n"
    "	push %rdi\n"
    "	mov %rsi, %rdi\n"
    "	mov %rdx, %rsi\n"
    "	ret\n"
    ".size call_at, . - call_at\n"
    ".popsection\n");

/* Another module's code, in the middle of a function that is not exported. */
int attack_foreign_code(void)
{
	if (!at.victim_inside)
		return -ENOENT;
	call_at(at.victim_inside, 0, 0);
	return 0;
}

/*
 * A function of the kernel's is entered behind its beginning, as return-oriented programs do: where the bytes pop %rdi; ret
 * stand by chance. It worked where the register is loaded.
 */
int attack_middle(void)
{
	const volatile unsigned char *p = (void *)at.stext;
	unsigned long got = 0;
	long i;

	if (!p)
		return -ENOENT;
	for (i = 0x100; i < 8 << 20; i++)
		if (p[i] == 0x5f && p[i + 1] == 0xc3)
			break;
	if (i == 8 << 20)
		return -ESRCH;
	asm volatile("lea 1f(%%rip), %%rax\n"
		     "push %%rax\n"
		     "push %[magic]\n"
		     "push %[gadget]\n"
		     "ret\n"
		     "1: mov %%rdi, %[got]\n"
		     : [got] "=&r"(got)
		     : [magic] "r"(VICTIM_MAGIC), [gadget] "r"(p + i)
		     : "rax", "rdi", "memory", "cc");
	victim_tell(VICTIM_GADGET, got);
	return 0;
}

/* The address that the kernel has left for the module to return to is changed: to the victim's, who goes on to the true one. */
int attack_forged_return(void)
{
	victim_expect(VICTIM_RETURN, *entered_from);
	WRITE_ONCE(*entered_from, (unsigned long)victim_came_back);
	return 0;
}

/* The same with the return address of the module's caller, which is the kernel's own. */
int attack_frame(void)
{
	unsigned long *p, a;
	int i;

	for (i = 1; i < 64; i++) {
		p = entered_from + i;
		a = READ_ONCE(*p);
		if ((at.vfs_write && a - at.vfs_write < 0x600) || (at.do_init_module && a - at.do_init_module < 0x600)) {
			victim_expect(VICTIM_FRAME, a);
			WRITE_ONCE(*p, (unsigned long)victim_came_back);
			return 0;
		}
	}
	return -ESRCH;
}

/* A stack of the module's own: what it calls runs there, and the kernel does not know that stack. */
static unsigned char other[8192] __aligned(16);

int attack_pivot(void)
{
	unsigned long flags = quiet();

	asm volatile("mov %%rsp, %%rbx\n"
		     "mov %[other], %%rsp\n"
		     "call victim_look\n"
		     "mov %%rbx, %%rsp\n"
		     :
		     : [other] "r"(other + sizeof(other))
		     : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "memory", "cc");
	loud(flags);
	return 0;
}

/* Another module's data as a stack: it is the kernel that writes there, when it takes an interrupt. */
int attack_pivot_interrupt(void)
{
	unsigned long start;

	preempt_disable();
	start = READ_ONCE(jiffies);
	asm volatile("mov %%rsp, %%rbx\n"
		     "mov %[other], %%rsp\n"
		     "1: pause\n"
		     "mov %[now], %%rax\n"
		     "sub %[start], %%rax\n"
		     "cmp $4, %%rax\n"
		     "jb 1b\n"
		     "mov %%rbx, %%rsp\n"
		     :
		     : [other] "r"(victim_ground + sizeof(victim_ground)), [now] "m"(jiffies), [start] "r"(start)
		     : "rax", "rbx", "memory", "cc");
	preempt_enable();
	return 0;
}

/* The stack of another thread, which waits in the kernel: init's, where it does not reach. */
int attack_thread_stack(void)
{
	WRITE_ONCE(*victim_of_init(), VICTIM_MAGIC);
	return 0;
}
