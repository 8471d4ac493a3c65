/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "bell.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "affinity.h"
#include "event_queues.h"
#include "queues.h"
#include "worker.h"

/* What a doorbell reads that nobody has rung: no queue's number, in 16 bits or 32. */
#define NOT_RUNG UINT32_MAX
/* How long the thread looks again at once after there was something to do, and how long it sleeps else. */
#define POLL_NS 200000
#define NAP_MS 1
/* Tokens of epoll: a queue's number for its call, and after them a pair's for its fault. */
#define TOKEN_FAULT (2 * OPTIONS_MAX_PAIRS)
#define TOKEN_WAKE (TOKEN_FAULT + OPTIONS_MAX_PAIRS)
#define EVENTS 64

struct bell {
    pthread_t thread;
    int epoll_fd;
    int wake_fd;
    atomic_bool quit;
    bool hangs[DEVICE_PAGES];
    bool told[2 * OPTIONS_MAX_PAIRS];   /* queues that have completed something, and could not say so yet */
};

static int64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static bool watch(struct bell *bell, int fd, uint32_t token)
{
    struct epoll_event event = { .events = EPOLLIN, .data.u32 = token };

    return epoll_ctl(bell->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

/* One store for all queues: a later one may hide an earlier, so each of them may have been meant. */
static bool was_rung(struct device *device)
{
    bool rung = false;

    for (unsigned int i = 0; i < DEVICE_PAGES; i++) {
        uint32_t *cell = (uint32_t *)(device->memory + i * PAGE_SIZE);

        if (device->queues->bell->hangs[i] && __atomic_load_n(cell, __ATOMIC_RELAXED) != NOT_RUNG) {
            rung |= __atomic_exchange_n(cell, NOT_RUNG, __ATOMIC_ACQ_REL) != NOT_RUNG;
        }
    }
    return rung;
}

static bool kick(struct device *device)
{
    if (!was_rung(device)) {
        return false;
    }
    for (unsigned int i = 0; i < 2 * device->options.pairs; i++) {
        struct virtq *virtq = device->queues->virtq[i];

        if (virtq != NULL && virtq->moves) {
            signal_fd(engine_kick_fd(device->queues->pair[i / 2].engine, i % 2));
        }
    }
    return true;
}

/* Tell drivers what has been completed. True: there was something. */
static bool tell(struct device *device)
{
    bool *told = device->queues->bell->told;
    bool any = false;

    for (unsigned int i = 0; i < 2 * device->options.pairs; i++) {
        struct virtq *virtq = device->queues->virtq[i];

        if (told[i] && (virtq == NULL || virtq->event_qp == NULL || event_queues_send(device, virtq->event_qp))) {
            told[i] = false;
            any = true;
        }
    }
    event_queues_look(device);
    return any;
}

static void handle(struct device *device, uint32_t token)
{
    struct bell *bell = device->queues->bell;

    if (token == TOKEN_WAKE) {
        drain_fd(bell->wake_fd);
    } else if (token >= TOKEN_FAULT) {
        queues_break(device, token - TOKEN_FAULT);
    } else {
        drain_fd(device->queues->call_fd[token]);
        bell->told[token] = true;
    }
}

static bool any_moves(const struct device *device)
{
    for (unsigned int i = 0; i < device->options.pairs; i++) {
        if (device->queues->pair[i].moving > 0) {
            return true;
        }
    }
    return false;
}

static void *listen(void *argument)
{
    struct device *device = argument;
    struct bell *bell = device->queues->bell;
    int64_t poll_until = 0;
    int longest = -1;

    while (!bell->quit) {
        struct epoll_event events[EVENTS];
        int64_t now = now_ns();
        int count = epoll_wait(bell->epoll_fd, events, EVENTS, now < poll_until ? 0 : longest);
        bool busy;

        pthread_mutex_lock(&device->lock);
        for (int i = 0; i < count; i++) {
            handle(device, events[i].data.u32);
        }
        busy = false;
        if (!device->died) {    /* one that has looks at nothing, whose driver may have taken its memory back */
            busy = kick(device);
            busy |= tell(device);
        }
        longest = any_moves(device) ? NAP_MS : -1;
        pthread_mutex_unlock(&device->lock);
        if (busy || count > 0) {
            poll_until = now_ns() + POLL_NS;
        }
    }
    return NULL;
}

int bell_open(struct device *device)
{
    struct bell *bell = calloc(1, sizeof(*bell));
    sigset_t all, before;
    int result;

    if (bell == NULL) {
        return -ENOMEM;
    }
    device->queues->bell = bell;
    bell->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    bell->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    result = bell->epoll_fd < 0 || bell->wake_fd < 0 || !watch(bell, bell->wake_fd, TOKEN_WAKE) ? -errno : 0;
    for (unsigned int i = 0; result == 0 && i < 2 * device->options.pairs; i++) {
        result = watch(bell, device->queues->call_fd[i], i) ? 0 : -errno;
    }
    if (result == 0) {
        sigfillset(&all);
        const cpu_set_t processors = affinity_widen();

        pthread_sigmask(SIG_SETMASK, &all, &before);
        result = -pthread_create(&bell->thread, NULL, listen, device);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        affinity_restore(&processors);
    }
    if (result < 0) {
        bell->quit = true;      /* there is no thread to be ended */
    }
    return result;
}

void bell_close(struct device *device)
{
    struct bell *bell = device->queues->bell;

    if (bell == NULL) {
        return;
    }
    if (!bell->quit) {
        bell->quit = true;
        bell_wake(device);
        pthread_mutex_unlock(&device->lock);    /* it may be waiting for it */
        pthread_join(bell->thread, NULL);
        pthread_mutex_lock(&device->lock);
    }
    if (bell->epoll_fd >= 0) {
        close(bell->epoll_fd);
    }
    if (bell->wake_fd >= 0) {
        close(bell->wake_fd);
    }
    free(bell);
    device->queues->bell = NULL;
}

void bell_wake(struct device *device)
{
    signal_fd(device->queues->bell->wake_fd);
}

bool bell_watch(struct device *device, unsigned int pair)
{
    return watch(device->queues->bell, engine_fault_fd(device->queues->pair[pair].engine), TOKEN_FAULT + pair);
}

void bell_hang(struct device *device, unsigned int page)
{
    __atomic_store_n((uint32_t *)(device->memory + page * PAGE_SIZE), NOT_RUNG, __ATOMIC_RELEASE);
    device->queues->bell->hangs[page] = true;
}

void bell_take_down(struct device *device, unsigned int page)
{
    device->queues->bell->hangs[page] = false;
}
