/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The completions of a ConnectX' virtqueues: one thread per device that finds what they have completed
 * (completion_queue.h), and interrupts the guest. While there is traffic it looks at the queues from time to time;
 * when it has found nothing for a while it arms them, and sleeps until the device raises an event on its channel.
 *
 * All functions may be called from any thread, but none after completions_close(). When a call returns, the thread
 * has seen it: it no longer uses the memory or descriptor that was taken away. Functions that return int give 0 or
 * a negative errno.
 */
#ifndef LIBVIRT_VDPA_COMPLETIONS_H
#define LIBVIRT_VDPA_COMPLETIONS_H

#include <stdint.h>

#include "completion_queue.h"

/* cffi: begin */
struct completions;

enum completions_mode {
    COMPLETIONS_ADAPTIVE,       /* look after a time that grows while nothing is found, and shrinks by how much is */
    COMPLETIONS_FIXED,          /* look after a fixed time */
    COMPLETIONS_INTERRUPTS,     /* look when the device raises an event */
};

struct completions_setup {
    unsigned int queues;        /* they are numbered 0 .. queues-1 */
    enum completions_mode mode;
    unsigned int event_us;      /* microseconds: the step of an adaptive time, or the fixed one; 0: only yield */
    unsigned int no_traffic_time;   /* looks in a row that may find nothing before queues are armed */
    int core;                   /* processor of the thread; -1: any */
    int channel_fd;             /* the device's event channel, which is made non-blocking: an event is 8 bytes, the
                                   number of a queue */
    void *page;                 /* of the device, to arm queues by (UAR) */
};

struct completions_counters {
    uint64_t completions;       /* messages of the queue that it has completed something */
    uint64_t errors;            /* looks at the queue that found a message's receive failed */
    uint64_t interrupts;        /* of the guest */
};

/* Start the thread. -EINVAL: a mode or processor that there is not. */
int completions_open(const struct completions_setup *setup, struct completions **completions);

/*
 * Look at a queue from now on. What it has completed before counts. It interrupts at once: whoever looked before may
 * have been killed between a completion and its interrupt.
 *
 * call_fd: eventfd that interrupts the guest, -1: there is none. The caller keeps owning it.
 * -EBUSY: there is one of this number. -EINVAL: there cannot be.
 */
int completions_add(struct completions *completions, unsigned int index, const struct completion_source *source,
                    int call_fd);

/* Interrupt by another eventfd, at once if something was completed while there was none. -ENOENT: no queue. */
int completions_set_call(struct completions *completions, unsigned int index, int call_fd);

/*
 * Look at a queue once more, interrupt, and then no more. It interrupts in any case: the message about what
 * a virtqueue has completed last may come after the virtqueue was stopped. Idempotent.
 */
void completions_remove(struct completions *completions, unsigned int index);

/* What a queue has counted since completions_open(), over all that had its number. */
struct completions_counters completions_count(struct completions *completions, unsigned int index);

/* Eventfd, readable after the receive of a message has failed, or the channel or the page has. */
int completions_broken_fd(struct completions *completions);

/* End the thread, let go of all queues as they are. */
void completions_close(struct completions *completions);
/* cffi: end */

#endif
