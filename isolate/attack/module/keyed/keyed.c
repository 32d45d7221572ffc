// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// A module whose code the kernel patches while it is in use, for a static key of the module's own: /proc/keyed says which way it
// went, and a 1 or a 0 that is written there switches.
#include <linux/fs.h>
#include <linux/jump_label.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/uaccess.h>

static DEFINE_STATIC_KEY_FALSE(key);

static ssize_t keyed_read(struct file *file, char __user *to, size_t size, loff_t *at)
{
	if (static_branch_unlikely(&key))
		return simple_read_from_buffer(to, size, at, "taken\n", 6);
	return simple_read_from_buffer(to, size, at, "straight\n", 9);
}

static ssize_t keyed_write(struct file *file, const char __user *from, size_t size, loff_t *at)
{
	char c;

	if (size < 1 || copy_from_user(&c, from, 1))
		return -EFAULT;
	if (c == '1')
		static_branch_enable(&key);
	else
		static_branch_disable(&key);
	return size;
}

static const struct proc_ops ops = { .proc_read = keyed_read, .proc_write = keyed_write };

static int __init keyed_start(void)
{
	return proc_create("keyed", 0600, NULL, &ops) ? 0 : -ENOMEM;
}

static void __exit keyed_end(void)
{
	remove_proc_entry("keyed", NULL);
}

module_init(keyed_start);
module_exit(keyed_end);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A module with a static key");
