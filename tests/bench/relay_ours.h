/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The used half of datapath/native/shadow.c, on a ring in memory that stands in for a guest's. */
#ifndef RELAY_OURS_H
#define RELAY_OURS_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

/* Where the guest's memory and its ring are; the ring by guest physical address, from index 0 on. */
struct ours_guest {
    void *memory;
    uint64_t memory_size;
    uint64_t descriptors;
    uint64_t avail;
    uint64_t used;
    uint16_t size;
};

struct ours;

/* NULL: no memory, or no such ring can be. */
struct ours *ours_begin(const struct ours_guest *guest);
void ours_end(struct ours *ours);

/*
 * Time the relay: `count` times a ring's `size` used entries, each of `length` bytes in the descriptor of its
 * own number, `batch` to an interrupt, with nothing in the log before; `log` may be NULL. The heads are given to
 * the device outside the measured time. Puts nanoseconds per entry into `times`. NULL, or what was wrong.
 */
const char *ours_relay(struct ours *ours, uint32_t length, uint16_t batch, uint8_t *log, size_t log_size,
                       double *times, int count);

/* cffi: end */

#endif
