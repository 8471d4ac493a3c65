/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "affinity.h"

#include <string.h>

cpu_set_t affinity_widen(void)
{
    cpu_set_t before, all;

    CPU_ZERO(&before);
    memset(&all, 0xff, sizeof(all));
    /* It fails where there are more processors than fit: then nothing is widened, nor restored. */
    if (sched_getaffinity(0, sizeof(before), &before) == 0) {
        sched_setaffinity(0, sizeof(all), &all);
    }
    return before;
}

void affinity_restore(const cpu_set_t *before)
{
    if (CPU_COUNT(before) > 0) {
        sched_setaffinity(0, sizeof(*before), before);
    }
}
