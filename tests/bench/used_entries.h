/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the relays are timed by. */
#ifndef USED_ENTRIES_H
#define USED_ENTRIES_H

#include <time.h>

static inline double nanoseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e9 + now.tv_nsec;
}

#endif
