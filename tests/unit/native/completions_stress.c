/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Completions under load, on a device that forgives nothing: it raises an event only for what it completes while it
 * has heard of the arming, unlike a ConnectX, which compares indices when it hears of it, too. Fails when a guest is
 * not interrupted, when completions are not counted exactly, and when something is used after it was taken away.
 */
#include "completions.h"

#include <endian.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define QUEUES 64
#define RECEIVES 256
#define ROUNDS 4000
#define CHANGES 5000
#define LONGEST_MS 10000

struct queue {
    _Alignas(64) uint32_t entry[16];
    _Alignas(64) uint32_t cq_record[2];
    _Alignas(64) uint32_t qp_record[1];
    int call_fd;
    bool added;
    uint64_t fired;             /* how it was armed when it raised an event last */
    bool rung;
    atomic_ulong produced;
};

static struct queue queue[QUEUES];
static _Alignas(64) uint64_t page[8];
static int channel[2];
static atomic_bool done;

static void require(bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "completions_stress: %s\n", what);
        exit(1);
    }
}

static uint64_t drain(int fd)
{
    uint64_t value;

    return read(fd, &value, sizeof(value)) == sizeof(value) ? value : 0;
}

static uint32_t load(const uint32_t *record)
{
    return be32toh(__atomic_load_n(record, __ATOMIC_ACQUIRE));
}

/* --- the device --- */

static void hear(void)
{
    uint64_t *doorbell = &page[COMPLETION_QUEUE_ARM / sizeof(*page)];

    if (__atomic_load_n(doorbell, __ATOMIC_RELAXED) != 0) {
        __atomic_store_n(doorbell, 0, __ATOMIC_SEQ_CST);
        for (unsigned int i = 0; i < QUEUES; i++) {
            queue[i].rung = true;
        }
    }
}

/* Complete something. False: no receive is posted. */
static bool complete(uint64_t index)
{
    struct queue *it = &queue[index];
    const unsigned long counter = atomic_load(&it->produced);
    uint32_t armed;

    if ((uint16_t)load(it->qp_record) == (uint16_t)counter) {
        return false;
    }
    __atomic_store_n(&it->entry[15], htobe32((uint32_t)(uint16_t)counter << 16 | 2 << 4), __ATOMIC_SEQ_CST);
    atomic_store(&it->produced, counter + 1);
    hear();
    armed = load(&it->cq_record[1]);
    /* As a ConnectX: none where the driver, when it armed, had seen this one already. */
    if (it->rung && armed != it->fired && ((armed ^ (counter + 1)) & 0xffffff) != 0) {
        it->fired = armed;
        it->rung = false;
        require(send(channel[1], &index, sizeof(index), 0) == sizeof(index), "send");
    }
    return true;
}

/* --- the driver --- */

static void set_up(void)
{
    require(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel) == 0, "socketpair");
    page[COMPLETION_QUEUE_ARM / sizeof(*page)] = 0;
    for (unsigned int i = 0; i < QUEUES; i++) {
        struct queue *it = &queue[i];

        it->entry[15] = htobe32(0xffffu << 16 | 1);
        it->cq_record[0] = it->cq_record[1] = 0;
        it->qp_record[0] = htobe32(RECEIVES);
        it->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        it->added = false;
        it->fired = UINT64_MAX;
        it->rung = false;
        atomic_store(&it->produced, 0);
    }
}

static void take_down(struct completions *completions)
{
    completions_close(completions);
    for (unsigned int i = 0; i < QUEUES; i++) {
        close(queue[i].call_fd);
    }
    close(channel[0]);
    close(channel[1]);
}

static struct completions *open_completions(enum completions_mode mode, unsigned int no_traffic_time)
{
    const struct completions_setup setup = {
        QUEUES, mode, mode == COMPLETIONS_ADAPTIVE ? 1 : 0, no_traffic_time, -1, channel[0], page,
    };
    struct completions *completions;

    require(completions_open(&setup, &completions) == 0, "completions_open");
    return completions;
}

static void add(struct completions *completions, unsigned int i)
{
    struct queue *it = &queue[i];
    const struct completion_source source = { it->entry, it->cq_record, it->qp_record, i + 1, RECEIVES };

    require(completions_add(completions, i, &source, it->call_fd) == 0, "completions_add");
    it->added = true;
}

/* One completion, one interrupt, at any distance of time. */
static void nothing_is_lost(enum completions_mode mode, unsigned int no_traffic_time)
{
    struct completions *completions;
    struct pollfd called;
    unsigned int seed = 1;

    set_up();
    completions = open_completions(mode, no_traffic_time);
    for (unsigned int i = 0; i < QUEUES; i++) {
        add(completions, i);
    }
    called = (struct pollfd){ .fd = queue[0].call_fd, .events = POLLIN };
    require(drain(called.fd) == 1, "no interrupt at first");
    for (unsigned int round = 0; round < ROUNDS; round++) {
        for (volatile int pause = rand_r(&seed) % 4096; pause > 0; pause--) {
        }
        require(complete(0), "no receive is posted");
        require(poll(&called, 1, LONGEST_MS) == 1, "the guest was not interrupted");
        require(drain(called.fd) == 1, "the guest was interrupted more than once");
    }
    require(completions_count(completions, 0).completions == ROUNDS, "completions were not counted");
    require(completions_count(completions, 0).interrupts == ROUNDS + 1, "interrupts were not counted");
    take_down(completions);
}

static void *device(void *argument)
{
    unsigned int seed = 2;

    while (!atomic_load(&done)) {
        complete(rand_r(&seed) % QUEUES);
    }
    return argument;
}

static void change(struct completions *completions, unsigned int i, unsigned int *seed)
{
    struct queue *it = &queue[i];

    if (!it->added) {
        add(completions, i);
    } else if (rand_r(seed) % 4 == 0) {
        int former = it->call_fd;

        it->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        require(completions_set_call(completions, i, it->call_fd) == 0, "completions_set_call");
        drain(former);
        require(drain(former) == 0, "the former eventfd is in use");
        close(former);
    } else {
        uint32_t consumed, posted;

        completions_remove(completions, i);
        it->added = false;
        consumed = load(it->cq_record);
        posted = load(it->qp_record);
        require(drain(it->call_fd) > 0, "no interrupt for what was completed last");
        sched_yield();
        require(consumed == load(it->cq_record) && posted == load(it->qp_record), "written after it was taken away");
        require(drain(it->call_fd) == 0, "interrupted after it was taken away");
    }
}

static void come_and_go(enum completions_mode mode)
{
    struct completions *completions;
    unsigned int seed = 3;
    pthread_t thread;

    set_up();
    completions = open_completions(mode, 2);
    atomic_store(&done, false);
    require(pthread_create(&thread, NULL, device, NULL) == 0, "pthread_create");
    for (unsigned int round = 0; round < CHANGES; round++) {
        change(completions, rand_r(&seed) % QUEUES, &seed);
    }
    atomic_store(&done, true);
    pthread_join(thread, NULL);
    for (unsigned int i = 0; i < QUEUES; i++) {
        if (!queue[i].added) {
            add(completions, i);
        }
        completions_remove(completions, i);
        require(completions_count(completions, i).completions == atomic_load(&queue[i].produced), "miscounted");
        require(completions_count(completions, i).errors == 0, "errors counted");
    }
    take_down(completions);
}

int main(void)
{
    for (enum completions_mode mode = COMPLETIONS_ADAPTIVE; mode <= COMPLETIONS_INTERRUPTS; mode++) {
        nothing_is_lost(mode, 0);
        nothing_is_lost(mode, 16);
        come_and_go(mode);
    }
    return 0;
}
