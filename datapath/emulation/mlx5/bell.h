/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The device's own thread: it looks at doorbells, which are memory that anybody may have mapped, tells engines of
 * kicks, and drivers of what engines have completed. It sleeps a millisecond at most while queues move, for
 * nothing wakes it when memory is written.
 */
#ifndef MLX5_EMULATION_BELL_H
#define MLX5_EMULATION_BELL_H

#include <stdbool.h>

#include "device.h"

/* With the device held; 0 or -errno. */
int bell_open(struct device *device);
void bell_close(struct device *device);

/* Let the thread see that queues move: while none do, it sleeps. */
void bell_wake(struct device *device);

/* Listen to a pair's engine. False: the system has no more room for it. */
bool bell_watch(struct device *device, unsigned int pair);

/* A doorbell page: nobody has rung yet. */
void bell_hang(struct device *device, unsigned int page);

/* Take a doorbell page away. */
void bell_take_down(struct device *device, unsigned int page);

#endif
