/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "guard.h"
#include "interrupt.h"
#include "worker.h"

/* How long a caller waits for the thread before it suspects that it is stuck. */
#define PATIENCE_MS 1000

#ifdef __SANITIZE_THREAD__
/* gcc 12's ThreadSanitizer does not know pthread_mutex_clocklock(). */
#define PATIENCE_CLOCK CLOCK_REALTIME
#define lock_until(mutex, deadline) pthread_mutex_timedlock(mutex, deadline)
#else
#define PATIENCE_CLOCK CLOCK_MONOTONIC
#define lock_until(mutex, deadline) pthread_mutex_clocklock(mutex, PATIENCE_CLOCK, deadline)
#endif

static bool lock_within(struct engine *engine, long milliseconds)
{
    struct timespec deadline;

    clock_gettime(PATIENCE_CLOCK, &deadline);
    deadline.tv_nsec += milliseconds * 1000000;
    deadline.tv_sec += deadline.tv_nsec / 1000000000;
    deadline.tv_nsec %= 1000000000;
    return lock_until(&engine->mutex, &deadline) == 0;
}

/*
 * The thread gives way to whoever waits, even under load, when a mutex alone would starve them. It may be
 * stuck in an interrupt, out of which a signal gets it. A page fault could hold it as well, which no signal
 * ends: hence dma_add() takes no file whose pages may not come.
 */
static void enter(struct engine *engine)
{
    long patience = PATIENCE_MS;

    engine->callers++;
    while (!lock_within(engine, patience)) {
        interrupt_get_out(engine->thread);
        patience = 1;
    }
}

static void leave(struct engine *engine)
{
    if (--engine->callers == 0) {
        pthread_cond_signal(&engine->no_callers);
    }
    pthread_mutex_unlock(&engine->mutex);
}

/* Let the thread see what has changed. */
static void leave_and_wake(struct engine *engine)
{
    signal_fd(engine->wake_fd);
    leave(engine);
}

/* The same of what concerns packets: while none move there is nothing to see, and to be woken takes its time. */
static void leave_and_wake_if_running(struct engine *engine)
{
    if (engine->running) {
        signal_fd(engine->wake_fd);
    }
    leave(engine);
}

static int watch(struct engine *engine, int fd, uint32_t events, uint32_t token)
{
    struct epoll_event event = { .events = events, .data.u32 = token };

    return epoll_ctl(engine->epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

static int open_descriptors(struct engine *engine)
{
    engine->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    engine->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    engine->fault_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (engine->epoll_fd < 0 || engine->wake_fd < 0 || engine->fault_fd < 0 ||
        watch(engine, engine->wake_fd, EPOLLIN, TOKEN_WAKE) < 0) {
        return -errno;
    }
    return 0;
}

static int open_kick_fds(struct engine *engine)
{
    for (unsigned int i = 0; i < engine->queues; i++) {
        int kick_fd = engine->queue[i].kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

        /*
         * The client shares this one and could make it block whoever reads it. With EPOLLET each write is
         * an event, and nobody has to read. Only a client that fills the counter is not heard any more.
         */
        if (kick_fd < 0 || watch(engine, kick_fd, EPOLLIN | EPOLLET, i) < 0) {
            return -errno;
        }
    }
    return 0;
}

static int map_doorbells(struct engine *engine, int doorbell_fd)
{
    if (doorbell_fd < 0) {
        return 0;
    }
    engine->doorbells = mmap(NULL, engine->queues * DMA_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
                             doorbell_fd, 0);
    if (engine->doorbells == MAP_FAILED) {
        engine->doorbells = NULL;
        return -errno;
    }
    for (unsigned int i = 0; i < engine->queues; i++) {
        engine->queue[i].doorbell = (uint16_t *)((uint8_t *)engine->doorbells + i * DMA_PAGE_SIZE);
    }
    return 0;
}

static void drop_doorbells(struct engine *engine)
{
    for (unsigned int i = 0; i < engine->queues; i++) {
        struct queue *queue = &engine->queue[i];

        if (queue->kick_fd >= 0) {
            /* Closing would not do it, for the client has it as well. */
            epoll_ctl(engine->epoll_fd, EPOLL_CTL_DEL, queue->kick_fd, NULL);
            close(queue->kick_fd);
        }
        queue->kick_fd = -1;
        queue->doorbell = NULL;
    }
    if (engine->doorbells != NULL) {
        munmap(engine->doorbells, engine->queues * DMA_PAGE_SIZE);
        engine->doorbells = NULL;
    }
}

/* Signals are for the program's own threads, but for the one of interrupts and what instructions raise. */
static int start_thread(struct engine *engine)
{
    static const int not_blocked[] = { INTERRUPT_SIGNAL, SIGBUS, SIGSEGV, SIGILL, SIGFPE, SIGTRAP };
    sigset_t blocked, before;
    int result;

    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof(not_blocked) / sizeof(*not_blocked); i++) {
        sigdelset(&blocked, not_blocked[i]);
    }
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    result = -pthread_create(&engine->thread, NULL, worker_main, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return result;
}

static void release(struct engine *engine)
{
    int fds[] = { engine->epoll_fd, engine->wake_fd, engine->fault_fd };

    drop_doorbells(engine);
    for (size_t i = 0; i < sizeof(fds) / sizeof(*fds); i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    dma_remove_all(&engine->dma);
    pthread_cond_destroy(&engine->no_callers);
    pthread_mutex_destroy(&engine->mutex);
    free(engine);
}

/* One that has no descriptors of its own yet, or NULL. */
static struct engine *new_engine(const struct engine_uplink *uplink)
{
    struct engine *engine = calloc(1, sizeof(*engine) + uplink->pairs * sizeof(*engine->uplink));

    if (engine == NULL) {
        return NULL;
    }
    pthread_mutex_init(&engine->mutex, NULL);
    pthread_cond_init(&engine->no_callers, NULL);
    engine->pairs = uplink->pairs;
    engine->queues = 2 * uplink->pairs;
    engine->echo = uplink->packet_fd[0] < 0;
    engine->header = uplink->header;
    engine->mtu = uplink->mtu;
    engine->epoll_fd = engine->wake_fd = engine->fault_fd = engine->client_fd = -1;
    for (unsigned int i = 0; i < engine->pairs; i++) {
        engine->uplink[i].packet_fd = uplink->packet_fd[i];
        engine->uplink[i].lost = engine->echo;
    }
    for (unsigned int i = 0; i < engine->queues; i++) {
        engine->queue[i].kick_fd = engine->queue[i].call_fd = -1;
    }
    return engine;
}

int engine_open(const struct engine_uplink *uplink, struct engine **out)
{
    struct engine *engine = new_engine(uplink);
    int result;

    if (engine == NULL) {
        return -ENOMEM;
    }
    result = guard_install();
    if (result == 0) {
        result = interrupt_install();
    }
    if (result == 0) {
        result = open_descriptors(engine);
    }
    if (result == 0) {
        result = start_thread(engine);
    }
    if (result < 0) {
        release(engine);
        return result;
    }
    *out = engine;
    return 0;
}

void engine_close(struct engine *engine)
{
    enter(engine);
    engine->quit = true;
    leave_and_wake(engine);
    pthread_join(engine->thread, NULL);
    release(engine);
}

int engine_open_doorbells(struct engine *engine, int doorbell_fd)
{
    int result;

    enter(engine);
    drop_doorbells(engine);
    result = open_kick_fds(engine);
    if (result == 0) {
        result = map_doorbells(engine, doorbell_fd);
    }
    if (result < 0) {
        drop_doorbells(engine);
    }
    leave_and_wake(engine);
    return result;
}

void engine_close_doorbells(struct engine *engine)
{
    enter(engine);
    drop_doorbells(engine);
    leave_and_wake(engine);
}

int engine_set_client(struct engine *engine, int client_fd)
{
    int result = 0;

    enter(engine);
    if (engine->client_fd >= 0) {
        epoll_ctl(engine->epoll_fd, EPOLL_CTL_DEL, engine->client_fd, NULL);
    }
    engine->client_fd = -1;
    engine->client_gone = false;
    if (client_fd >= 0 && watch(engine, client_fd, EPOLLRDHUP | EPOLLET, TOKEN_CLIENT) < 0) {
        result = -errno;
    } else {
        engine->client_fd = client_fd;
    }
    leave(engine);
    return result;
}

void engine_keep_packets(struct engine *engine, bool keep)
{
    enter(engine);
    engine->keeps_packets = keep;
    leave_and_wake(engine);
}

int engine_kick_fd(struct engine *engine, unsigned int queue)
{
    return engine->queue[queue].kick_fd;
}

int engine_fault_fd(struct engine *engine)
{
    return engine->fault_fd;
}

int engine_map(struct engine *engine, uint64_t iova, uint64_t size, int fd, uint64_t offset, bool writable)
{
    int result;

    enter(engine);
    result = dma_add(&engine->dma, iova, size, fd, offset, writable);
    leave(engine);
    return result;
}

int engine_borrow(struct engine *engine, uint64_t iova, uint64_t size, void *host)
{
    int result;

    enter(engine);
    result = dma_borrow(&engine->dma, iova, size, host);
    leave(engine);
    return result;
}

int engine_unmap(struct engine *engine, uint64_t iova, uint64_t size)
{
    int result;

    enter(engine);
    result = dma_remove(&engine->dma, iova, size);
    leave(engine);
    return result;
}

void engine_unmap_all(struct engine *engine)
{
    enter(engine);
    dma_remove_all(&engine->dma);
    leave(engine);
}

int engine_start_queue(struct engine *engine, unsigned int index, const struct ring_setup *setup)
{
    struct queue *queue = &engine->queue[index];
    int result = -EBUSY;

    enter(engine);
    if (!queue->programmed) {
        result = ring_start(&queue->ring, setup);
        queue->programmed = result == 0;
        queue->ring.lazy = engine->echo;
        queue->awake = false;
        queue->held = false;
        if (engine->echo) {     /* what was sent may have waited for this ring */
            engine->queue[index ^ 1].held = false;
            engine->queue[index ^ 1].awake = true;
        }
    }
    leave_and_wake_if_running(engine);
    return result;
}

static void drop_packet(struct engine *engine, unsigned int pair)
{
    engine->queue[rx_of(pair)].count.dropped += engine->uplink[pair].frame_length > 0;
    engine->queue[rx_of(pair)].held = false;
    engine->uplink[pair].frame_length = 0;
}

/* The packets that wait for buffers are lost where those that come are. */
static void drop_packets(struct engine *engine)
{
    if (engine_leaves_packets(engine)) {
        return;
    }
    for (unsigned int i = 0; i < engine->pairs; i++) {
        drop_packet(engine, i);
    }
}

struct ring_state engine_stop_queue(struct engine *engine, unsigned int queue)
{
    struct ring_state state;

    enter(engine);
    engine->queue[queue].programmed = false;
    state = ring_position(&engine->queue[queue].ring);
    leave_and_wake_if_running(engine);
    return state;
}

void engine_kick(struct engine *engine, unsigned int queue)
{
    enter(engine);
    engine->queue[queue].count.kicks++;
    engine->queue[queue].awake = true;
    leave_and_wake(engine);
}

void engine_set_call(struct engine *engine, unsigned int queue, int call_fd)
{
    enter(engine);
    engine->queue[queue].call_fd = call_fd;
    leave(engine);
}

void engine_run(struct engine *engine, bool on)
{
    enter(engine);
    engine->running = on;
    if (!on) {
        drop_packets(engine);
    }
    leave_and_wake(engine);
}

void engine_use_pairs(struct engine *engine, unsigned int pairs)
{
    enter(engine);
    for (unsigned int i = pairs; i < engine->pairs; i++) {
        drop_packet(engine, i);
    }
    leave_and_wake_if_running(engine);
}

void engine_set_features(struct engine *engine, uint64_t features)
{
    enter(engine);
    engine->features = features;
    leave(engine);
}

void engine_set_filter(struct engine *engine, const struct filter *filter)
{
    enter(engine);
    engine->filter = filter != NULL ? *filter : (struct filter){ .on = false };
    leave(engine);
}

void engine_set_log(struct engine *engine, bool on, uint64_t base, uint64_t end)
{
    enter(engine);
    engine->log = (struct dma_log){ on, base, end };
    leave(engine);
}

void engine_reset(struct engine *engine)
{
    enter(engine);
    engine->running = false;
    for (unsigned int i = 0; i < engine->queues; i++) {
        engine->queue[i].programmed = false;
        if (engine->queue[i].doorbell != NULL) {
            __atomic_store_n(engine->queue[i].doorbell, ENGINE_NOT_RUNG, __ATOMIC_RELAXED);
        }
    }
    drop_packets(engine);
    engine->features = 0;
    engine->fault = NULL;
    engine->log.on = false;
    drain_fd(engine->fault_fd);
    leave_and_wake(engine);
}

const char *engine_fault(struct engine *engine, unsigned int *queue)
{
    const char *fault;

    enter(engine);
    fault = engine->fault;
    *queue = engine->fault_queue;
    leave(engine);
    return fault;
}

struct engine_counters engine_count(struct engine *engine, unsigned int queue)
{
    struct engine_counters count;

    enter(engine);
    count = engine->queue[queue].count;
    leave(engine);
    return count;
}
