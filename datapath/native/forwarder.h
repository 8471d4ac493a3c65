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

/*
 * After a pause a processor's caches hold little of what is here, and each line takes as long as the code that
 * uses it: what forwards a kick is together in one line of the relay and one of the entry.
 */
#define CACHE_LINE 64

struct relay_entry {
    _Alignas(CACHE_LINE) struct shadow *shadow; /* NULL: only notifications are forwarded */
    volatile uint16_t *doorbell;
    uint32_t generation;        /* tells an event of a removed ring from one of its successor */
    int doorbell_fd;
    bool doorbell_blocks;       /* writing to doorbell_fd waits while it is full */
    bool added;
    bool waiting[WIRES];        /* registered with epoll */
    int fd[WIRES];
    struct relay_counters count;

    /* Of a shadow ring. */
    int call_fd;
    bool held;                  /* the device gets no more heads */
    bool awake;                 /* there may be something to do */
    bool known;                 /* `last` is set */
    struct shadow_state last;   /* where the ring stood when it was removed */
};

struct relay {
    /* Guards all of this. The thread has it except while it sleeps or lets callers in. */
    _Alignas(CACHE_LINE) pthread_mutex_t lock;
    _Atomic unsigned int callers;
    int epoll_fd;
    bool stop;
    unsigned int shadows;       /* rings that are shadowed */
    pthread_t thread;
    pthread_cond_t no_callers;
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

/*
 * Take back the kick eventfd of a ring that is forwarded and waited for no more: it is empty then, as if each kick
 * had been read, and if there were any, the doorbell is rung once more, since the last may not have been heard.
 */
void forwarder_drain(struct relay_entry *entry, uint16_t ring);

/* Ring a doorbell now. */
void forwarder_ring(struct relay_entry *entry, uint16_t ring);

/* Wait for nothing of this ring any more. */
void forwarder_unwatch(struct relay *relay, struct relay_entry *entry);

/* Carry over what the device, which has been stopped, completed last, and leave the guest's ring. */
void forwarder_finish(struct relay *relay, struct relay_entry *entry);

#endif
