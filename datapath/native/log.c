/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "log.h"

/* Set the bits first to last, of one byte. */
static void set_bits(uint8_t *byte, unsigned int first, unsigned int last)
{
    log_set(byte, (uint8_t)(0xffu << first & 0xffu >> (7 - last)));
}

void log_mark(struct dirty_log *log, uint64_t address, uint64_t length)
{
    uint64_t last_byte, first, last;

    if (log->bitmap == NULL || length == 0) {
        return;
    }
    if (__builtin_add_overflow(address, length - 1, &last_byte)) {
        last_byte = UINT64_MAX;
    }
    first = address / LOG_PAGE_SIZE;
    last = last_byte / LOG_PAGE_SIZE;
    if (last / 8 >= log->bytes) {
        uint64_t end = log->bytes * 8;

        log->missed += last - (first < end ? end : first) + 1;
        if (first >= end) {
            return;
        }
        last = end - 1;
    }
    while (first / 8 < last / 8) {
        set_bits(&log->bitmap[first / 8], first % 8, 7);
        first = (first / 8 + 1) * 8;
    }
    set_bits(&log->bitmap[last / 8], first % 8, last % 8);
}
