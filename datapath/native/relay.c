/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "relay.h"

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <unistd.h>

#define EVENTS_AT_ONCE 32
#define POLL_INTERVAL_NS 1000000

/* What epoll_event.data.u64 says: a ring number and its generation, or one of these two. */
#define TOKEN_STOP UINT64_MAX
#define TOKEN_POLL (UINT64_MAX - 1)

struct relay_entry {
    bool added;
    bool waiting;               /* kick_fd is registered with epoll */
    uint32_t generation;        /* tells an event of a removed ring from one of its successor */
    int kick_fd;
    int doorbell_fd;
    volatile uint16_t *doorbell;
    struct relay_counters count;
};

struct relay {
    pthread_t thread;
    pthread_mutex_t lock;       /* guards all below; the thread holds it while it handles events */
    int epoll_fd;
    int stop_fd;
    int poll_fd;                /* timerfd, armed while some ring is polled */
    unsigned int polled;
    uint16_t rings;
    struct relay_entry ring[];
};

static uint64_t token(uint16_t ring, uint32_t generation)
{
    return (uint64_t)ring << 32 | generation;
}

/*
 * Write to an eventfd that the device gave. The device shares its flags, so it may be one that blocks when
 * full, and whoever takes a ring out waits for the lock that is held here.
 */
static bool signal_device(int fd)
{
    static const uint64_t one = 1;
    struct pollfd room = { .fd = fd, .events = POLLOUT };

    return poll(&room, 1, 0) == 1 && (room.revents & POLLOUT) && write(fd, &one, sizeof(one)) == sizeof(one);
}

static void ring_doorbell(struct relay_entry *entry, uint16_t ring)
{
    if (entry->doorbell_fd < 0) {
        /* The guest's ring updates must be visible to the device before the store is. */
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        *entry->doorbell = htole16(ring);
    } else if (!signal_device(entry->doorbell_fd)) {
        /* Full: a device that is woken by writes alone misses this one. */
        entry->count.errors++;
    }
}

static void stop_waiting(struct relay *relay, struct relay_entry *entry)
{
    if (entry->waiting) {
        epoll_ctl(relay->epoll_fd, EPOLL_CTL_DEL, entry->kick_fd, NULL);
        entry->waiting = false;
    }
}

static void handle_kick(struct relay *relay, uint64_t event)
{
    uint16_t ring = event >> 32;
    struct relay_entry *entry = &relay->ring[ring];
    uint64_t kicks;
    struct iovec buffer = { &kicks, sizeof(kicks) };
    ssize_t got;

    if (!entry->waiting || token(ring, entry->generation) != event) {
        return;                 /* removed after epoll_wait() had reported it */
    }
    /*
     * The descriptor is the front-end's: it may be a blocking one that somebody else has drained
     * meanwhile, and its flags are not ours to change.
     */
    got = preadv2(entry->kick_fd, &buffer, 1, -1, RWF_NOWAIT);
    if (got == sizeof(kicks)) {
        entry->count.kicks++;
        ring_doorbell(entry, ring);
    } else if (got >= 0 || (errno != EAGAIN && errno != EINTR)) {
        /* Not an eventfd, or closed at the other end: it would stay readable for ever. */
        entry->count.errors++;
        stop_waiting(relay, entry);
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

        if (entry->added && entry->kick_fd < 0) {
            ring_doorbell(entry, ring);
        }
    }
}

static void *relay_main(void *argument)
{
    struct relay *relay = argument;
    struct epoll_event events[EVENTS_AT_ONCE];
    bool stop = false;

    while (!stop) {
        int count = epoll_wait(relay->epoll_fd, events, EVENTS_AT_ONCE, -1);

        pthread_mutex_lock(&relay->lock);
        for (int i = 0; i < count; i++) {
            uint64_t event = events[i].data.u64;

            if (event == TOKEN_STOP) {
                stop = true;
            } else if (event == TOKEN_POLL) {
                handle_poll(relay);
            } else {
                handle_kick(relay, event);
            }
        }
        pthread_mutex_unlock(&relay->lock);
    }
    return NULL;
}

static int watch(struct relay *relay, int fd, uint64_t event)
{
    struct epoll_event wanted = { .events = EPOLLIN, .data.u64 = event };

    return epoll_ctl(relay->epoll_fd, EPOLL_CTL_ADD, fd, &wanted) < 0 ? -errno : 0;
}

/*
 * Whether a front-end may give a descriptor of this kind. Some character devices (/dev/random) always have
 * something to read, and would keep the thread busy at no cost to who gave them.
 */
static int check_kick(int fd)
{
    struct stat status;

    if (fstat(fd, &status) < 0) {
        return -errno;
    }
    return S_ISCHR(status.st_mode) ? -EPERM : 0;
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
    int fds[] = { relay->epoll_fd, relay->stop_fd, relay->poll_fd };

    for (unsigned int i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    pthread_mutex_destroy(&relay->lock);
    free(relay);
}

/* The thread must not run the program's signal handlers; faults of its own it takes. */
static int start_thread(struct relay *relay)
{
    static const int faults[] = { SIGBUS, SIGFPE, SIGILL, SIGSEGV };
    sigset_t blocked, before;
    int error;

    sigfillset(&blocked);
    for (unsigned int i = 0; i < sizeof(faults) / sizeof(faults[0]); i++) {
        sigdelset(&blocked, faults[i]);
    }
    pthread_sigmask(SIG_BLOCK, &blocked, &before);
    error = pthread_create(&relay->thread, NULL, relay_main, relay);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error) {
        pthread_setname_np(relay->thread, "notify-relay");
    }
    return -error;
}

int relay_open(uint16_t rings, struct relay **opened)
{
    struct relay *relay = calloc(1, sizeof(*relay) + rings * sizeof(relay->ring[0]));
    int error;

    if (!relay) {
        return -ENOMEM;
    }
    relay->rings = rings;
    pthread_mutex_init(&relay->lock, NULL);
    relay->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    relay->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    relay->poll_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    error = relay->epoll_fd < 0 || relay->stop_fd < 0 || relay->poll_fd < 0 ? -errno : 0;
    if (!error) {
        error = watch(relay, relay->stop_fd, TOKEN_STOP);
    }
    if (!error) {
        error = watch(relay, relay->poll_fd, TOKEN_POLL);
    }
    if (!error) {
        error = start_thread(relay);
    }
    if (error) {
        relay_free(relay);
        return error;
    }
    *opened = relay;
    return 0;
}

int relay_add(struct relay *relay, uint16_t ring, int kick_fd, int doorbell_fd, void *doorbell)
{
    struct relay_entry *entry;
    int error = 0;

    if (ring >= relay->rings || (doorbell_fd < 0 && (!doorbell || (uintptr_t)doorbell % 2))) {
        return -EINVAL;
    }
    pthread_mutex_lock(&relay->lock);
    entry = &relay->ring[ring];
    if (entry->added) {
        error = -EBUSY;
    } else if (kick_fd >= 0) {
        error = check_kick(kick_fd);
        if (!error) {
            error = watch(relay, kick_fd, token(ring, entry->generation + 1));
        }
    }
    if (!error) {
        entry->added = true;
        entry->waiting = kick_fd >= 0;
        entry->generation++;
        entry->kick_fd = kick_fd;
        entry->doorbell_fd = doorbell_fd;
        entry->doorbell = doorbell;
        if (kick_fd < 0) {
            relay->polled++;
            arm_timer(relay, relay->polled - 1);
        }
    }
    pthread_mutex_unlock(&relay->lock);
    return error;
}

void relay_remove(struct relay *relay, uint16_t ring)
{
    struct relay_entry *entry;

    if (ring >= relay->rings) {
        return;
    }
    pthread_mutex_lock(&relay->lock);
    entry = &relay->ring[ring];
    if (entry->added) {
        stop_waiting(relay, entry);
        entry->added = false;
        if (entry->kick_fd < 0) {
            relay->polled--;
            arm_timer(relay, relay->polled + 1);
        }
    }
    pthread_mutex_unlock(&relay->lock);
}

int relay_ring(struct relay *relay, uint16_t ring)
{
    int error = -ENOENT;

    pthread_mutex_lock(&relay->lock);
    if (ring < relay->rings && relay->ring[ring].added) {
        ring_doorbell(&relay->ring[ring], ring);
        error = 0;
    }
    pthread_mutex_unlock(&relay->lock);
    return error;
}

struct relay_counters relay_count(struct relay *relay, uint16_t ring)
{
    struct relay_counters count = { 0 };

    if (ring < relay->rings) {
        pthread_mutex_lock(&relay->lock);
        count = relay->ring[ring].count;
        pthread_mutex_unlock(&relay->lock);
    }
    return count;
}

void relay_close(struct relay *relay)
{
    static const uint64_t one = 1;

    /* Cannot fail: the eventfd is ours, and empty. */
    while (write(relay->stop_fd, &one, sizeof(one)) < 0 && errno == EINTR) {
    }
    pthread_join(relay->thread, NULL);
    relay_free(relay);
}
