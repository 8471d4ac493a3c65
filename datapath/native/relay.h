/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The notify relay: one thread per device that forwards the guest's notifications ("kicks", eventfds
 * of a vhost-user front-end) to the device's doorbells. It never looks at guest memory.
 *
 * All functions may be called from any thread, but a relay must not be used after relay_close().
 * Functions that return int give 0 or a negative errno.
 */
#ifndef LIBVIRT_VDPA_RELAY_H
#define LIBVIRT_VDPA_RELAY_H

#include <stdint.h>

/* cffi: begin */
struct relay;

struct relay_counters {
    uint64_t kicks;     /* notifications of the guest that were forwarded */
    uint64_t errors;    /* kick descriptors given up, doorbells that could not be rung */
};

/* Start a relay for rings 0 .. rings-1. */
int relay_open(uint16_t rings, struct relay **relay);

/*
 * Forward the kicks of a ring from now on. A kick that is already pending counts.
 *
 * kick_fd: an eventfd, or -1 to ring the doorbell every millisecond (a front-end that asks for polling).
 * doorbell_fd: an eventfd of the device to write to, or -1 to store the ring's number at `doorbell`,
 * the mapped 16-bit notify register. The caller keeps owning all of them.
 *
 * -EBUSY: the ring has been added already. -EPERM: kick_fd is of a kind that cannot be waited for.
 */
int relay_add(struct relay *relay, uint16_t ring, int kick_fd, int doorbell_fd, void *doorbell);

/* Forward no more. On return neither descriptor nor the mapped register is in use. Idempotent. */
void relay_remove(struct relay *relay, uint16_t ring);

/* Ring an added ring's doorbell once, now. -ENOENT: the ring has not been added. */
int relay_ring(struct relay *relay, uint16_t ring);

/* What a ring has counted since relay_open(), over all its adds and removes. */
struct relay_counters relay_count(struct relay *relay, uint16_t ring);

/* End the thread, remove all rings, free the relay. */
void relay_close(struct relay *relay);
/* cffi: end */

#endif
