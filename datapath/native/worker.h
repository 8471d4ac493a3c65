/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The thread of an engine: when it sleeps, polls and moves packets (packets.c); and the state that it shares
 * with the calls of other threads (engine.c). Private to the engine.
 */
#ifndef LIBVIRT_VDPA_WORKER_H
#define LIBVIRT_VDPA_WORKER_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "dma.h"
#include "engine.h"
#include "filter.h"
#include "offload.h"
#include "ring.h"

/* cffi: begin */
/* cffi: end */

/* Largest frame, more than an uplink takes or gives: 65535 bytes of IP payload and their headers. */
#define MAX_FRAME 65664

#define ENGINE_MAX_QUEUES (2 * ENGINE_MAX_PAIRS)

/* Tokens of epoll; a queue's own number stands for its kick eventfd. */
enum {
    TOKEN_PACKET = ENGINE_MAX_QUEUES,       /* of the first pair; the others follow */
    TOKEN_WAKE = TOKEN_PACKET + ENGINE_MAX_PAIRS,
    TOKEN_CLIENT,
    TOKENS
};

/* As it lies in a driver's buffers, and on an uplink with headers. */
struct packet {
    struct virtio_net_hdr_v1 header;
    uint8_t frame[MAX_FRAME];
};
_Static_assert(offsetof(struct packet, frame) == NET_HEADER_SIZE, "one piece of memory");

struct queue {
    bool programmed;
    bool awake;                 /* notified, or its uplink is ready: there may be work */
    bool held;                  /* rx: too few buffers for the packet at hand; tx: the uplink takes no more */
    int kick_fd;
    int call_fd;
    uint16_t *doorbell;         /* NULL: only the eventfd */
    struct ring ring;
    struct engine_counters count;
};

/* Where the packets of a queue pair come from and go to. */
struct uplink {
    int packet_fd;
    uint32_t events;            /* what epoll waits for on packet_fd; 0: not registered */
    bool lost;
    size_t frame_length;        /* of the received packet that waits in `packet`; 0 if none does */
    struct packet packet;
};

struct engine {
    pthread_t thread;
    /* Guards all below. The thread has it except while it sleeps or lets callers in. */
    pthread_mutex_t mutex;
    pthread_cond_t no_callers;
    _Atomic unsigned int callers;
    bool quit;

    int epoll_fd;
    int wake_fd;
    int fault_fd;
    bool echo;                  /* no uplinks: what is sent comes back */
    bool header;                /* uplinks have a header before each frame */
    uint16_t mtu;               /* 0: no limit */
    int client_fd;              /* -1: none */
    bool keeps_packets;
    void *doorbells;

    bool running;
    uint64_t features;          /* accepted by the driver */
    struct filter filter;
    bool client_gone;
    const char *fault;
    unsigned int fault_queue;
    unsigned int queues;        /* twice the pairs */
    struct queue queue[ENGINE_MAX_QUEUES];
    struct dma_table dma;
    struct dma_log log;

    /* What the guarded part of the loop is told, and tells. */
    bool may_sleep;
    bool worked;
    unsigned int serving;

    struct ring_chain first;
    struct ring_chain chain;
    struct ring_element used[RING_MAX_SIZE];

    unsigned int pairs;
    struct uplink uplink[];     /* one a pair */
};

/* For eventfds that no client has: they do not block, and a full counter is as good as one more. */
void signal_fd(int fd);
void drain_fd(int fd);

/* Stop all queues until a reset, and say so. Only the first reason counts. */
void engine_break(struct engine *engine, unsigned int queue, const char *reason);

/* The numbers of a pair's queues. */
static inline unsigned int rx_of(unsigned int pair)
{
    return 2 * pair + ENGINE_RX;
}

static inline unsigned int tx_of(unsigned int pair)
{
    return 2 * pair + ENGINE_TX;
}

/* A pair's uplink is gone for good: nothing comes any more, and what is sent is dropped. */
void engine_lose_uplink(struct engine *engine, unsigned int pair);

/* Whether a queue may touch the driver's memory. */
bool engine_is_live(const struct engine *engine, unsigned int queue);

/* Whether packets that come are left on the uplink while no queue receives: one that runs may have one soon. */
bool engine_leaves_packets(const struct engine *engine);

/* What the thread runs, given its engine, until `quit`. */
void *worker_main(void *engine);

#endif
