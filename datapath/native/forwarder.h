/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The thread of a relay: when it sleeps, what it forwards; and the state that it shares with the calls of
 * other threads (relay.c). Private to the relay.
 */
#ifndef LIBVIRT_VDPA_FORWARDER_H
#define LIBVIRT_VDPA_FORWARDER_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "dma.h"
#include "log.h"
#include "relay.h"
#include "shadow.h"

/* cffi: begin */
/* cffi: end */

/* The eventfds of a ring that the thread waits for. */
enum wire { WIRE_KICK, WIRE_INTERRUPT, WIRES };

/* What epoll_event.data.u64 says: see forwarder_token(), or one of these two. */
#define EVENT_WAKE UINT64_MAX
#define EVENT_POLL (UINT64_MAX - 1)

struct relay_entry {
    bool added;
    uint32_t generation;        /* tells an event of a removed ring from one of its successor */
    int fd[WIRES];
    bool waiting[WIRES];        /* registered with epoll */
    int doorbell_fd;
    volatile uint16_t *doorbell;
    struct relay_counters count;

    /* Of a shadow ring. */
    struct shadow *shadow;      /* NULL: only notifications are forwarded */
    int call_fd;
    bool held;                  /* the device gets no more heads */
    bool awake;                 /* there may be something to do */
    bool known;                 /* `last` is set */
    struct shadow_state last;   /* where the ring stood when it was removed */
};

struct relay {
    pthread_t thread;
    /* Guards all below. The thread has it except while it sleeps or lets callers in. */
    pthread_mutex_t lock;
    pthread_cond_t no_callers;
    _Atomic unsigned int callers;
    bool stop;
    int epoll_fd;
    int wake_fd;
    int poll_fd;                /* timerfd, armed while some ring is polled */
    int broken_fd;
    unsigned int polled;
    struct dma_table memory;
    struct dirty_log log;
    uint16_t rings;
    struct relay_entry ring[];
};

/* What the thread runs, given its relay, until `stop`. */
void *forwarder_main(void *relay);

uint64_t forwarder_token(uint16_t ring, uint32_t generation, enum wire wire);

/* Ring a doorbell now. */
void forwarder_ring(struct relay_entry *entry, uint16_t ring);

/* Wait for nothing of this ring any more. */
void forwarder_unwatch(struct relay *relay, struct relay_entry *entry);

/* Carry over what the device, which has been stopped, completed last, and leave the guest's ring. */
void forwarder_finish(struct relay *relay, struct relay_entry *entry);

#endif
