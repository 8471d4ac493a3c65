/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * On which processors the device's threads run: on any, as hardware would, whichever the driver has bound the
 * thread to that makes them. DPDK binds all of its own to a few, which it keeps busy.
 */
#ifndef MLX5_EMULATION_AFFINITY_H
#define MLX5_EMULATION_AFFINITY_H

#ifndef _GNU_SOURCE
#error "cpu_set_t is GNU's"
#endif
#include <sched.h>

/* Let this thread run anywhere, and those that it makes until affinity_restore(). Returns where it could before. */
cpu_set_t affinity_widen(void);
void affinity_restore(const cpu_set_t *before);

#endif
