/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* What the victim exports: to be attacked, and to be told of what no memory shows. */
#ifndef VICTIM_H
#define VICTIM_H

#include <linux/sched/signal.h>
#include <linux/sched/task.h>

/* Called whenever /proc/victim is read. */
struct victim_ops {
	int (*call)(void); /* 0 */
};
extern struct victim_ops victim_ops;

/* All zero. */
extern unsigned char victim_page[4096], victim_ground[4096];

/* Looks at the processor as it is now: what is not as it was is kept for /proc/victim. */
void victim_look(void);

/* A word of init's stack in the kernel, far below where that has got. */
static inline unsigned long *victim_of_init(void)
{
	return (unsigned long *)next_task(&init_task)->stack + 32;
}

/* What an attack says that it has got: the victim knows what that must be. */
enum victim_told {
	VICTIM_ADDRESS, /* of victim_guarded */
	VICTIM_GADGET,	/* VICTIM_MAGIC */
	VICTIM_DATA,	/* VICTIM_MAGIC */
	VICTIM_PAGE,	/* VICTIM_MAGIC */
	VICTIM_CALLS,	/* how many */
	VICTIM_TOLD
};
#define VICTIM_MAGIC 0x5ca1ab1eUL
void victim_tell(enum victim_told what, unsigned long value);

/*
 * Where a return address leads that an attack has changed: it is noted and goes on to where victim_expect was told, with all
 * registers as they are but those that a call may change.
 */
enum victim_return { VICTIM_RETURN, VICTIM_FRAME, VICTIM_RETURNS };
void victim_expect(enum victim_return what, unsigned long to);
void victim_came_back(void);

#endif
