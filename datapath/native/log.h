/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The dirty log: a bitmap, shared with whoever moves a guest, in which bit n says that page n of the
 * guest's memory (4 KiB) was written (QEMU docs/interop/vhost-user.rst, "Migration").
 *
 * Plain data without a lock, but for the bits, which the other side takes and clears at any time.
 */
#ifndef LIBVIRT_VDPA_LOG_H
#define LIBVIRT_VDPA_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
/* cffi: end */

#define LOG_PAGE_SIZE 4096
#define LOG_PENDING 64

struct dirty_log {
    uint8_t *bitmap;            /* NULL: nothing is logged */
    uint64_t bytes;
    uint64_t missed;            /* pages that lie beyond the bitmap, plus bitmaps that vanished */
    uint64_t marked;            /* bits that were not set before */

    /* Bits that are to be set: those of the byte that came last, and before it. */
    uint64_t byte;
    uint8_t bits;               /* 0: there are none at all */
    unsigned int pending;
    struct { uint64_t byte; uint8_t bits; } set[LOG_PENDING];
    bool flushing;              /* the bitmap is being touched */
};

/*
 * Set bits of one byte, and return those that were. Release: whoever takes the bit and then copies the page sees what was written to
 * it before. Atomic also against others who set bits beside: no bit is lost.
 */
static inline uint8_t log_set(uint8_t *byte, uint8_t bits)
{
    return __atomic_fetch_or(byte, bits, __ATOMIC_RELEASE);
}

/* As log_mark(), for any range. */
void log_mark_range(struct dirty_log *log, uint64_t address, uint64_t length);

/* Note that `length` bytes at a guest physical address have been written. */
static inline void log_mark(struct dirty_log *log, uint64_t address, uint64_t length)
{
    uint64_t page = address / LOG_PAGE_SIZE;

    if (log->bitmap == NULL || length == 0) {
        return;
    }
    /* Mostly it is one page, in the neighbourhood of the one before. */
    if (page == (address + length - 1) / LOG_PAGE_SIZE && page / 8 == log->byte && log->bits != 0) {
        log->bits |= 1u << page % 8;
        return;
    }
    log_mark_range(log, address, length);
}

/*
 * Set the bits of what was noted. Like log_mark(), which does so when it has noted much, it touches the
 * bitmap, whose file may shrink, and so runs under guard_run(); log_lose() if it was left while `flushing`.
 */
void log_flush(struct dirty_log *log);

/* Forget what was noted. */
void log_forget(struct dirty_log *log);

/* Log no more, for the bitmap has gone. */
void log_lose(struct dirty_log *log);

#endif
