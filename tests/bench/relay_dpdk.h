/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The used-ring relay of DPDK's vhost library, on a device that a front-end of ours has set up. */
#ifndef RELAY_DPDK_H
#define RELAY_DPDK_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

/* DPDK's environment, once in a process, with these arguments; 0 or -1. */
int dpdk_begin(char **words, int count);

/* Serve, and no longer serve, a vhost-user socket; 0 or -1. */
int dpdk_serve(const char *path);
int dpdk_end(const char *path);

/* The device whose front-end has started it, or -1 when there is none in time. */
int dpdk_wait_device(int milliseconds);

/*
 * Time the relay: `count` times a ring's `size` used entries, each of `length` bytes in the descriptor of its
 * own number, `batch` to a call, with nothing in the log before. `ring` is memory for the mediated ring, which
 * goes on where the last run has left it. Puts nanoseconds per entry into `times`. 0, or -1 when a call has
 * carried over less.
 */
int dpdk_relay(int vid, uint16_t queue, void *ring, uint16_t size, uint32_t length, uint16_t batch,
               uint8_t *log, size_t log_size, double *times, int count);

/* cffi: end */

#endif
