/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "worker.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "guard.h"
#include "packets.h"

/* How long the thread looks for more work before it sleeps. */
#define POLL_NS 50000
/*
 * Turns of an echo after which it looks at events while there is work: nothing but the driver brings any, and a call
 * into the kernel costs as much as two frames. With an uplink each frame is one already.
 */
#define ECHO_TURNS 16
/* How long it sleeps at most when doorbells have to be polled. */
#define NAP_MS 1

static const uint64_t one = 1;

void signal_fd(int fd)
{
    /* It fails only when the counter is full: then the other side has yet to look, and misses nothing. */
    ssize_t ignored = write(fd, &one, sizeof(one));

    (void)ignored;
}

void drain_fd(int fd)
{
    uint64_t value;
    ssize_t ignored = read(fd, &value, sizeof(value));

    (void)ignored;
}

static int64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

void engine_break(struct engine *engine, unsigned int queue, const char *reason)
{
    if (engine->fault == NULL) {
        engine->fault = reason;
        engine->fault_queue = queue;
        signal_fd(engine->fault_fd);
    }
}

void engine_lose_uplink(struct engine *engine, unsigned int pair)
{
    engine->uplink[pair].lost = true;
    engine->queue[tx_of(pair)].awake = true;    /* what waits to be sent is dropped */
}

bool engine_is_live(const struct engine *engine, unsigned int queue)
{
    return engine->running && !engine->client_gone && engine->fault == NULL &&
           engine->queue[queue].programmed;
}

bool engine_leaves_packets(const struct engine *engine)
{
    return engine->keeps_packets || (engine->running && engine->fault == NULL);
}

/* Ask the driver to notify where only it can bring work. False: there is some already. */
static bool arm(struct engine *engine)
{
    bool quiet = true;

    for (unsigned int i = 0; i < engine->queues; i++) {
        struct queue *queue = &engine->queue[i];
        bool wanted = i % 2 == ENGINE_RX ? queue->held : !queue->held;

        engine->serving = i;
        if (!engine_is_live(engine, i)) {
            continue;
        }
        if (!ring_resolve(&queue->ring, &engine->dma)) {
            engine_break(engine, i, queue->ring.error);
        } else if (!wanted) {
            ring_disarm(&queue->ring);
        } else if (ring_arm(&queue->ring) && queue->awake) {
            quiet = false;
        }
    }
    return quiet;
}

static void read_doorbells(struct engine *engine)
{
    for (unsigned int i = 0; i < engine->queues; i++) {
        struct queue *queue = &engine->queue[i];

        if (queue->doorbell != NULL && engine_is_live(engine, i) &&
            __atomic_exchange_n(queue->doorbell, ENGINE_NOT_RUNG, __ATOMIC_ACQ_REL) != ENGINE_NOT_RUNG) {
            queue->count.kicks++;
            queue->awake = true;
        }
    }
}

/* One turn: all that touches memory that others can take away, hence under guard_run(). */
static void turn(void *argument)
{
    struct engine *engine = argument;

    read_doorbells(engine);
    for (unsigned int i = 0; i < engine->pairs; i++) {
        if (engine->queue[rx_of(i)].awake) {
            engine->serving = rx_of(i);
            engine->worked |= packets_receive(engine, i);
        }
        if (engine->queue[tx_of(i)].awake) {
            engine->serving = tx_of(i);
            engine->worked |= packets_transmit(engine, i);
        }
    }
    if (engine->may_sleep && !engine->worked) {
        engine->may_sleep = arm(engine);
    }
}

static void take_turn(struct engine *engine)
{
    engine->worked = false;
    if (!guard_run(turn, engine)) {
        engine_break(engine, engine->serving, "memory has gone under a ring or a buffer");
    }
}

/*
 * Wait on the uplink for what can be used: a level-triggered event that nobody takes would not let the
 * thread sleep.
 */
static void watch_uplink(struct engine *engine, unsigned int pair)
{
    struct uplink *uplink = &engine->uplink[pair];
    unsigned int rx = rx_of(pair), tx = tx_of(pair);
    struct epoll_event event = { .data.u32 = TOKEN_PACKET + pair };
    bool no_room = engine_is_live(engine, rx) ? engine->queue[rx].held : engine_leaves_packets(engine);
    bool congested = engine_is_live(engine, tx) && engine->queue[tx].held;
    int operation = EPOLL_CTL_MOD;

    if (!uplink->lost) {
        event.events = (no_room ? 0 : EPOLLIN) | (congested ? EPOLLOUT : 0);
    }
    if (event.events == uplink->events) {
        return;
    }
    if (event.events == 0) {
        operation = EPOLL_CTL_DEL;
    } else if (uplink->events == 0) {
        operation = EPOLL_CTL_ADD;
    }
    if (epoll_ctl(engine->epoll_fd, operation, uplink->packet_fd, &event) == 0) {
        uplink->events = event.events;
    }
}

static void handle_event(struct engine *engine, const struct epoll_event *event)
{
    unsigned int token = event->data.u32;

    if (token == TOKEN_WAKE) {
        drain_fd(engine->wake_fd);
    } else if (token == TOKEN_CLIENT) {
        engine->client_gone = true;
    } else if (token >= TOKEN_PACKET) {
        unsigned int pair = token - TOKEN_PACKET;

        engine->queue[rx_of(pair)].awake |= (event->events & EPOLLIN) != 0;
        engine->queue[tx_of(pair)].awake |= (event->events & EPOLLOUT) != 0;
        if (!(event->events & (EPOLLIN | EPOLLOUT))) {
            engine_lose_uplink(engine, pair);
        }
    } else {
        engine->queue[token].count.kicks++;
        engine->queue[token].awake = true;
    }
}

static bool any_is_live(const struct engine *engine)
{
    for (unsigned int i = 0; i < engine->queues; i++) {
        if (engine_is_live(engine, i)) {
            return true;
        }
    }
    return false;
}

/* Take what has happened, and if `sleep`, wait until something does. */
static void collect_events(struct engine *engine, bool sleep)
{
    struct epoll_event events[TOKENS];
    int longest = engine->doorbells != NULL && any_is_live(engine) ? NAP_MS : -1;
    int count;

    for (unsigned int i = 0; i < engine->pairs; i++) {
        watch_uplink(engine, i);
    }
    if (sleep) {
        pthread_mutex_unlock(&engine->mutex);
    }
    count = epoll_wait(engine->epoll_fd, events, TOKENS, sleep ? longest : 0);
    if (sleep) {
        pthread_mutex_lock(&engine->mutex);
    }
    for (int i = 0; i < count; i++) {
        handle_event(engine, &events[i]);
    }
}

/* From now on only events bring work. One that came while nothing may move counts when it may again. */
static void forget_awake(struct engine *engine)
{
    for (unsigned int i = 0; i < engine->queues; i++) {
        engine->queue[i].awake &= engine->queue[i].programmed && !engine->running;
    }
}

/* Whether events can wait for a few more turns. */
static bool is_engrossed(const struct engine *engine, unsigned int turns)
{
    return engine->echo && engine->worked && turns % ECHO_TURNS != 0;
}

static void let_callers_in(struct engine *engine)
{
    while (engine->callers > 0) {
        pthread_cond_wait(&engine->no_callers, &engine->mutex);
    }
}

void *worker_main(void *argument)
{
    struct engine *engine = argument;
    int64_t poll_until = 0;
    unsigned int turns = 0;

    pthread_mutex_lock(&engine->mutex);
    while (!engine->quit) {
        int64_t now = now_ns();

        engine->may_sleep = now >= poll_until;
        take_turn(engine);
        if (engine->worked) {
            poll_until = now + POLL_NS;
            engine->may_sleep = false;
        }
        if (engine->may_sleep) {
            forget_awake(engine);
        }
        if (!is_engrossed(engine, ++turns)) {
            collect_events(engine, engine->may_sleep);
        }
        let_callers_in(engine);
    }
    pthread_mutex_unlock(&engine->mutex);
    return NULL;
}
