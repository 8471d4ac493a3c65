/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "device_log.h"

#include <errno.h>

#include "guard.h"
#include "log.h"

struct range {
    struct dirty_log log;
    uint64_t address;
    uint64_t length;
};

static void mark_range(void *argument)
{
    struct range *range = argument;

    log_mark(&range->log, range->address, range->length);
    log_flush(&range->log);
}

int64_t device_log_mark(void *bitmap, uint64_t bytes, uint64_t address, uint64_t length)
{
    struct range range = { .log = { .bitmap = bitmap, .bytes = bytes }, .address = address, .length = length };

    if (guard_install() < 0 || !guard_run(mark_range, &range)) {
        return -EFAULT;
    }
    return range.log.missed;
}

struct look {
    const uint8_t *bitmap;
    uint8_t *before;
    uint64_t bytes;
    int64_t marked;
};

static void count_marked(void *argument)
{
    struct look *look = argument;
    const uint64_t *words = (const uint64_t *)look->bitmap;
    uint64_t *before = (uint64_t *)look->before;
    uint64_t count = look->bytes / sizeof(*words);

    for (uint64_t i = 0; i < count; i++) {
        uint64_t now = __atomic_load_n(&words[i], __ATOMIC_RELAXED);

        look->marked += __builtin_popcountll(now & ~before[i]);
        before[i] = now;
    }
    for (uint64_t i = count * sizeof(*words); i < look->bytes; i++) {
        uint8_t now = __atomic_load_n(&look->bitmap[i], __ATOMIC_RELAXED);

        look->marked += __builtin_popcount(now & ~look->before[i]);
        look->before[i] = now;
    }
}

int64_t device_log_look(const void *bitmap, void *before, uint64_t bytes)
{
    struct look look = { bitmap, before, bytes, 0 };

    if (guard_install() < 0 || !guard_run(count_marked, &look)) {
        return -EFAULT;
    }
    return look.marked;
}
