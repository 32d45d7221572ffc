// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// A module that several processors are in at once. Reading /proc/several has two threads, each on a processor of its own, work on
// the same memory, and one that goes from processor to processor; what they find is a line KEY=VALUE for each kind of work.
#include <linux/completion.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

static int rounds = 200;
module_param(rounds, int, 0);

/* Seconds until a thread gives up what it waits for: that was lost. */
static int patience = 30;
module_param(patience, int, 0);

/* Less than a page, so that nothing of it is written without an exit. */
static struct shared {
	atomic64_t inc, add, or, box;
	u64 swapped, guarded;
	unsigned long bits;
	struct completion *waiting;
	unsigned long done; /* how many of those waited for are complete */
	atomic_t half;
	u8 byte;
} *shared;

static s64 held[2];
static unsigned long lost, spun;
static DECLARE_COMPLETION(finished);

static bool add_one(u64 *p)
{
	u64 was = READ_ONCE(*p), now;
	int n;

	for (n = 0; n < 1000000; n++, was = now) {
		now = cmpxchg(p, was, was + 1);
		if (now == was)
			return true;
	}
	return false;
}

/* Every kind of atomic instruction that the kernel has, on what the other thread changes, too. */
static void count(int me)
{
	unsigned long end;
	int n;

	for (n = 0; n < rounds; n++) {
		atomic64_inc(&shared->inc);
		atomic64_add_return(3, &shared->add);
		if (!add_one(&shared->swapped))
			spun++;
		held[me] = atomic64_xchg(&shared->box, held[me]);
		atomic64_or(1UL << (n % 32 + 32 * me), &shared->or);
		atomic64_andnot(1UL << (n % 32 + 32 * me), &shared->or);
		atomic_dec(&shared->half);
		asm volatile("lock incb %0" : "+m"(shared->byte));
		for (end = jiffies + patience * HZ; test_and_set_bit_lock(1, &shared->bits); cpu_relax())
			if (time_after(jiffies, end)) { /* it was never given back */
				spun++;
				break;
			}
		WRITE_ONCE(shared->guarded, READ_ONCE(shared->guarded) + 1);
		clear_bit_unlock(1, &shared->bits);
	}
}

/* Waits on its own stack for what the other thread has the kernel write there. */
static void wait_on_stack(void)
{
	unsigned long n, end;

	for (n = 1; n <= rounds / 4; n++) {
		DECLARE_COMPLETION_ONSTACK(c);

		smp_store_release(&shared->waiting, &c);
		for (end = jiffies + patience * HZ; smp_load_acquire(&shared->done) != n; cpu_relax())
			if (time_after(jiffies, end)) {
				spun++;
				return;
			}
		schedule(); /* over to the kernel and back, with the stack */
		if (!READ_ONCE(c.done))
			lost++;
	}
}

static void complete_all_of_them(void)
{
	unsigned long n, end;
	struct completion *c;

	for (n = 1; n <= rounds / 4; n++) {
		for (end = jiffies + patience * HZ; !(c = xchg(&shared->waiting, NULL)); cpu_relax())
			if (time_after(jiffies, end)) {
				spun++;
				return;
			}
		complete(c);
		smp_store_release(&shared->done, n);
	}
}

static int work(void *arg)
{
	int me = (long)arg;

	count(me);
	if (me)
		complete_all_of_them();
	else
		wait_on_stack();
	complete(&finished);
	while (!kthread_should_stop()) {
		set_current_state(TASK_INTERRUPTIBLE);
		if (!kthread_should_stop())
			schedule();
		__set_current_state(TASK_RUNNING);
	}
	return 0;
}

/* Memory comes and goes while it is looked at from two processors by turns: what either remembers of it must go, too. */
static void wander(struct seq_file *m)
{
	int n, stale = 0, same = 0, strayed = 0;
	unsigned long *p, *q;

	for (n = 0; n < rounds / 8; n++) {
		volatile unsigned long mine = n * 0x1234567UL;

		if (set_cpus_allowed_ptr(current, cpumask_of(0)) || !(p = vmalloc(PAGE_SIZE)))
			break;
		*p = 2 * n + 1;
		set_cpus_allowed_ptr(current, cpumask_of(1));
		stale += READ_ONCE(*p) != 2 * n + 1;
		set_cpus_allowed_ptr(current, cpumask_of(0));
		vfree(p);
		vm_unmap_aliases();
		q = vmalloc(PAGE_SIZE);
		if (!q)
			break;
		*q = 2 * n + 2;
		set_cpus_allowed_ptr(current, cpumask_of(1));
		same += p == q;
		stale += READ_ONCE(*q) != 2 * n + 2;
		strayed += mine != n * 0x1234567UL;
		vfree(q);
		vm_unmap_aliases(); /* so that the next two come to one place */
	}
	set_cpus_allowed_ptr(current, cpu_online_mask);
	seq_printf(m, "wandered=%d\nstale=%d\nstrayed=%d\nsame=%d\n", n, stale, strayed, same);
}

static int show(struct seq_file *m, void *v)
{
	struct task_struct *t[2];
	s64 box;
	int n;

	memset(shared, 0, sizeof(*shared));
	held[0] = 1000, held[1] = 10;
	lost = spun = 0;
	for (n = 0; n < 2; n++) {
		t[n] = kthread_create_on_node(work, (void *)(long)n, NUMA_NO_NODE, "several/%d", n);
		if (IS_ERR(t[n]))
			return n ? (kthread_stop(t[0]), PTR_ERR(t[1])) : PTR_ERR(t[0]);
		kthread_bind(t[n], n);
	}
	for (n = 0; n < 2; n++)
		wake_up_process(t[n]);
	for (n = 0; n < 2; n++)
		wait_for_completion(&finished);
	for (n = 0; n < 2; n++)
		kthread_stop(t[n]);
	box = atomic64_read(&shared->box);
	seq_printf(m, "inc=%lld\nadd=%lld\nswapped=%llu\nguarded=%llu\nbox=%lld\nor=%lld\nhalf=%d\nbyte=%d\nspun=%lu\nlost=%lu\n",
		   2 * rounds - atomic64_read(&shared->inc), 6 * rounds - atomic64_read(&shared->add), 2 * rounds - shared->swapped,
		   2 * rounds - shared->guarded, 1010 - box - held[0] - held[1], atomic64_read(&shared->or),
		   2 * rounds + atomic_read(&shared->half), (u8)(2 * rounds - shared->byte), spun, lost);
	wander(m);
	return 0;
}

static int __init several_init(void)
{
	if (num_online_cpus() < 2)
		return -ENODEV;
	shared = kzalloc(sizeof(*shared), GFP_KERNEL);
	if (!shared)
		return -ENOMEM;
	if (!proc_create_single("several", 0444, NULL, show)) {
		kfree(shared);
		return -ENOMEM;
	}
	return 0;
}

static void __exit several_exit(void)
{
	remove_proc_entry("several", NULL);
	kfree(shared);
}

module_init(several_init);
module_exit(several_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Work that several processors do at once");
