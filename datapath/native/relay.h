/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The relay: one thread per device between a guest and the device. A ring is relayed in one of two ways:
 *
 * - its notifications ("kicks", eventfds of a vhost-user front-end) go to the device's doorbell, and
 *   nothing else: device and guest share the ring, and the relay never looks at guest memory;
 * - the whole ring, as a shadow ring (shadow.h): what a device needs that cannot begin where a ring
 *   stands, or whose writes have to be logged.
 *
 * All functions may be called from any thread, but a relay must not be used after relay_close(). When a
 * call returns, the thread has seen it: it no longer uses the memory or descriptor that was taken away.
 * Functions that return int give 0 or a negative errno.
 */
#ifndef LIBVIRT_VDPA_RELAY_H
#define LIBVIRT_VDPA_RELAY_H

#include <stdint.h>

#include "shadow.h"

/* cffi: begin */
struct relay;

/* The descriptors of a shadow ring; the caller keeps owning them. -1: there is none. */
struct relay_wires {
    int kick_fd;        /* eventfd of the guest's notifications; -1: look each millisecond */
    int call_fd;        /* eventfd that interrupts the guest; -1: it wants none */
    int interrupt_fd;   /* eventfd that the device signals, needed */
    int doorbell_fd;    /* as for relay_add() */
    void *doorbell;
};

struct relay_counters {
    uint64_t kicks;     /* notifications of the guest that were heard */
    uint64_t errors;    /* descriptors given up, doorbells and interrupts that could not be delivered */
    uint64_t relayed;   /* used entries carried over */
};

/* Start a relay for rings 0 .. rings-1. */
int relay_open(uint16_t rings, struct relay **relay);

/*
 * Forward the kicks of a ring from now on. A kick that is already pending counts.
 *
 * kick_fd: an eventfd, whose count is not read before the ring is removed, or -1 to ring the doorbell every millisecond (a front-end that asks for polling).
 * doorbell_fd: an eventfd of the device to write to, or -1 to store the ring's number at `doorbell`,
 * the mapped 16-bit notify register. The caller keeps owning all of them.
 *
 * -EBUSY: the ring has been added already. -EPERM: kick_fd is of a kind that cannot be waited for.
 */
int relay_add(struct relay *relay, uint16_t ring, int kick_fd, int doorbell_fd, void *doorbell);

/*
 * Relay a whole ring from now on, beginning with a look at it. -EINVAL: see shadow_new(). Memory that is
 * not there breaks the ring later.
 */
int relay_add_shadow(struct relay *relay, uint16_t ring, const struct shadow_setup *setup,
                     const struct relay_wires *wires);

/* Of a shadow ring; -ENOENT: it is none. Interrupt the guest by another eventfd. */
int relay_set_call(struct relay *relay, uint16_t ring, int call_fd);

/* Of a shadow ring; -ENOENT: it is none. Give the device no more heads until the ring is removed. */
int relay_hold(struct relay *relay, uint16_t ring);

/* Where a shadow ring stands, or stood when it was removed. -ENOENT: it is, or was, none. */
int relay_state(struct relay *relay, uint16_t ring, struct shadow_state *state);

/*
 * Forward no more. On return nothing of what was given with the ring is in use. Idempotent. The kick eventfd
 * of a ring that is no shadow ring is empty then; if it was not, the doorbell is rung once more. A shadow ring's
 * device has been stopped: what it completed is carried over first.
 */
void relay_remove(struct relay *relay, uint16_t ring);

/* Guest memory for shadow rings: see dma_borrow() and dma_remove(). */
int relay_map(struct relay *relay, uint64_t address, uint64_t size, void *host);
int relay_unmap(struct relay *relay, uint64_t address, uint64_t size);

/* Mark what shadow rings and their devices write in a bitmap (log.h), from now on; NULL ends it. */
void relay_log(struct relay *relay, void *bitmap, uint64_t bytes);

/* Of all logs so far. */
struct relay_log_counters {
    uint64_t marked;    /* pages that were marked and had not been */
    uint64_t missed;    /* pages that a log had no room for, plus logs whose memory had gone */
};

struct relay_log_counters relay_log_count(struct relay *relay);

/* Eventfd of the relay, readable after a shadow ring has met an error. */
int relay_broken_fd(struct relay *relay);

/* Ring an added ring's doorbell once, now. -ENOENT: the ring has not been added. */
int relay_ring(struct relay *relay, uint16_t ring);

/* What a ring has counted since relay_open(), over all its adds and removes. */
struct relay_counters relay_count(struct relay *relay, uint16_t ring);

/* End the thread, let go of all rings as they are, free the relay. */
void relay_close(struct relay *relay);
/* cffi: end */

#endif
