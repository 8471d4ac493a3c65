/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A kick on its way to a doorbell: the guest's side, which is timed, and a relay that does what the notify
 * relay of DPDK's ifcvf driver does. That one cannot be had without a device of its own, so it is written anew.
 */
#ifndef KICK_DPDK_H
#define KICK_DPDK_H

#include <stdint.h>

/* cffi: begin */

/* A queue's doorbell: the mapped 16-bit register, or an eventfd, which DPDK's driver does not know. */
struct doorbell {
    volatile uint16_t *mapped;      /* NULL: it is the eventfd */
    int fd;                         /* one that does not block; -1: it is the register */
};

struct kicks;

/* A thread that waits for kicks of queue 0 and rings its doorbell; NULL: it could not be had. */
struct kicks *dpdk_kicks_begin(int kick_fd, struct doorbell doorbell);
void dpdk_kicks_end(struct kicks *kicks);

/*
 * Kick `count` times, with a pause of so many microseconds before each, and wait until the doorbell has been
 * rung. Puts nanoseconds of each into `times`. 0, or -1 when a doorbell was not rung within a second.
 */
int kick_times(int kick_fd, struct doorbell doorbell, unsigned int pause, double *times, int count);

/* cffi: end */

#endif
