/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
#ifndef GATES_H
#define GATES_H

#include "victim.h"

extern unsigned long victim_inside;	/* the middle of victim_guarded */
extern unsigned long victim_guarded_at; /* its beginning */
extern unsigned long victim_entered;	/* its middle was run */
extern unsigned long victim_returned[VICTIM_RETURNS];
extern unsigned long victim_back_to, victim_back_what; /* for victim_came_back */

#endif
