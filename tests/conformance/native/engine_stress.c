/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A driver that notifies, and sleeps, exactly as the rules of a split virtqueue allow, as fast as C is.
 * Fails when a notification or an interrupt is lost: the window is less than a microsecond, and opens
 * whenever the engine or the driver falls asleep. Made to run under the sanitizers. Arguments: whether to
 * use EVENT_IDX (1 or 0), and `echo` for an engine without an uplink.
 */
#define _GNU_SOURCE
#include "engine.h"
#include "guard.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ROUNDS 20000
#define SIZE 8u
#define MEMORY (1u << 20)
#define DATA 0x10000u
#define PACKET_SIZE 76
#define HEADER_SIZE 12
#define DESC_WRITE 2
#define DEADLINE_MS 5000
/* The engine polls for 50 microseconds: so long, give or take, the driver waits between two packets. */
#define PAUSE_NS 25000
#define JITTER_NS 40000
/* Looks for what the engine wishes, some milliseconds; and the time in which it then looks for buffers. */
#define WISH_LOOKS 1000000
#define WINDOW_NS 200

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct avail { uint16_t flags, index, ring[SIZE], used_event; };
struct used { uint16_t flags, index; struct { uint32_t id, length; } ring[SIZE]; uint16_t avail_event; };

struct driver_queue {
    struct descriptor *descriptors;
    struct avail *avail;
    struct used *used;
    uint16_t seen;
    int kick_fd, call_fd;
    unsigned long kicks, interrupts;
};

static bool event_idx;
static uint8_t *memory;

static void require(bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "engine_stress: %s\n", what);
        exit(1);
    }
}

static void wait_readable(int fd, const char *what)
{
    struct pollfd waiting = { .fd = fd, .events = POLLIN };

    require(poll(&waiting, 1, DEADLINE_MS) == 1, what);
}

static void pause_for(long ns)
{
    struct timespec begin, now;

    clock_gettime(CLOCK_MONOTONIC, &begin);
    do {
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - begin.tv_sec) * 1000000000L + now.tv_nsec - begin.tv_nsec < ns);
}

static void set_up(struct engine *engine, struct driver_queue *queue, unsigned int index)
{
    uint64_t at = 0x1000 + 0x3000 * index;
    struct ring_setup setup = { .size = SIZE, .descriptors = at, .avail = at + 0x1000, .used = at + 0x2000,
                                .event_idx = event_idx };

    queue->descriptors = (void *)(memory + setup.descriptors);
    queue->avail = (void *)(memory + setup.avail);
    queue->used = (void *)(memory + setup.used);
    queue->kick_fd = engine_kick_fd(engine, index);
    queue->call_fd = eventfd(0, EFD_NONBLOCK);
    engine_set_call(engine, index, queue->call_fd);
    require(engine_start_queue(engine, index, &setup) == 0, "engine_start_queue");
}

/* Make one buffer available and notify if the device wants that (virtio 1.3 sections 2.7.7.1, 2.7.10). */
static void offer(struct driver_queue *queue, uint64_t address, uint32_t length, uint16_t flags)
{
    uint16_t old = queue->avail->index, new = old + 1;
    bool wanted;

    queue->descriptors[old % SIZE] = (struct descriptor){ address, length, flags, 0 };
    queue->avail->ring[old % SIZE] = old % SIZE;
    __atomic_store_n(&queue->avail->index, new, __ATOMIC_SEQ_CST);
    if (event_idx) {
        uint16_t event = __atomic_load_n(&queue->used->avail_event, __ATOMIC_SEQ_CST);

        wanted = (uint16_t)(new - event - 1) < (uint16_t)(new - old);
    } else {
        wanted = !(__atomic_load_n(&queue->used->flags, __ATOMIC_SEQ_CST) & 1);
    }
    if (wanted) {
        queue->kicks++;
        require(eventfd_write(queue->kick_fd, 1) == 0, "eventfd_write");
    }
}

/* Wait for the next used buffer: ask for an interrupt, look again, sleep (section 2.7.7.1). */
static void wait_used(struct driver_queue *queue, const char *what)
{
    eventfd_t value;

    if (event_idx) {
        __atomic_store_n(&queue->avail->used_event, queue->seen, __ATOMIC_SEQ_CST);
    } else {
        __atomic_store_n(&queue->avail->flags, 0, __ATOMIC_SEQ_CST);
    }
    while (__atomic_load_n(&queue->used->index, __ATOMIC_SEQ_CST) == queue->seen) {
        wait_readable(queue->call_fd, what);
        eventfd_read(queue->call_fd, &value);
        queue->interrupts++;
    }
    if (!event_idx) {
        __atomic_store_n(&queue->avail->flags, 1, __ATOMIC_SEQ_CST);
    }
    queue->seen++;
}

static void exchange_packets(struct engine *engine, int wire)
{
    struct driver_queue rx = { 0 }, tx = { 0 };
    uint8_t packet[2048];
    unsigned int seed = 1;

    set_up(engine, &rx, ENGINE_RX);
    set_up(engine, &tx, ENGINE_TX);
    engine_run(engine, true);
    for (unsigned int round = 0; round < ROUNDS; round++) {
        pause_for(PAUSE_NS + rand_r(&seed) % JITTER_NS);
        offer(&tx, DATA + 2048 * (round % SIZE), PACKET_SIZE, 0);
        wait_readable(wire, "a notification was lost: a packet did not come out");
        require(recv(wire, packet, sizeof(packet), 0) == PACKET_SIZE - HEADER_SIZE, "recv");
        wait_used(&tx, "an interrupt was lost: transmit");
        /* Now a packet, now a buffer first: the engine waits for the one or for the other. */
        if (round % 2) {
            offer(&rx, DATA + 0x8000, 2048, DESC_WRITE);
        }
        require(send(wire, packet, 60, 0) == 60, "send");
        if (round % 2 == 0) {
            pause_for(PAUSE_NS + rand_r(&seed) % JITTER_NS);
            offer(&rx, DATA + 0x8000, 2048, DESC_WRITE);
        }
        wait_used(&rx, "a notification or an interrupt was lost: receive");
    }
    printf("tx: %lu kicks, %lu interrupts; rx: %lu kicks, %lu interrupts; of %d\n", tx.kicks, tx.interrupts,
           rx.kicks, rx.interrupts, ROUNDS);
    require(tx.kicks > 0, "the engine never wanted notifications");
    close(rx.call_fd);
    close(tx.call_fd);
}

/* Wait until the engine wants notifications, for it falls asleep, or does not, for it is awake; but not for long. */
static void await_wish(const struct driver_queue *queue, bool wanted)
{
    for (unsigned int i = 0; i < WISH_LOOKS; i++) {
        if (!(__atomic_load_n(&queue->used->flags, __ATOMIC_SEQ_CST) & 1) == wanted) {
            return;
        }
    }
}

/*
 * What is sent comes back, once there is a buffer for it. Here that comes just after the engine has woken for
 * the packet: while it looks for a buffer, and while it asks to be notified of one. Not for EVENT_IDX, with which
 * a driver cannot see an engine wake.
 */
static void exchange_echoes(struct engine *engine)
{
    struct driver_queue rx = { 0 }, tx = { 0 };
    unsigned int seed = 1;

    set_up(engine, &rx, ENGINE_RX);
    set_up(engine, &tx, ENGINE_TX);
    engine_run(engine, true);
    for (unsigned int round = 0; round < ROUNDS; round++) {
        await_wish(&tx, true);
        offer(&tx, DATA + 2048 * (round % SIZE), PACKET_SIZE, 0);
        await_wish(&tx, false);
        pause_for(rand_r(&seed) % WINDOW_NS);
        offer(&rx, DATA + 0x8000, 2048, DESC_WRITE);
        wait_used(&rx, "a notification or an interrupt was lost: an echo's buffer");
        wait_used(&tx, "an interrupt was lost: an echo was sent");
    }
    printf("echo: %lu kicks for packets, %lu for buffers, of %d\n", tx.kicks, rx.kicks, ROUNDS);
    close(rx.call_fd);
    close(tx.call_fd);
}

/* An engine of its own for each exchange. */
static struct engine *open_engine(const struct engine_uplink *uplink, int memory_fd)
{
    struct engine *engine;

    require(engine_open(uplink, &engine) == 0, "engine_open");
    require(engine_open_doorbells(engine, -1) == 0, "engine_open_doorbells");
    require(engine_map(engine, 0, MEMORY, memory_fd, 0, true) == 0, "engine_map");
    return engine;
}

static void touch(void *page)
{
    *(volatile uint8_t *)page = 1;
}

/* A guarded access is survived, the same access afterwards is not. */
static void try_guard(void)
{
    static volatile int attempts;
    int fd = memfd_create("gone", 0), status;
    void *page;
    pid_t child;

    require(ftruncate(fd, 4096) == 0, "ftruncate");
    page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    require(guard_run(touch, page), "a guarded access that is good");
    require(ftruncate(fd, 0) == 0, "ftruncate");
    require(!guard_run(touch, page), "a guarded access that is bad");
    child = fork();
    if (child == 0) {
        close(STDERR_FILENO);       /* a sanitizer has much to say about what comes */
        guard_run(touch, &status);
        if (attempts++ > 0) {
            _exit(0);               /* here again: somebody jumped */
        }
        touch(page);
        _exit(0);
    }
    require(waitpid(child, &status, 0) == child && !(WIFEXITED(status) && WEXITSTATUS(status) == 0),
            "an access that is bad, and not guarded any more, went unnoticed");
    munmap(page, 4096);
    close(fd);
}

int main(int argc, char **argv)
{
    struct engine *engine;
    int sockets[2], fd = memfd_create("guest", 0);

    event_idx = argc > 1 && strcmp(argv[1], "1") == 0;
    require(ftruncate(fd, MEMORY) == 0, "ftruncate");
    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    require(memory != MAP_FAILED, "mmap");
    require(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, sockets) == 0, "socketpair");
    if (argc > 2 && strcmp(argv[2], "echo") == 0) {
        engine = open_engine(&(struct engine_uplink){ .pairs = 1, .packet_fd = { -1 } }, fd);
        exchange_echoes(engine);
    } else {
        engine = open_engine(&(struct engine_uplink){ .pairs = 1, .packet_fd = { sockets[0] } }, fd);
        exchange_packets(engine, sockets[1]);
    }
    engine_close(engine);
    close(sockets[0]);
    close(sockets[1]);
    close(fd);
    munmap(memory, MEMORY);
    try_guard();
    return 0;
}
