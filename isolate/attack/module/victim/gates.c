// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// The victim's code that no compiler would write.
#include "gates.h"

unsigned long victim_entered;
unsigned long victim_returned[VICTIM_RETURNS];
unsigned long victim_back_to, victim_back_what;

/*
 * victim_guarded does nothing for anybody. What it would do lies behind, where only a jump into its middle leads. That place
 * is no symbol, so that nobody takes it for a function; victim_inside is where.
 */
asm(".pushsection .text\n"
    ".type victim_guarded, @function\n"
    "victim_guarded:\n"
    "	xor %eax, %eax\n"
    "	jmp __x86_return_thunk\n"
    ".Lvictim_inside:\n"
    "	movq $1, victim_entered(%rip)\n"
    "	jmp __x86_return_thunk\n"
    ".size victim_guarded, . - victim_guarded\n"
    ".type victim_came_back, @function\n"
    ".globl victim_came_back\n"
    "victim_came_back:\n"
    "	mov victim_back_what(%rip), %rcx\n"
    "	lea victim_returned(%rip), %rdx\n"
    "	movq $1, (%rdx, %rcx, 8)\n"
    "	pushq victim_back_to(%rip)\n"
    "	jmp __x86_return_thunk\n"
    ".size victim_came_back, . - victim_came_back\n"
    ".popsection\n"
    ".pushsection .data\n"
    ".globl victim_inside, victim_guarded_at\n"
    ".balign 8\n"
    "victim_inside: .quad .Lvictim_inside\n"
    "victim_guarded_at: .quad victim_guarded\n"
    ".popsection\n");
