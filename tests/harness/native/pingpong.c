/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A guest that plays ping-pong through a VF: one frame out, the same frame back, then the next. The rings are
 * laid out by whoever starts this program, who also starts, stops and re-routes the VF meanwhile.
 *
 * The guest notifies only when the device wants it, and now waits for an interrupt, now polls with interrupts
 * suppressed, as drivers do (virtio 1.3 sections 2.7.7 and 2.7.10). The far end of the wire is here too: a
 * thread that returns each frame. Frames are numbered: one that is lost ends in a time-out, one that comes
 * twice is seen.
 *
 *     pingpong ROUNDS EVENT_IDX RETRY_MS MEMORY_FD MEMORY_SIZE BASE WIRE_FD
 *              RX-RING... TX-RING...      each: SIZE DESCRIPTORS AVAIL USED START KICK_FD CALL_FD BUFFERS
 *
 * RETRY_MS 0: nothing may be lost. Otherwise a frame that has not come back by then is sent again, and counted.
 * Prints "rounds R again A doubles D interrupts I kicks K".
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define STALL_MS 15000
#define BUFFER_SIZE 2048
#define NET_HEADER 12
#define FRAME_SIZE 60
#define NUMBER_AT 14
#define ETHERTYPE_AT 12
#define ETHERTYPE 0x88b5        /* for experiments, RFC 7042 */
#define ETHERTYPE_BACK 0x88b6
/* Receive buffers on offer at a time. */
#define OFFERED 4

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct avail {
    uint16_t flags, index, ring[];
};

struct used_element {
    uint32_t id, length;
};

struct used {
    uint16_t flags, index;
    struct used_element ring[];
};

struct ring {
    const char *name;
    uint16_t size, next_avail, seen;
    struct descriptor *descriptors;
    struct avail *avail;
    struct used *used;
    int kick_fd, call_fd;
    uint64_t buffers;           /* guest physical */
    bool busy[32768];
};

static struct ring rx = { .name = "receive" }, tx = { .name = "transmit" };
static uint8_t *memory;
static uint64_t base;
static bool event_idx;
static int wire_fd;
static unsigned int retry_ms;
static uint64_t interrupts, kicks, again;
static _Atomic uint64_t doubles;

static void fail(const char *what, uint64_t number, const char *detail)
{
    fprintf(stderr, "pingpong: frame %" PRIu64 ": %s%s\n", number, what, detail);
    fprintf(stderr, "  receive: avail %u used %u seen %u; transmit: avail %u used %u seen %u\n", rx.avail->index,
            rx.used->index, rx.seen, tx.avail->index, tx.used->index, tx.seen);
    exit(1);
}

static uint64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000ull + now.tv_nsec / 1000000;
}

static uint16_t load(const uint16_t *from)
{
    return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

static uint16_t *used_event(struct ring *ring)
{
    return &ring->avail->ring[ring->size];
}

static uint16_t *avail_event(struct ring *ring)
{
    return (uint16_t *)&ring->used->ring[ring->size];
}

static void *at(uint64_t address)
{
    return memory + (address - base);
}

/* Make one buffer available, and notify the device if it wants that. */
static void offer(struct ring *ring, uint32_t length, bool writable)
{
    uint16_t slot = ring->next_avail % ring->size, old = ring->next_avail;
    uint64_t one = 1;

    if (ring->busy[slot]) {
        fail("its descriptor is still in use on ring ", 0, ring->name);
    }
    ring->busy[slot] = true;
    ring->descriptors[slot] = (struct descriptor){
        .address = ring->buffers + (uint64_t)slot * BUFFER_SIZE, .length = length, .flags = writable ? 2 : 0,
    };
    ring->avail->ring[slot] = slot;
    ring->next_avail++;
    __atomic_store_n(&ring->avail->index, ring->next_avail, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (event_idx ? (uint16_t)(ring->next_avail - load(avail_event(ring)) - 1) < (uint16_t)(ring->next_avail - old)
                  : !(load(&ring->used->flags) & 1)) {
        kicks++;
        if (write(ring->kick_fd, &one, sizeof(one)) < 0 && errno != EAGAIN) {
            fail("cannot kick: ", 0, strerror(errno));
        }
    }
}

/* The next used entry, if there is one. */
static bool take(struct ring *ring, struct used_element *element)
{
    if (load(&ring->used->index) == ring->seen) {
        return false;
    }
    *element = ring->used->ring[ring->seen % ring->size];
    if (element->id >= ring->size || !ring->busy[element->id]) {
        fail("a buffer came back that was not given, on ring ", element->id, ring->name);
    }
    ring->busy[element->id] = false;
    ring->seen++;
    return true;
}

static void want_interrupt(struct ring *ring, bool wanted)
{
    if (event_idx) {
        /* Half a lap ahead is what Linux sets to be left in peace. */
        __atomic_store_n(used_event(ring), ring->seen + (wanted ? 0 : 0x8000), __ATOMIC_RELAXED);
    } else {
        __atomic_store_n(&ring->avail->flags, wanted ? 0 : 1, __ATOMIC_RELAXED);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Wait for a used entry, by interrupt or by polling. False: none came in time. */
static bool wait_used(struct ring *ring, bool poll_only, unsigned int limit_ms)
{
    uint64_t end = now_ms() + limit_ms, count;
    struct pollfd call = { .fd = ring->call_fd, .events = POLLIN };

    want_interrupt(ring, !poll_only);
    while (load(&ring->used->index) == ring->seen) {
        uint64_t now = now_ms();

        if (now >= end) {
            return false;
        }
        if (poll_only) {
            sched_yield();
        } else if (poll(&call, 1, end - now) == 1 && read(call.fd, &count, sizeof(count)) > 0) {
            interrupts++;
        }
    }
    return true;
}

static uint64_t number_of(const uint8_t *frame)
{
    uint64_t number;

    memcpy(&number, frame + NUMBER_AT, sizeof(number));
    return be64toh(number);
}

static uint16_t ethertype_of(const uint8_t *frame)
{
    return frame[ETHERTYPE_AT] << 8 | frame[ETHERTYPE_AT + 1];
}

/* The far end: every frame of the guest comes back, and is to come once and in order. */
static void *reflect(void *argument)
{
    uint8_t frame[BUFFER_SIZE];
    uint64_t expected = 0;

    (void)argument;
    for (;;) {
        ssize_t length = recv(wire_fd, frame, sizeof(frame), 0);

        if (length < 0 && (errno == EINTR || errno == ENETDOWN)) {
            continue;
        }
        if (length < 0) {
            fail("the wire: ", expected, strerror(errno));
        }
        if (length < FRAME_SIZE || ethertype_of(frame) != ETHERTYPE) {
            continue;
        }
        if (number_of(frame) > expected) {
            fail("one before it was lost on its way out", number_of(frame), "");
        }
        if (number_of(frame) < expected) {
            doubles++;
            if (retry_ms == 0) {
                fail("sent twice", number_of(frame), "");
            }
        } else {
            expected++;
        }
        frame[ETHERTYPE_AT + 1] = ETHERTYPE_BACK & 0xff;
        while (send(wire_fd, frame, length, 0) < 0) {
            if (errno != EINTR && errno != ENOBUFS && errno != EAGAIN && errno != ENETDOWN) {
                fail("the wire: ", expected, strerror(errno));
            }
        }
    }
    return NULL;
}

static void transmit(uint64_t number)
{
    uint8_t *buffer = at(tx.buffers + (uint64_t)(tx.next_avail % tx.size) * BUFFER_SIZE);
    uint64_t wire_number = htobe64(number);
    struct used_element done;

    memset(buffer, 0, NET_HEADER + FRAME_SIZE);
    memset(buffer + NET_HEADER, 0xff, 6);       /* to everybody: stations filter what is not for them */
    memset(buffer + NET_HEADER + 6, 0x02, 6);   /* from a locally administered address */
    buffer[NET_HEADER + ETHERTYPE_AT] = ETHERTYPE >> 8;
    buffer[NET_HEADER + ETHERTYPE_AT + 1] = ETHERTYPE & 0xff;
    memcpy(buffer + NET_HEADER + NUMBER_AT, &wire_number, sizeof(wire_number));
    offer(&tx, NET_HEADER + FRAME_SIZE, false);
    /* As Linux does: what was sent is taken back when there is something to send, without interrupts. */
    while (take(&tx, &done)) {
    }
    want_interrupt(&tx, false);
    if ((uint16_t)(tx.next_avail - tx.seen) == tx.size && !wait_used(&tx, false, STALL_MS)) {
        fail("transmit ring stalled", number, "");
    }
}

/* Receive until frame `number` comes. False: not in time. */
static bool receive(uint64_t number, unsigned int limit_ms)
{
    uint64_t end = now_ms() + limit_ms;

    for (;;) {
        uint64_t now = now_ms();
        struct used_element done;
        const uint8_t *frame;

        if (now >= end || !wait_used(&rx, rand() % 4 == 0, end - now)) {
            return false;
        }
        take(&rx, &done);
        frame = (const uint8_t *)at(rx.buffers + (uint64_t)done.id * BUFFER_SIZE) + NET_HEADER;
        offer(&rx, BUFFER_SIZE, true);
        if (done.length < NET_HEADER + FRAME_SIZE || ethertype_of(frame) != ETHERTYPE_BACK) {
            continue;           /* the network's own chatter */
        }
        if (number_of(frame) == number) {
            return true;
        }
        if (number_of(frame) > number || retry_ms == 0) {
            fail("came instead of another", number_of(frame), "");
        }
    }
}

static uint64_t argument(char ***next)
{
    char *end, *text = *(*next)++;
    uint64_t value;

    if (text == NULL) {
        fprintf(stderr, "pingpong: an argument is missing\n");
        exit(2);
    }
    value = strtoull(text, &end, 0);
    if (*end != '\0') {
        fprintf(stderr, "pingpong: '%s' is not a number\n", text);
        exit(2);
    }
    return value;
}

static void read_ring(struct ring *ring, char ***next)
{
    ring->size = argument(next);
    ring->descriptors = at(argument(next));
    ring->avail = at(argument(next));
    ring->used = at(argument(next));
    ring->next_avail = ring->seen = argument(next);
    ring->kick_fd = argument(next);
    ring->call_fd = argument(next);
    ring->buffers = argument(next);
}

int main(int argc, char **argv)
{
    char **next = argv + 1;
    uint64_t rounds = argument(&next), size;
    pthread_t reflector;
    int memory_fd;

    (void)argc;
    event_idx = argument(&next);
    retry_ms = argument(&next);
    memory_fd = argument(&next);
    size = argument(&next);
    base = argument(&next);
    wire_fd = argument(&next);
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
    if (memory == MAP_FAILED) {
        perror("pingpong: memory");
        return 1;
    }
    read_ring(&rx, &next);
    read_ring(&tx, &next);
    pthread_create(&reflector, NULL, reflect, NULL);
    for (unsigned int i = 0; i < OFFERED; i++) {
        offer(&rx, BUFFER_SIZE, true);
    }
    for (uint64_t number = 0; number < rounds; number++) {
        uint64_t end = now_ms() + STALL_MS;

        transmit(number);
        while (!receive(number, retry_ms ? retry_ms : STALL_MS)) {
            if (retry_ms == 0 || now_ms() >= end) {
                fail("lost, or the rings have stalled", number, "");
            }
            again++;
            transmit(number);
        }
    }
    printf("rounds %" PRIu64 " again %" PRIu64 " doubles %" PRIu64 " interrupts %" PRIu64 " kicks %" PRIu64 "\n",
           rounds, again, doubles, interrupts, kicks);
    return 0;
}
