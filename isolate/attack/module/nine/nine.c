// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// A module whose code is 34,672 bytes: nine pages. It says when its first byte and its last but a few have run.
#include <linux/module.h>
#include <linux/printk.h>

#define SIZE 34672

int nine_run(void);

asm(".pushsection .text, \"ax\"\n"
    ".globl nine_run, cleanup_module\n"
    ".type nine_run, @function\n"
    ".type cleanup_module, @function\n"
    "nine_begin:\n"
    "nine_run:\n"
    "	mov $9, %eax\n"
    "	jmp nine_last\n"
    ".size nine_run, . - nine_run\n"
    "	.skip " __stringify(SIZE) " - 32 - (. - nine_begin), 0xcc\n"
    "nine_last:\n"
    "	ret\n"
    "	int3\n"
    "	.skip 14, 0xcc\n"
    "cleanup_module:\n"
    "	ret\n"
    "	int3\n"
    "	.skip " __stringify(SIZE) " - (. - nine_begin), 0xcc\n"
    ".size cleanup_module, . - cleanup_module\n"
    ".popsection\n");

static int __init nine_init(void)
{
	pr_info("NINE %d\n", nine_run());
	return 0;
}

module_init(nine_init);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A module of nine pages");
