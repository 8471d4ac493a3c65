/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "forwarder.h"

#include <endian.h>
#include <errno.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

#include "barrier.h"
#include "eventfd.h"
#include "guard.h"

#define EVENTS_AT_ONCE 32

uint64_t forwarder_token(uint16_t ring, uint32_t generation, enum wire wire)
{
    return (uint64_t)wire << 48 | (uint64_t)ring << 32 | generation;
}

struct store {
    volatile uint16_t *to;
    uint16_t value;
};

static void store_doorbell(void *argument)
{
    const struct store *store = argument;

    *store->to = store->value;
}

void forwarder_ring(struct relay_entry *entry, uint16_t ring)
{
    bool rung;

    if (entry->doorbell_fd < 0) {
        struct store store = { entry->doorbell, htole16(ring) };

        /* The updates of the ring must be visible to the device before the store is. */
        device_fence();
        /* The register of a function that was pulled out raises SIGBUS. */
        rung = guard_run(store_doorbell, &store);
    } else if (!entry->doorbell_blocks) {
        rung = signal_eventfd(entry->doorbell_fd);
    } else {
        rung = signal_other(entry->doorbell_fd);
    }
    /* An eventfd that is full: a device that is woken by writes alone misses this one. */
    entry->count.errors += !rung;
}

static void stop_waiting(struct relay *relay, struct relay_entry *entry, enum wire wire)
{
    if (entry->waiting[wire]) {
        epoll_ctl(relay->epoll_fd, EPOLL_CTL_DEL, entry->fd[wire], NULL);
        entry->waiting[wire] = false;
    }
}

void forwarder_unwatch(struct relay *relay, struct relay_entry *entry)
{
    for (enum wire wire = 0; wire < WIRES; wire++) {
        stop_waiting(relay, entry, wire);
    }
}

/* A shadow ring stands still from now on. */
static void stand_still(struct relay *relay, struct relay_entry *entry)
{
    static const uint64_t one = 1;
    /* Cannot fail but by a full counter, and then it is readable. */
    ssize_t ignored = write(relay->broken_fd, &one, sizeof(one));

    (void)ignored;
    forwarder_unwatch(relay, entry);
    entry->awake = false;
}

/*
 * Empty an eventfd. It is shared: it may be a blocking one that somebody else has drained meanwhile, and its
 * flags are not ours to change. What read() returns.
 */
static ssize_t drain(int fd)
{
    uint64_t count;
    struct iovec buffer = { &count, sizeof(count) };

    return preadv2(fd, &buffer, 1, -1, RWF_NOWAIT);
}

void forwarder_drain(struct relay_entry *entry, uint16_t ring)
{
    if (drain(entry->fd[WIRE_KICK]) > 0) {
        forwarder_ring(entry, ring);
    }
}

static void handle_wire(struct relay *relay, uint64_t event, uint32_t state)
{
    enum wire wire = event >> 48;
    uint16_t ring = event >> 32;
    struct relay_entry *entry = &relay->ring[ring];
    ssize_t got;

    if (!entry->waiting[wire] || forwarder_token(ring, entry->generation, wire) != event) {
        return;                 /* removed after epoll_wait() had reported it */
    }
    if (entry->shadow == NULL && !(state & (EPOLLERR | EPOLLHUP))) {
        /*
         * Not read: an edge comes with each kick, whatever the count. To read would not only be another system
         * call, it would take the eventfd's memory away from the processor that kicks.
         */
        forwarder_ring(entry, ring);
        entry->count.kicks++;
        return;
    }
    got = drain(entry->fd[wire]);
    if (got == sizeof(uint64_t)) {
        entry->count.kicks += wire == WIRE_KICK;
        if (entry->shadow != NULL) {
            entry->awake = true;
        } else {
            forwarder_ring(entry, ring);
        }
    } else if (got >= 0 || (errno != EAGAIN && errno != EINTR)) {
        /* Not an eventfd, or closed at the other end: it would stay readable for ever. */
        entry->count.errors++;
        stop_waiting(relay, entry, wire);
        if (wire == WIRE_INTERRUPT) {
            shadow_fail(entry->shadow, "the device's interrupt descriptor fails");
            stand_still(relay, entry);
        }
    }
}

static void handle_poll(struct relay *relay)
{
    uint64_t expirations;

    if (read(relay->poll_fd, &expirations, sizeof(expirations)) < 0) {
        return;                 /* disarmed after epoll_wait() had reported it */
    }
    for (uint16_t ring = 0; ring < relay->rings; ring++) {
        struct relay_entry *entry = &relay->ring[ring];

        if (!entry->added || entry->fd[WIRE_KICK] >= 0) {
            continue;
        }
        if (entry->shadow != NULL) {
            entry->awake = entry->shadow->error == NULL;
        } else {
            forwarder_ring(entry, ring);
        }
    }
}

/* What is done for a shadow ring under guard_run(), and what comes of it. */
struct turn {
    struct relay *relay;
    struct relay_entry *entry;
    bool more;
    bool doorbell;
    bool interrupt;
};

static void take_turn(void *argument)
{
    struct turn *turn = argument;
    struct relay *relay = turn->relay;
    struct shadow *shadow = turn->entry->shadow;
    unsigned int moved;

    if (!shadow_resolve(shadow, &relay->memory)) {
        return;
    }
    moved = shadow_complete(shadow, &relay->memory, &relay->log);
    turn->interrupt |= shadow_wants_interrupt(shadow);
    if (!turn->entry->held && shadow->error == NULL) {
        moved += shadow_give(shadow);
        turn->doorbell |= shadow_wants_doorbell(shadow);
    }
    if (shadow->error == NULL && moved > 0) {
        shadow_disarm(shadow, &relay->log);
        turn->more = true;
    } else if (shadow->error == NULL) {
        turn->more = shadow_arm(shadow, &relay->log, !turn->entry->held);
    }
    log_flush(&relay->log);
}

static void take_last_turn(void *argument)
{
    struct turn *turn = argument;
    struct relay *relay = turn->relay;
    struct shadow *shadow = turn->entry->shadow;

    if (!shadow_resolve(shadow, &relay->memory)) {
        return;
    }
    while (shadow_complete(shadow, &relay->memory, &relay->log) > 0) {
    }
    turn->interrupt |= shadow_wants_interrupt(shadow);
    if (shadow->error == NULL) {
        shadow_leave(shadow, &relay->log);
    }
    log_flush(&relay->log);
}

/* Run a turn, whatever vanishes meanwhile: without the log it goes on, without the guest's memory not. */
static void run_turn(struct turn *turn, void (*body)(void *turn))
{
    struct shadow *shadow = turn->entry->shadow;
    uint16_t before = shadow->next_used;

    while (!guard_run(body, turn)) {
        if (!turn->relay->log.flushing) {
            shadow_fail(shadow, "memory has gone under the ring");
            break;
        }
        log_lose(&turn->relay->log);
    }
    turn->entry->count.relayed += (uint16_t)(shadow->next_used - before);
    if (turn->interrupt && turn->entry->call_fd >= 0 && !signal_other(turn->entry->call_fd)) {
        turn->entry->count.errors++;
    }
}

static void serve(struct relay *relay, uint16_t ring)
{
    struct relay_entry *entry = &relay->ring[ring];
    struct turn turn = { .relay = relay, .entry = entry };

    run_turn(&turn, take_turn);
    if (turn.doorbell) {
        forwarder_ring(entry, ring);
    }
    entry->awake = turn.more;
    if (entry->shadow->error != NULL) {
        stand_still(relay, entry);
    }
}

void forwarder_finish(struct relay *relay, struct relay_entry *entry)
{
    struct turn turn = { .relay = relay, .entry = entry };

    if (entry->shadow->error == NULL) {
        run_turn(&turn, take_last_turn);
    }
}

/* A batch for each shadow ring that is awake. Whether there may be more. */
static bool serve_rings(struct relay *relay)
{
    bool more = false;

    if (relay->shadows == 0) {
        return false;
    }
    for (uint16_t ring = 0; ring < relay->rings; ring++) {
        if (relay->ring[ring].awake) {
            serve(relay, ring);
            more |= relay->ring[ring].awake;
        }
    }
    return more;
}

/* Take what has happened, and if `sleep`, wait until something does. */
static void collect_events(struct relay *relay, bool sleep)
{
    struct epoll_event events[EVENTS_AT_ONCE];
    uint64_t ignored;
    int count;

    if (sleep) {
        pthread_mutex_unlock(&relay->lock);
    }
    count = epoll_wait(relay->epoll_fd, events, EVENTS_AT_ONCE, sleep ? -1 : 0);
    if (sleep) {
        pthread_mutex_lock(&relay->lock);
    }
    for (int i = 0; i < count; i++) {
        uint64_t event = events[i].data.u64;

        if (event == EVENT_WAKE) {
            while (read(relay->wake_fd, &ignored, sizeof(ignored)) < 0 && errno == EINTR) {
            }
        } else if (event == EVENT_POLL) {
            handle_poll(relay);
        } else {
            handle_wire(relay, event, events[i].events);
        }
    }
}

/* Under load, too, callers come before rings; the mutex alone would starve them. */
static void let_callers_in(struct relay *relay)
{
    while (relay->callers > 0) {
        pthread_cond_wait(&relay->no_callers, &relay->lock);
    }
}

/*
 * Between two batches, let whoever shares this processor run: the device and the guest make the next batch
 * larger meanwhile, and each look at a ring costs the same for one entry as for many.
 */
static void give_way(struct relay *relay)
{
    pthread_mutex_unlock(&relay->lock);
    sched_yield();
    pthread_mutex_lock(&relay->lock);
}

void *forwarder_main(void *argument)
{
    struct relay *relay = argument;

    pthread_mutex_lock(&relay->lock);
    while (!relay->stop) {
        bool more = serve_rings(relay);

        if (more) {
            give_way(relay);
        }
        collect_events(relay, !more);
        let_callers_in(relay);
    }
    pthread_mutex_unlock(&relay->lock);
    return NULL;
}
