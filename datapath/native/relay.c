/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "forwarder.h"
#include "guard.h"
#include "thread.h"

#define POLL_INTERVAL_NS 1000000

/* The thread gives way to whoever waits, even under load, when a mutex alone would starve them. */
static void enter(struct relay *relay)
{
    relay->callers++;
    pthread_mutex_lock(&relay->lock);
}

static void leave(struct relay *relay)
{
    if (--relay->callers == 0) {
        pthread_cond_signal(&relay->no_callers);
    }
    pthread_mutex_unlock(&relay->lock);
}

/* Let the thread see what has changed. */
static void leave_and_wake(struct relay *relay)
{
    static const uint64_t one = 1;

    /* Cannot fail: the eventfd is ours, and as good as empty. */
    while (write(relay->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR) {
    }
    leave(relay);
}

/* Report `event` while a descriptor is readable, or with EPOLLET each time that it is written to. */
static int watch(struct relay *relay, int fd, uint32_t edge, uint64_t event)
{
    struct epoll_event wanted = { .events = EPOLLIN | edge, .data.u64 = event };

    return epoll_ctl(relay->epoll_fd, EPOLL_CTL_ADD, fd, &wanted) < 0 ? -errno : 0;
}

/*
 * Whether a descriptor may be of this kind. Some character devices (/dev/random) always have something to
 * read, and would keep the thread busy at no cost to who gave them.
 */
static int check_kind(int fd)
{
    struct stat status;

    if (fstat(fd, &status) < 0) {
        return -errno;
    }
    return S_ISCHR(status.st_mode) ? -EPERM : 0;
}

/* Whether to write to an eventfd may wait; who shares it should not change that while it is in use. */
static bool blocks(int fd)
{
    return fd >= 0 && !(fcntl(fd, F_GETFL) & O_NONBLOCK);
}

/* Polled rings were `before`, are relay->polled: start or stop the timer at the edge. */
static void arm_timer(struct relay *relay, unsigned int before)
{
    struct itimerspec timer = { 0 };

    if ((before == 0) == (relay->polled == 0)) {
        return;
    }
    if (relay->polled > 0) {
        timer.it_interval.tv_nsec = POLL_INTERVAL_NS;
        timer.it_value.tv_nsec = POLL_INTERVAL_NS;
    }
    timerfd_settime(relay->poll_fd, 0, &timer, NULL);
}

static void relay_free(struct relay *relay)
{
    int fds[] = { relay->epoll_fd, relay->wake_fd, relay->poll_fd, relay->broken_fd };

    for (unsigned int i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    for (uint16_t ring = 0; ring < relay->rings; ring++) {
        shadow_free(relay->ring[ring].shadow);
    }
    dma_remove_all(&relay->memory);
    pthread_cond_destroy(&relay->no_callers);
    pthread_mutex_destroy(&relay->lock);
    free(relay);
}

static int open_descriptors(struct relay *relay)
{
    relay->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    relay->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    relay->poll_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    relay->broken_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (relay->epoll_fd < 0 || relay->wake_fd < 0 || relay->poll_fd < 0 || relay->broken_fd < 0) {
        return -errno;
    }
    return 0;
}

int relay_open(uint16_t rings, struct relay **opened)
{
    size_t size = sizeof(struct relay) + rings * sizeof(struct relay_entry);
    struct relay *relay = aligned_alloc(CACHE_LINE, size);
    int error;

    if (!relay) {
        return -ENOMEM;
    }
    memset(relay, 0, size);
    relay->rings = rings;
    pthread_mutex_init(&relay->lock, NULL);
    pthread_cond_init(&relay->no_callers, NULL);
    error = open_descriptors(relay);
    if (!error) {
        error = guard_install();
    }
    if (!error) {
        error = watch(relay, relay->wake_fd, 0, EVENT_WAKE);
    }
    if (!error) {
        error = watch(relay, relay->poll_fd, 0, EVENT_POLL);
    }
    if (!error) {
        error = thread_start(&relay->thread, "relay", forwarder_main, relay);
    }
    if (error) {
        relay_free(relay);
        return error;
    }
    *opened = relay;
    return 0;
}

/* Wait for what comes along one of a ring's wires; -1: for nothing. */
static int watch_wire(struct relay *relay, uint16_t ring, enum wire wire, int fd)
{
    struct relay_entry *entry = &relay->ring[ring];
    int error;

    entry->fd[wire] = fd;
    if (fd < 0) {
        return 0;
    }
    error = check_kind(fd);
    if (!error) {
        error = watch(relay, fd, entry->shadow == NULL ? EPOLLET : 0,
                      forwarder_token(ring, entry->generation, wire));
    }
    entry->waiting[wire] = error == 0;
    return error;
}

/* Add a ring, which takes `shadow` over unless there is an error. */
static int add(struct relay *relay, uint16_t ring, struct shadow *shadow, const struct relay_wires *wires)
{
    struct relay_entry *entry = &relay->ring[ring];
    int error;

    if (entry->added) {
        return -EBUSY;
    }
    entry->generation++;
    entry->shadow = shadow;
    error = watch_wire(relay, ring, WIRE_KICK, wires->kick_fd);
    if (!error) {
        error = watch_wire(relay, ring, WIRE_INTERRUPT, wires->interrupt_fd);
    }
    if (error) {
        forwarder_unwatch(relay, entry);
        entry->shadow = NULL;
        return error;
    }
    relay->shadows += shadow != NULL;
    entry->added = true;
    entry->doorbell_fd = wires->doorbell_fd;
    entry->doorbell_blocks = blocks(wires->doorbell_fd);
    entry->doorbell = wires->doorbell;
    entry->call_fd = wires->call_fd;
    entry->held = false;
    entry->awake = shadow != NULL;
    entry->known = false;
    if (wires->kick_fd < 0) {
        relay->polled++;
        arm_timer(relay, relay->polled - 1);
    }
    return 0;
}

static bool is_doorbell(int doorbell_fd, const void *doorbell)
{
    return doorbell_fd >= 0 || (doorbell != NULL && (uintptr_t)doorbell % 2 == 0);
}

int relay_add(struct relay *relay, uint16_t ring, int kick_fd, int doorbell_fd, void *doorbell)
{
    const struct relay_wires wires = { kick_fd, -1, -1, doorbell_fd, doorbell };
    int error;

    if (ring >= relay->rings || !is_doorbell(doorbell_fd, doorbell)) {
        return -EINVAL;
    }
    enter(relay);
    error = add(relay, ring, NULL, &wires);
    leave(relay);
    return error;
}

int relay_add_shadow(struct relay *relay, uint16_t ring, const struct shadow_setup *setup,
                     const struct relay_wires *wires)
{
    struct shadow *shadow;
    int error;

    if (ring >= relay->rings || !is_doorbell(wires->doorbell_fd, wires->doorbell) || wires->interrupt_fd < 0) {
        return -EINVAL;
    }
    error = shadow_new(setup, &shadow);
    if (error) {
        return error;
    }
    enter(relay);
    error = add(relay, ring, shadow, wires);
    leave_and_wake(relay);
    if (error) {
        shadow_free(shadow);
    }
    return error;
}

void relay_remove(struct relay *relay, uint16_t ring)
{
    struct relay_entry *entry;

    if (ring >= relay->rings) {
        return;
    }
    enter(relay);
    entry = &relay->ring[ring];
    if (entry->added) {
        forwarder_unwatch(relay, entry);
        entry->added = false;
        if (entry->fd[WIRE_KICK] < 0) {
            relay->polled--;
            arm_timer(relay, relay->polled + 1);
        } else if (entry->shadow == NULL) {
            forwarder_drain(entry, ring);
        }
    }
    if (entry->shadow != NULL) {
        forwarder_finish(relay, entry);
        entry->last = shadow_position(entry->shadow);
        entry->known = true;
        entry->awake = false;
        shadow_free(entry->shadow);
        entry->shadow = NULL;
        relay->shadows--;
    }
    leave(relay);
}

/* The shadow ring of this number, NULL if it is none. */
static struct relay_entry *find_shadow(struct relay *relay, uint16_t ring)
{
    return ring < relay->rings && relay->ring[ring].shadow != NULL ? &relay->ring[ring] : NULL;
}

int relay_set_call(struct relay *relay, uint16_t ring, int call_fd)
{
    struct relay_entry *entry;

    enter(relay);
    entry = find_shadow(relay, ring);
    if (entry != NULL) {
        entry->call_fd = call_fd;
    }
    leave(relay);
    return entry != NULL ? 0 : -ENOENT;
}

int relay_hold(struct relay *relay, uint16_t ring)
{
    struct relay_entry *entry;

    enter(relay);
    entry = find_shadow(relay, ring);
    if (entry != NULL) {
        entry->held = true;
    }
    leave(relay);
    return entry != NULL ? 0 : -ENOENT;
}

int relay_state(struct relay *relay, uint16_t ring, struct shadow_state *state)
{
    struct relay_entry *entry;
    int error = 0;

    enter(relay);
    entry = find_shadow(relay, ring);
    if (entry != NULL) {
        *state = shadow_position(entry->shadow);
    } else if (ring < relay->rings && relay->ring[ring].known) {
        *state = relay->ring[ring].last;
    } else {
        error = -ENOENT;
    }
    leave(relay);
    return error;
}

int relay_map(struct relay *relay, uint64_t address, uint64_t size, void *host)
{
    int error;

    enter(relay);
    error = dma_borrow(&relay->memory, address, size, host);
    leave(relay);
    return error;
}

int relay_unmap(struct relay *relay, uint64_t address, uint64_t size)
{
    int error;

    enter(relay);
    error = dma_remove(&relay->memory, address, size);
    leave(relay);
    return error;
}

void relay_log(struct relay *relay, void *bitmap, uint64_t bytes)
{
    enter(relay);
    relay->log.bitmap = bitmap;
    relay->log.bytes = bytes;
    log_forget(&relay->log);
    leave(relay);
}

struct relay_log_counters relay_log_count(struct relay *relay)
{
    struct relay_log_counters count;

    enter(relay);
    count = (struct relay_log_counters){ relay->log.marked, relay->log.missed };
    leave(relay);
    return count;
}

int relay_broken_fd(struct relay *relay)
{
    return relay->broken_fd;
}

int relay_ring(struct relay *relay, uint16_t ring)
{
    int error = -ENOENT;

    enter(relay);
    if (ring < relay->rings && relay->ring[ring].added) {
        forwarder_ring(&relay->ring[ring], ring);
        error = 0;
    }
    leave(relay);
    return error;
}

struct relay_counters relay_count(struct relay *relay, uint16_t ring)
{
    struct relay_counters count = { 0 };

    if (ring < relay->rings) {
        enter(relay);
        count = relay->ring[ring].count;
        leave(relay);
    }
    return count;
}

void relay_close(struct relay *relay)
{
    enter(relay);
    relay->stop = true;
    leave_and_wake(relay);
    pthread_join(relay->thread, NULL);
    relay_free(relay);
}
