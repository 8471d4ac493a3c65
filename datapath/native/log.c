/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "log.h"

#include "barrier.h"

static void note(struct dirty_log *log, uint64_t byte, uint8_t bits)
{
    if (log->byte == byte) {
        log->bits |= bits;
        return;
    }
    if (log->bits != 0) {
        if (log->pending == LOG_PENDING) {
            log_flush(log);
        } else {
            log->set[log->pending].byte = log->byte;
            log->set[log->pending].bits = log->bits;
            log->pending++;
        }
    }
    log->byte = byte;
    log->bits = bits;
}

/* The part of a range that lies beyond the bitmap is only counted. False: that is all of it. */
static bool clip(struct dirty_log *log, uint64_t first, uint64_t *last)
{
    uint64_t end = log->bytes * 8;

    if (*last < end) {
        return true;
    }
    log->missed += *last - (first < end ? end : first) + 1;
    *last = end - 1;
    return first < end;
}

void log_mark_range(struct dirty_log *log, uint64_t address, uint64_t length)
{
    uint64_t last_byte, first, last;

    if (__builtin_add_overflow(address, length - 1, &last_byte)) {
        last_byte = UINT64_MAX;
    }
    first = address / LOG_PAGE_SIZE;
    last = last_byte / LOG_PAGE_SIZE;
    if (!clip(log, first, &last)) {
        return;
    }
    for (; first / 8 < last / 8; first = (first / 8 + 1) * 8) {
        note(log, first / 8, 0xffu << first % 8);
    }
    note(log, last / 8, (0xffu << first % 8) & (0xffu >> (7 - last % 8)));
}

/* Set bits of one byte, unless they are set. How many were not. */
static unsigned int set_missing(uint8_t *byte, uint8_t bits)
{
    if ((__atomic_load_n(byte, __ATOMIC_RELAXED) & bits) == bits) {
        return 0;
    }
    return __builtin_popcount(bits & ~log_set(byte, bits));
}

void log_flush(struct dirty_log *log)
{
    if (log->bits == 0) {
        return;
    }
    /* SIGBUS may leave this in the middle, and then the flag must be in memory already. */
    log->flushing = true;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    /*
     * A bit that is set already need not be set again, which is most of them and much cheaper: whoever takes
     * it later copies the page later still. For that the pages must be out, those that the device wrote
     * too, before the bit is read; the other side takes the bit before it reads the page.
     */
    device_fence();
    for (unsigned int i = 0; i < log->pending; i++) {
        log->marked += set_missing(&log->bitmap[log->set[i].byte], log->set[i].bits);
    }
    log->marked += set_missing(&log->bitmap[log->byte], log->bits);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    log_forget(log);
}

void log_forget(struct dirty_log *log)
{
    log->pending = 0;
    log->bits = 0;
    log->flushing = false;
}

void log_lose(struct dirty_log *log)
{
    log_forget(log);
    log->bitmap = NULL;
    log->missed++;
}
