/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "engine.h"

#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "guard.h"

/* Packets that one queue moves before the other, or a waiting caller, has its turn. */
#define BATCH 64
/* How long the thread looks for more work before it sleeps. */
#define POLL_NS 50000
/* How long it sleeps at most when doorbells have to be polled. */
#define NAP_MS 1
/* Largest packet that the uplink may hand over. */
#define MAX_PACKET 65536
#define NET_HEADER_SIZE 12

/* Section 5.1.6: what stands before every packet. Without offloads only num_buffers is not 0. */
struct net_header {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t header_length;
    uint16_t gso_size;
    uint16_t checksum_start;
    uint16_t checksum_offset;
    uint16_t num_buffers;
};
_Static_assert(sizeof(struct net_header) == NET_HEADER_SIZE, "virtio_net_hdr_v1");

/* Tokens of epoll; a queue's own number stands for its kick eventfd. */
enum { TOKEN_PACKET = ENGINE_QUEUES, TOKEN_WAKE };

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
    int packet_fd;
    uint32_t packet_events;     /* what epoll waits for on packet_fd; 0: not registered */
    bool uplink_lost;
    void *doorbells;

    bool running;
    const char *fault;
    unsigned int fault_queue;
    struct queue queue[ENGINE_QUEUES];
    struct dma_table dma;
    struct dma_log log;

    /* What the guarded part of the loop is told, and tells. */
    bool may_sleep;
    bool worked;
    unsigned int serving;

    size_t packet_length;       /* of the received packet that waits in `packet`; 0 if none does */
    uint8_t packet[MAX_PACKET];
    struct ring_chain first;
    struct ring_chain chain;
    struct ring_element used[RING_MAX_SIZE];
};

static const uint64_t one = 1;

static void signal_fd(int fd)
{
    /* It fails only when the counter is full: then the other side has yet to look, and misses nothing. */
    ssize_t ignored = write(fd, &one, sizeof(one));

    (void)ignored;
}

static void drain_fd(int fd)
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

static void break_down(struct engine *engine, unsigned int queue, const char *reason)
{
    if (engine->fault == NULL) {
        engine->fault = reason;
        engine->fault_queue = queue;
        signal_fd(engine->fault_fd);
    }
}

static void lose_uplink(struct engine *engine)
{
    engine->uplink_lost = true;
    engine->queue[ENGINE_TX].awake = true;      /* what waits to be sent is dropped */
}

static bool is_live(const struct engine *engine, unsigned int queue)
{
    return engine->running && engine->fault == NULL && engine->queue[queue].programmed;
}

static void interrupt(struct queue *queue)
{
    if (ring_wants_interrupt(&queue->ring) && queue->call_fd >= 0) {
        queue->count.interrupts++;
        signal_fd(queue->call_fd);
    }
}

/* --- receive: uplink to driver --- */

/* Copy into a chain, and log what was written. The chain is long enough. */
static void scatter(struct engine *engine, const struct ring_chain *chain, size_t offset, const void *data,
                    size_t length)
{
    const uint8_t *from = data;

    for (unsigned int i = 0; length > 0; i++) {
        size_t room = chain->segment[i].iov_len, part;

        if (offset >= room) {
            offset -= room;
            continue;
        }
        part = room - offset < length ? room - offset : length;
        memcpy((uint8_t *)chain->segment[i].iov_base + offset, from, part);
        dma_mark(&engine->dma, &engine->log, chain->iova[i] + offset, part);
        from += part;
        length -= part;
        offset = 0;
    }
}

enum delivery { DELIVERED, NO_BUFFERS, TOO_LONG, BAD_RING };

/*
 * Put the packet at hand into as many buffers as it takes (section 5.1.6.4). The first one's part comes
 * last, because the header in it says how many there are.
 */
static enum delivery deliver(struct engine *engine, struct ring *ring, bool mergeable)
{
    struct net_header header = { 0 };
    unsigned int buffers = 1;
    size_t first, done;

    if (ring_available(ring) == 0) {
        return ring->error ? BAD_RING : NO_BUFFERS;
    }
    if (!ring_chain_at(ring, &engine->dma, 0, true, &engine->first)) {
        return BAD_RING;
    }
    if (engine->first.bytes < NET_HEADER_SIZE) {
        ring->error = "a receive buffer is shorter than the packet header";
        return BAD_RING;
    }
    first = engine->first.bytes - NET_HEADER_SIZE;
    first = first < engine->packet_length ? first : engine->packet_length;
    engine->used[0] = (struct ring_element){ engine->first.head, NET_HEADER_SIZE + first };
    for (done = first; done < engine->packet_length; buffers++) {
        size_t part = engine->packet_length - done;

        if (!mergeable || buffers == ring->setup.size) {
            return TOO_LONG;
        }
        if (buffers >= ring_available(ring)) {
            return ring->error ? BAD_RING : NO_BUFFERS;
        }
        if (!ring_chain_at(ring, &engine->dma, buffers, true, &engine->chain)) {
            return BAD_RING;
        }
        part = part < engine->chain.bytes ? part : engine->chain.bytes;
        scatter(engine, &engine->chain, 0, engine->packet + done, part);
        engine->used[buffers] = (struct ring_element){ engine->chain.head, part };
        done += part;
    }
    header.num_buffers = htole16(buffers);
    scatter(engine, &engine->first, 0, &header, sizeof(header));
    scatter(engine, &engine->first, sizeof(header), engine->packet, first);
    ring_use(ring, engine->used, buffers);
    return DELIVERED;
}

/* See that a packet is at hand. */
static bool fetch_packet(struct engine *engine)
{
    ssize_t length;

    if (engine->packet_length > 0) {
        return true;
    }
    if (engine->uplink_lost) {
        return false;
    }
    do {
        length = read(engine->packet_fd, engine->packet, sizeof(engine->packet));
    } while (length < 0 && errno == EINTR);
    if (length > 0) {
        engine->packet_length = length;
        return true;
    }
    if (length == 0 || errno != EAGAIN) {
        lose_uplink(engine);
    }
    return false;
}

static void receive_one(struct engine *engine, struct queue *queue)
{
    enum delivery result = deliver(engine, &queue->ring, queue->ring.setup.mergeable);

    queue->held = result == NO_BUFFERS;
    switch (result) {
    case DELIVERED:
        queue->count.packets++;
        queue->count.bytes += engine->packet_length;
        engine->packet_length = 0;
        break;
    case TOO_LONG:
        queue->count.dropped++;
        engine->packet_length = 0;
        break;
    case NO_BUFFERS:
        break;
    case BAD_RING:
        break_down(engine, ENGINE_RX, queue->ring.error);
        break;
    }
}

/* Returns whether anything was moved. */
static bool receive(struct engine *engine, struct queue *queue)
{
    bool live = is_live(engine, ENGINE_RX);
    unsigned int moved = 0;

    if (live && !ring_resolve(&queue->ring, &engine->dma)) {
        break_down(engine, ENGINE_RX, queue->ring.error);
        return false;
    }
    if (live && ring_available(&queue->ring) > 0) {
        ring_prefetch(&queue->ring);
    }
    for (; moved < BATCH && fetch_packet(engine); moved++) {
        if (!live) {            /* nobody receives: what comes is lost, as on any NIC */
            queue->count.dropped++;
            engine->packet_length = 0;
            continue;
        }
        receive_one(engine, queue);
        if (queue->held || engine->fault != NULL) {
            break;
        }
    }
    if (live && engine->fault == NULL && moved > 0) {
        interrupt(queue);
    }
    return moved > 0;
}

/* --- transmit: driver to uplink --- */

/* Leave the first bytes of a chain out. Returns how many segments at its start are to be passed over. */
static unsigned int skip(struct ring_chain *chain, size_t bytes)
{
    unsigned int i = 0;

    while (i < chain->segments && bytes >= chain->segment[i].iov_len) {
        bytes -= chain->segment[i].iov_len;
        i++;
    }
    if (i < chain->segments) {
        chain->segment[i].iov_base = (uint8_t *)chain->segment[i].iov_base + bytes;
        chain->segment[i].iov_len -= bytes;
    }
    return i;
}

/* Send the chain at hand. False: not now, or never (fault). */
static bool transmit_one(struct engine *engine, struct queue *queue)
{
    struct ring_chain *chain = &engine->chain;
    unsigned int from;
    ssize_t sent = -1;

    if (chain->bytes < NET_HEADER_SIZE) {
        break_down(engine, ENGINE_TX, "a transmit buffer is shorter than the packet header");
        return false;
    }
    from = skip(chain, NET_HEADER_SIZE);
    if (from < chain->segments && !engine->uplink_lost) {
        do {
            sent = writev(engine->packet_fd, chain->segment + from, chain->segments - from);
        } while (sent < 0 && errno == EINTR);
        if (sent < 0 && errno == EAGAIN) {
            queue->held = true;
            return false;
        }
        if (sent < 0 && errno == EFAULT) {
            break_down(engine, ENGINE_TX, "memory has gone under a transmit buffer");
            return false;
        }
    }
    if (sent < 0) {             /* not a packet, or no link: the driver need not know */
        queue->count.dropped++;
    } else {
        queue->count.packets++;
        queue->count.bytes += sent;
    }
    ring_use(&queue->ring, &(struct ring_element){ .head = chain->head }, 1);
    return true;
}

/* Returns whether anything was moved. */
static bool transmit(struct engine *engine, struct queue *queue)
{
    struct ring *ring = &queue->ring;
    unsigned int moved = 0;

    if (!is_live(engine, ENGINE_TX)) {
        return false;
    }
    queue->held = false;
    if (ring_resolve(ring, &engine->dma)) {
        ring_disarm(ring);
        while (moved < BATCH && ring_available(ring) > 0 &&
               ring_chain_at(ring, &engine->dma, 0, false, &engine->chain) && transmit_one(engine, queue)) {
            moved++;
        }
    }
    if (ring->error != NULL) {
        break_down(engine, ENGINE_TX, ring->error);
    } else if (moved > 0) {
        interrupt(queue);
    }
    return moved > 0;
}

/* --- the thread --- */

/* Ask the driver to notify where only it can bring work. False: there is some already. */
static bool arm(struct engine *engine)
{
    bool quiet = true;

    for (unsigned int i = 0; i < ENGINE_QUEUES; i++) {
        struct queue *queue = &engine->queue[i];
        bool wanted = i == ENGINE_RX ? queue->held : !queue->held;

        engine->serving = i;
        if (!is_live(engine, i)) {
            continue;
        }
        if (!ring_resolve(&queue->ring, &engine->dma)) {
            break_down(engine, i, queue->ring.error);
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
    for (unsigned int i = 0; i < ENGINE_QUEUES; i++) {
        struct queue *queue = &engine->queue[i];

        if (queue->doorbell != NULL && is_live(engine, i) &&
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
    if (engine->queue[ENGINE_RX].awake) {
        engine->serving = ENGINE_RX;
        engine->worked |= receive(engine, &engine->queue[ENGINE_RX]);
    }
    if (engine->queue[ENGINE_TX].awake) {
        engine->serving = ENGINE_TX;
        engine->worked |= transmit(engine, &engine->queue[ENGINE_TX]);
    }
    if (engine->may_sleep && !engine->worked) {
        engine->may_sleep = arm(engine);
    }
}

static void take_turn(struct engine *engine)
{
    engine->worked = false;
    if (!guard_run(turn, engine)) {
        break_down(engine, engine->serving, "memory has gone under a ring or a buffer");
    }
}

/*
 * Wait on the uplink for what can be used: a level-triggered event that nobody takes would not let the
 * thread sleep.
 */
static void watch_uplink(struct engine *engine)
{
    struct epoll_event event = { .data.u32 = TOKEN_PACKET };
    bool no_room = is_live(engine, ENGINE_RX) && engine->queue[ENGINE_RX].held;
    bool congested = is_live(engine, ENGINE_TX) && engine->queue[ENGINE_TX].held;
    int operation = EPOLL_CTL_MOD;

    if (!engine->uplink_lost) {
        event.events = (no_room ? 0 : EPOLLIN) | (congested ? EPOLLOUT : 0);
    }
    if (event.events == engine->packet_events) {
        return;
    }
    if (event.events == 0) {
        operation = EPOLL_CTL_DEL;
    } else if (engine->packet_events == 0) {
        operation = EPOLL_CTL_ADD;
    }
    if (epoll_ctl(engine->epoll_fd, operation, engine->packet_fd, &event) == 0) {
        engine->packet_events = event.events;
    }
}

static void handle_event(struct engine *engine, const struct epoll_event *event)
{
    unsigned int token = event->data.u32;

    if (token == TOKEN_WAKE) {
        drain_fd(engine->wake_fd);
    } else if (token == TOKEN_PACKET) {
        engine->queue[ENGINE_RX].awake |= (event->events & EPOLLIN) != 0;
        engine->queue[ENGINE_TX].awake |= (event->events & EPOLLOUT) != 0;
        if (!(event->events & (EPOLLIN | EPOLLOUT))) {
            lose_uplink(engine);
        }
    } else {
        drain_fd(engine->queue[token].kick_fd);
        engine->queue[token].count.kicks++;
        engine->queue[token].awake = true;
    }
}

/* Take what has happened, and if `sleep`, wait until something does. */
static void collect_events(struct engine *engine, bool sleep)
{
    struct epoll_event events[ENGINE_QUEUES + 2];
    bool nap = engine->doorbells != NULL && (is_live(engine, ENGINE_RX) || is_live(engine, ENGINE_TX));
    int timeout = sleep ? (nap ? NAP_MS : -1) : 0;
    int count;

    watch_uplink(engine);
    if (sleep) {
        pthread_mutex_unlock(&engine->mutex);
    }
    count = epoll_wait(engine->epoll_fd, events, ENGINE_QUEUES + 2, timeout);
    if (sleep) {
        pthread_mutex_lock(&engine->mutex);
    }
    for (int i = 0; i < count; i++) {
        handle_event(engine, &events[i]);
    }
}

static void let_callers_in(struct engine *engine)
{
    while (engine->callers > 0) {
        pthread_cond_wait(&engine->no_callers, &engine->mutex);
    }
}

static void *engine_main(void *argument)
{
    struct engine *engine = argument;
    int64_t poll_until = 0;

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
            for (unsigned int i = 0; i < ENGINE_QUEUES; i++) {
                /* A notification that came while nothing may move counts when it may again. */
                engine->queue[i].awake &= engine->queue[i].programmed && !engine->running;
            }
        }
        collect_events(engine, engine->may_sleep);
        let_callers_in(engine);
    }
    pthread_mutex_unlock(&engine->mutex);
    return NULL;
}

/* --- calls from other threads --- */

/* The thread gives way to whoever waits, even under load, when a mutex alone would starve them. */
static void enter(struct engine *engine)
{
    engine->callers++;
    pthread_mutex_lock(&engine->mutex);
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

static int watch(struct engine *engine, int fd, uint32_t token)
{
    struct epoll_event event = { .events = EPOLLIN, .data.u32 = token };

    return epoll_ctl(engine->epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

static int open_descriptors(struct engine *engine)
{
    engine->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    engine->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    engine->fault_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (engine->epoll_fd < 0 || engine->wake_fd < 0 || engine->fault_fd < 0 ||
        watch(engine, engine->wake_fd, TOKEN_WAKE) < 0) {
        return -errno;
    }
    for (unsigned int i = 0; i < ENGINE_QUEUES; i++) {
        engine->queue[i].kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (engine->queue[i].kick_fd < 0 || watch(engine, engine->queue[i].kick_fd, i) < 0) {
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
    engine->doorbells = mmap(NULL, ENGINE_QUEUES * DMA_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
                             doorbell_fd, 0);
    if (engine->doorbells == MAP_FAILED) {
        engine->doorbells = NULL;
        return -errno;
    }
    for (unsigned int i = 0; i < ENGINE_QUEUES; i++) {
        engine->queue[i].doorbell = (uint16_t *)((uint8_t *)engine->doorbells + i * DMA_PAGE_SIZE);
    }
    return 0;
}

/* Signals are for the program's own threads; those that an instruction raises cannot be put off. */
static int start_thread(struct engine *engine)
{
    static const int raised_by_instructions[] = { SIGBUS, SIGSEGV, SIGILL, SIGFPE, SIGTRAP };
    sigset_t blocked, before;
    int result;

    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof(raised_by_instructions) / sizeof(*raised_by_instructions); i++) {
        sigdelset(&blocked, raised_by_instructions[i]);
    }
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    result = -pthread_create(&engine->thread, NULL, engine_main, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return result;
}

static void release(struct engine *engine)
{
    int fds[] = { engine->epoll_fd, engine->wake_fd, engine->fault_fd,
                  engine->queue[ENGINE_RX].kick_fd, engine->queue[ENGINE_TX].kick_fd };

    for (size_t i = 0; i < sizeof(fds) / sizeof(*fds); i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    if (engine->doorbells != NULL) {
        munmap(engine->doorbells, ENGINE_QUEUES * DMA_PAGE_SIZE);
    }
    dma_remove_all(&engine->dma);
    pthread_cond_destroy(&engine->no_callers);
    pthread_mutex_destroy(&engine->mutex);
    free(engine);
}

int engine_open(int packet_fd, int doorbell_fd, struct engine **out)
{
    struct engine *engine = calloc(1, sizeof(*engine));
    int result;

    if (engine == NULL) {
        return -ENOMEM;
    }
    pthread_mutex_init(&engine->mutex, NULL);
    pthread_cond_init(&engine->no_callers, NULL);
    engine->packet_fd = packet_fd;
    engine->epoll_fd = engine->wake_fd = engine->fault_fd = -1;
    for (unsigned int i = 0; i < ENGINE_QUEUES; i++) {
        engine->queue[i].kick_fd = engine->queue[i].call_fd = -1;
    }
    result = guard_install();
    if (result == 0) {
        result = open_descriptors(engine);
    }
    if (result == 0) {
        result = map_doorbells(engine, doorbell_fd);
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
        queue->awake = false;
        queue->held = false;
    }
    leave_and_wake(engine);
    return result;
}

/* The packet that waits for buffers is lost with its queue. */
static void drop_packet(struct engine *engine)
{
    engine->queue[ENGINE_RX].count.dropped += engine->packet_length > 0;
    engine->packet_length = 0;
}

static void take_out(struct engine *engine, unsigned int index)
{
    engine->queue[index].programmed = false;
    if (index == ENGINE_RX) {
        drop_packet(engine);
    }
}

struct ring_state engine_stop_queue(struct engine *engine, unsigned int queue)
{
    struct ring_state state;

    enter(engine);
    take_out(engine, queue);
    state = ring_position(&engine->queue[queue].ring);
    leave_and_wake(engine);
    return state;
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
        drop_packet(engine);
    }
    leave_and_wake(engine);
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
    for (unsigned int i = 0; i < ENGINE_QUEUES; i++) {
        take_out(engine, i);
        drain_fd(engine->queue[i].kick_fd);
        if (engine->queue[i].doorbell != NULL) {
            __atomic_store_n(engine->queue[i].doorbell, ENGINE_NOT_RUNG, __ATOMIC_RELAXED);
        }
    }
    engine->running = false;
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
