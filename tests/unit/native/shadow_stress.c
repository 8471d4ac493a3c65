/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Shadow rings under load: guests and devices that notify, and sleep, exactly as the rules of a split
 * virtqueue allow, with the relay between them or not, while rings are taken out and put back at random
 * moments, as a driver does it. Fails when a wake-up is lost, a buffer comes back twice, not at all or with
 * other contents than the device gave it, or when a page that was written is not in the dirty log, a buffer's
 * by the time that the guest sees it. Made to run under the sanitizers.
 *
 *     shadow_stress [SEED [ROUNDS]]
 */
#define _GNU_SOURCE
#include "relay.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define RINGS 2
#define SIZE 16u
#define CHAINS (SIZE / 2)
#define PAGE 4096u
/* No part of the ring shares a page with another, nor a request with an answer. */
#define DESCRIPTORS_AT 0u
#define AVAIL_AT PAGE
#define USED_AT (2 * PAGE)
#define TABLES_AT (3 * PAGE)
#define REQUESTS_AT (4 * PAGE)
#define ANSWERS_AT (REQUESTS_AT + CHAINS * PAGE)
#define RING_MEMORY (ANSWERS_AT + CHAINS * PAGE)
#define GUEST_BASE 0x100000u
#define ANSWER_BYTES 24
#ifndef STALL_SECONDS
#define STALL_SECONDS 20
#endif

struct avail { uint16_t flags, index, ring[SIZE], used_event; };
struct used { uint16_t flags, index; struct ring_used_element ring[SIZE]; uint16_t avail_event; };

/* What the device writes. The second word is read while it may be written, by the migration. */
struct answer { uint64_t first, second; };

enum mode { DIRECT, SHADOW };

struct game {
    bool event_idx;
    unsigned int outstanding;   /* buffers on offer at most */
    unsigned int rounds;
    bool only_shadow;
};

struct device {
    pthread_t thread;
    sem_t go, stopped;
    atomic_bool stop, quit;
    struct avail *avail;
    struct used *used;
    uint16_t next_avail, next_used, reported;
    int doorbell_fd;
    atomic_int call_fd;
    bool armed;
    uint64_t last;              /* number of the request that was answered last */
    unsigned int ahead;         /* heads that were taken and not completed; a stop forgets them */
    uint16_t head[SIZE];
};

struct ring {
    const struct game *game;
    unsigned int number;
    unsigned int seed;
    uint8_t *memory;            /* the guest's, at guest physical address `base` */
    uint64_t base;
    struct ring_descriptor *descriptors;
    struct avail *avail;
    struct used *used;
    int kick_fd, call_fd[2];

    pthread_t guest;
    atomic_ulong done;          /* requests that came back */
    atomic_bool finished;
    unsigned long kicks, interrupts;

    struct device device;
    struct avail private_avail;
    struct used private_used;
    int interrupt_fd;

    enum mode mode;
    bool added;
    unsigned int calls;         /* index in call_fd */
    unsigned long changes;
};

static struct relay *relay;
static struct ring rings[RINGS];
static const char *phase;

static void require(bool condition, const char *what)
{
    if (condition) {
        return;
    }
    fprintf(stderr, "shadow_stress: %s: %s\n", phase, what);
    for (unsigned int i = 0; i < RINGS; i++) {
        struct ring *ring = &rings[i];

        fprintf(stderr, "ring %u: %s, %lu done, avail %u used %u flags %u %u, private avail %u used %u\n", i,
                ring->mode == SHADOW ? "shadow" : "direct", atomic_load(&ring->done), ring->avail->index,
                ring->used->index, ring->avail->flags, ring->used->flags, ring->private_avail.index,
                ring->private_used.index);
    }
    _exit(1);
}

static uint16_t get16(const uint16_t *from)
{
    return __atomic_load_n(from, __ATOMIC_RELAXED);
}

static void put16(uint16_t *to, uint16_t value)
{
    __atomic_store_n(to, value, __ATOMIC_RELAXED);
}

static void full_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static bool passed(uint16_t event, uint16_t now, uint16_t old)
{
    return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

static void signal_fd(int fd)
{
    require(eventfd_write(fd, 1) == 0, "eventfd_write");
}

static bool drain(int fd)
{
    eventfd_t value;

    return eventfd_read(fd, &value) == 0;
}

/* Now and then lose some time, a little or a lot, so that the others come to meet us everywhere. */
static void dawdle(unsigned int *seed)
{
    unsigned int dice = rand_r(seed) % 64;

    if (dice == 0) {
        sched_yield();
    } else if (dice < 24) {
        for (volatile unsigned int spin = rand_r(seed) % (dice < 4 ? 20000 : 600); spin > 0; spin--) {
        }
    }
}

/* The device. */

static uint64_t request_of(const struct ring *ring, uint16_t head, struct answer **answer)
{
    const struct ring_descriptor *descriptor = &ring->descriptors[head];
    const struct ring_descriptor *next = descriptor + 1;

    if (descriptor->flags & DESC_INDIRECT) {
        descriptor = (void *)(ring->memory + (descriptor->address - ring->base));
        next = descriptor + 1;
    }
    *answer = (void *)(ring->memory + (next->address - ring->base));
    return *(uint64_t *)(ring->memory + (descriptor->address - ring->base));
}

static void complete_some(struct ring *ring, unsigned int *seed)
{
    struct device *device = &ring->device;
    unsigned int count = 1 + rand_r(seed) % device->ahead;

    for (unsigned int i = 0; i < count; i++) {
        struct answer *answer;
        uint64_t request = request_of(ring, device->head[i], &answer);
        struct ring_used_element *entry = &device->used->ring[(uint16_t)(device->next_used + i) % SIZE];

        require(request == device->last + 1, "the device got a request twice, or one that does not come next");
        device->last = request;
        answer->first = request * 3;
        __atomic_store_n(&answer->second, request, __ATOMIC_RELAXED);
        *entry = (struct ring_used_element){ device->head[i], ANSWER_BYTES };
    }
    device->ahead -= count;
    memmove(device->head, device->head + count, device->ahead * sizeof(device->head[0]));
    device->next_used += count;
    __atomic_store_n(&device->used->index, device->next_used, __ATOMIC_RELEASE);
    dawdle(seed);
}

/* Sections 2.7.7.2 and 2.7.10. */
static void interrupt_if_wanted(struct ring *ring)
{
    struct device *device = &ring->device;
    uint16_t old = device->reported, now = device->next_used;
    bool wanted;

    full_fence();
    wanted = ring->game->event_idx ? passed(get16(&device->avail->used_event), now, old)
                                   : !(get16(&device->avail->flags) & AVAIL_NO_INTERRUPT);
    device->reported = now;
    if (old != now && wanted) {
        signal_fd(atomic_load(&device->call_fd));
    }
}

static void fetch(struct device *device, unsigned int most)
{
    uint16_t index = __atomic_load_n(&device->avail->index, __ATOMIC_ACQUIRE);

    while (device->ahead < most && device->next_avail != index) {
        device->head[device->ahead++] = get16(&device->avail->ring[device->next_avail % SIZE]);
        device->next_avail++;
    }
}

/* Ask for notifications, look again, sleep. */
static void sleep_device(struct ring *ring, unsigned int *seed)
{
    struct device *device = &ring->device;
    struct pollfd doorbell = { .fd = device->doorbell_fd, .events = POLLIN };

    if (ring->game->event_idx) {
        put16(&device->used->avail_event, device->next_avail);
    } else {
        put16(&device->used->flags, 0);
    }
    full_fence();
    if (get16(&device->avail->index) == device->next_avail) {
        dawdle(seed);
        poll(&doorbell, 1, -1);
        drain(device->doorbell_fd);
    }
    if (!ring->game->event_idx && rand_r(seed) % 4) {
        put16(&device->used->flags, USED_NO_NOTIFY);
    }
}

static void *run_device(void *argument)
{
    struct ring *ring = argument;
    struct device *device = &ring->device;
    unsigned int seed = ring->seed + 1;

    while (sem_wait(&device->go) == 0 && !atomic_load(&device->quit)) {
        while (!atomic_load(&device->stop)) {
            fetch(device, 1 + rand_r(&seed) % SIZE);
            dawdle(&seed);
            if (device->ahead > 0) {
                complete_some(ring, &seed);
                interrupt_if_wanted(ring);
            } else {
                sleep_device(ring, &seed);
            }
        }
        sem_post(&device->stopped);
    }
    return NULL;
}

static void start_device(struct ring *ring, struct avail *avail, struct used *used, uint16_t index, int call_fd)
{
    struct device *device = &ring->device;

    device->avail = avail;
    device->used = used;
    device->next_avail = device->next_used = device->reported = index;
    device->ahead = 0;
    atomic_store(&device->call_fd, call_fd);
    atomic_store(&device->stop, false);
    drain(device->doorbell_fd);
    sem_post(&device->go);
}

static void stop_device(struct ring *ring)
{
    atomic_store(&ring->device.stop, true);
    signal_fd(ring->device.doorbell_fd);
    require(sem_wait(&ring->device.stopped) == 0, "sem_wait");
}

/* The guest. */

static void lay_out(struct ring *ring, uint16_t start)
{
    memset(ring->memory, 0, RING_MEMORY);
    ring->descriptors = (void *)(ring->memory + DESCRIPTORS_AT);
    ring->avail = (void *)(ring->memory + AVAIL_AT);
    ring->used = (void *)(ring->memory + USED_AT);
    ring->avail->index = ring->used->index = start;
    ring->avail->used_event = start;
    ring->used->avail_event = start;
    for (unsigned int i = 0; i < CHAINS; i++) {
        struct ring_descriptor *table = (void *)(ring->memory + TABLES_AT + i * 2 * sizeof(*table));
        struct ring_descriptor *chain = i % 2 ? table : &ring->descriptors[2 * i];

        chain[0] = (struct ring_descriptor){ ring->base + REQUESTS_AT + i * PAGE, sizeof(uint64_t), DESC_NEXT,
                                             i % 2 ? 1 : 2 * i + 1 };
        chain[1] = (struct ring_descriptor){ ring->base + ANSWERS_AT + i * PAGE, PAGE, DESC_WRITE, 0 };
        if (i % 2) {
            ring->descriptors[2 * i] = (struct ring_descriptor){
                ring->base + TABLES_AT + i * 2 * sizeof(*table), 2 * sizeof(*table), DESC_INDIRECT, 0,
            };
        }
    }
}

static void offer(struct ring *ring, uint64_t first, unsigned int count, unsigned int *seed)
{
    uint16_t old = ring->avail->index, now = old + count;
    bool wanted;

    for (unsigned int i = 0; i < count; i++) {
        unsigned int chain = (first + i) % CHAINS;

        *(uint64_t *)(ring->memory + REQUESTS_AT + chain * PAGE) = first + i;
        put16(&ring->avail->ring[(uint16_t)(old + i) % SIZE], 2 * chain);
    }
    __atomic_store_n(&ring->avail->index, now, __ATOMIC_RELEASE);
    full_fence();
    wanted = ring->game->event_idx ? passed(get16(&ring->used->avail_event), now, old)
                                   : !(get16(&ring->used->flags) & USED_NO_NOTIFY);
    dawdle(seed);
    if (wanted) {
        ring->kicks++;
        signal_fd(ring->kick_fd);
    }
}

/* Wait until used entries have come behind `seen`: ask for an interrupt, look again, sleep. */
static void wait_used(struct ring *ring, uint16_t seen, unsigned int *seed)
{
    struct pollfd calls[] = { { .fd = ring->call_fd[0], .events = POLLIN },
                              { .fd = ring->call_fd[1], .events = POLLIN } };

    for (;;) {
        if (ring->game->event_idx) {
            put16(&ring->avail->used_event, seen);
        } else {
            put16(&ring->avail->flags, 0);
        }
        full_fence();
        if (__atomic_load_n(&ring->used->index, __ATOMIC_ACQUIRE) != seen) {
            break;
        }
        dawdle(seed);
        poll(calls, 2, -1);
        drain(ring->call_fd[0]);
        drain(ring->call_fd[1]);
        ring->interrupts++;
    }
    if (!ring->game->event_idx && rand_r(seed) % 4) {
        put16(&ring->avail->flags, AVAIL_NO_INTERRUPT);
    }
}

/* The dirty log, and what the far end of a migration has by means of it. */

#define LOG_BYTES ((GUEST_BASE + RINGS * RING_MEMORY) / PAGE / 8 + 1)

static uint8_t bitmap[LOG_BYTES];
static uint64_t moved[RINGS][CHAINS];
static atomic_uint moves;       /* odd while pages are being moved */

/* A buffer is marked by the time that the guest sees it, or has been moved since: the relay might die now. */
static void check_marked(unsigned int number, unsigned int chain, const struct answer *answer)
{
    uint64_t page = (GUEST_BASE + number * RING_MEMORY + ANSWERS_AT) / PAGE + chain;
    unsigned int before, after;

    do {
        before = atomic_load(&moves);
        if ((__atomic_load_n(&bitmap[page / 8], __ATOMIC_SEQ_CST) & 1u << page % 8) ||
            __atomic_load_n(&moved[number][chain], __ATOMIC_SEQ_CST) == answer->second) {
            return;
        }
        after = atomic_load(&moves);
    } while (before != after || before % 2 != 0);
    require(false, "the guest sees a buffer that is not marked");
}

static void *run_guest(void *argument)
{
    struct ring *ring = argument;
    const struct game *game = ring->game;
    unsigned int seed = ring->seed;
    uint64_t offered = 0, done = 0;
    uint16_t seen = ring->used->index;

    while (done < game->rounds) {
        uint64_t room = game->outstanding - (offered - done), left = game->rounds - offered;
        unsigned int count = room < left ? room : left;
        uint16_t index;

        if (count > 0) {
            count = 1 + rand_r(&seed) % count;
            offer(ring, offered + 1, count, &seed);
            offered += count;
        }
        index = __atomic_load_n(&ring->used->index, __ATOMIC_ACQUIRE);
        if (index == seen && (count == 0 || rand_r(&seed) % 2)) {
            wait_used(ring, seen, &seed);
            index = __atomic_load_n(&ring->used->index, __ATOMIC_ACQUIRE);
        }
        for (; seen != index; seen++) {
            const struct ring_used_element *entry = &ring->used->ring[seen % SIZE];
            unsigned int chain = ++done % CHAINS;
            const struct answer *answer = (void *)(ring->memory + ANSWERS_AT + chain * PAGE);

            require(done <= offered, "more came back than was offered");
            require(entry->id == 2 * chain && entry->length == ANSWER_BYTES, "another buffer came back");
            require(answer->first == done * 3, "a buffer came back without what was written to it");
            if (game->only_shadow) {
                check_marked(ring->number, chain, answer);
            }
        }
        atomic_store(&ring->done, done);
        dawdle(&seed);
    }
    atomic_store(&ring->finished, true);
    return NULL;
}

/* The driver. */

static void enter(struct ring *ring, enum mode mode, int kick_fd)
{
    uint16_t index = __atomic_load_n(&ring->used->index, __ATOMIC_ACQUIRE);
    int call_fd = ring->call_fd[ring->calls];

    ring->mode = mode;
    if (mode == DIRECT) {
        start_device(ring, ring->avail, ring->used, index, call_fd);
        require(relay_add(relay, ring->number, kick_fd, ring->device.doorbell_fd, NULL) == 0, "relay_add");
    } else {
        const struct shadow_setup setup = {
            .size = SIZE, .event_idx = ring->game->event_idx, .descriptors = ring->base + DESCRIPTORS_AT,
            .avail = ring->base + AVAIL_AT, .used = ring->base + USED_AT, .index = index,
            .private_avail = &ring->private_avail, .private_used = &ring->private_used,
        };
        const struct relay_wires wires = { kick_fd, call_fd, ring->interrupt_fd, ring->device.doorbell_fd, NULL };

        memset(&ring->private_avail, 0, sizeof(ring->private_avail));
        memset(&ring->private_used, 0, sizeof(ring->private_used));
        drain(ring->interrupt_fd);
        start_device(ring, &ring->private_avail, &ring->private_used, 0, ring->interrupt_fd);
        require(relay_add_shadow(relay, ring->number, &setup, &wires) == 0, "relay_add_shadow");
    }
    require(relay_ring(relay, ring->number) == 0, "relay_ring");
}

static void wait_until_idle(struct ring *ring)
{
    struct shadow_state state;
    const struct timespec pause = { .tv_nsec = 20000 };

    for (unsigned int tries = 0; tries < STALL_SECONDS * 10000u; tries++) {
        require(relay_state(relay, ring->number, &state) == 0, "relay_state");
        if (state.in_flight == 0) {
            return;
        }
        nanosleep(&pause, NULL);
    }
    require(false, "a ring that was held did not run dry");
}

static void leave(struct ring *ring, bool dry)
{
    struct shadow_state state;

    if (ring->mode == DIRECT) {
        relay_remove(relay, ring->number);
        stop_device(ring);
        return;
    }
    require(relay_hold(relay, ring->number) == 0, "relay_hold");
    if (dry) {
        wait_until_idle(ring);
    }
    stop_device(ring);
    relay_remove(relay, ring->number);
    require(relay_state(relay, ring->number, &state) == 0, "relay_state after removal");
    require(state.error == NULL, state.error != NULL ? state.error : "");
    require(state.used == get16(&ring->used->index), "the used index is not where the relay says");
    require(state.in_flight == (uint16_t)(state.avail - state.used) && (!dry || state.in_flight == 0),
            "another number in flight");
}

static void change(struct ring *ring, unsigned int *seed)
{
    enum mode mode = ring->game->only_shadow || rand_r(seed) % 3 ? SHADOW : DIRECT;

    if (ring->added && ring->mode == SHADOW && rand_r(seed) % 4 == 0) {
        ring->calls = !ring->calls;
        require(relay_set_call(relay, ring->number, ring->call_fd[ring->calls]) == 0, "relay_set_call");
        return;
    }
    if (ring->added) {
        leave(ring, rand_r(seed) % 2);
        dawdle(seed);
    }
    enter(ring, mode, rand_r(seed) % 16 ? ring->kick_fd : -1);
    ring->added = true;
    ring->changes++;
}

/* The migration. */

static struct used moved_used[RINGS];

#ifdef __SANITIZE_THREAD__      /* it takes exception to a copy of what changes meanwhile */
#define SEES_RACES true
#else
#define SEES_RACES false
#endif

static void move_page(uint64_t address)
{
    unsigned int number = (address - GUEST_BASE) / RING_MEMORY;
    unsigned int offset = (address - GUEST_BASE) % RING_MEMORY;

    require(address >= GUEST_BASE && number < RINGS, "a page is marked that nobody has");
    if (offset == USED_AT) {
        if (!SEES_RACES) {
            memcpy(&moved_used[number], rings[number].used, sizeof(moved_used[number]));
        }
    } else {
        require(offset >= ANSWERS_AT, "a page is marked that nobody wrote to");
        offset -= ANSWERS_AT;
        __atomic_store_n(&moved[number][offset / PAGE],
                         __atomic_load_n(&((struct answer *)(rings[number].memory + ANSWERS_AT + offset))->second,
                                         __ATOMIC_RELAXED),
                         __ATOMIC_SEQ_CST);
    }
}

/* Take the bits, then copy the pages. */
static void move_pages(void)
{
    atomic_fetch_add(&moves, 1);
    for (uint64_t byte = 0; byte < LOG_BYTES; byte++) {
        uint8_t bits = __atomic_exchange_n(&bitmap[byte], 0, __ATOMIC_SEQ_CST);

        for (unsigned int bit = 0; bit < 8; bit++) {
            if (bits & 1u << bit) {
                move_page((byte * 8 + bit) * PAGE);
            }
        }
    }
    atomic_fetch_add(&moves, 1);
}

static void compare_moved(void)
{
    move_pages();
    for (unsigned int i = 0; i < RINGS; i++) {
        for (unsigned int chain = 0; chain < CHAINS; chain++) {
            const struct answer *answer = (void *)(rings[i].memory + ANSWERS_AT + chain * PAGE);

            require(moved[i][chain] == answer->second, "a page that the device wrote was not moved");
        }
        require(SEES_RACES || memcmp(&moved_used[i], rings[i].used, sizeof(moved_used[i])) == 0,
                "the used ring was not moved");
    }
}

/* The games. */

static void set_up(struct ring *ring, unsigned int number, const struct game *game, unsigned int seed)
{
    ring->game = game;
    ring->seed = seed;
    atomic_store(&ring->done, 0);
    atomic_store(&ring->finished, false);
    atomic_store(&ring->device.quit, false);
    ring->device.last = 0;
    ring->added = false;
    lay_out(ring, 0xfff0 + number);
    require(pthread_create(&ring->device.thread, NULL, run_device, ring) == 0 &&
                pthread_create(&ring->guest, NULL, run_guest, ring) == 0,
            "pthread_create");
}

static void take_down(struct ring *ring)
{
    leave(ring, false);
    pthread_join(ring->guest, NULL);
    atomic_store(&ring->device.quit, true);
    sem_post(&ring->device.go);
    pthread_join(ring->device.thread, NULL);
    printf("%s, ring %u: %lu requests, %lu kicks, %lu interrupts, %lu changes\n", phase, ring->number,
           atomic_load(&ring->done), ring->kicks, ring->interrupts, ring->changes);
    ring->kicks = ring->interrupts = ring->changes = 0;
}

/*
 * A change takes up what may have been lost before it. So each ring has to get on by itself for a while
 * before the next: a wake-up that is lost then is lost for good, and seen.
 */
static void play(const char *name, const struct game *game, unsigned int *seed)
{
    unsigned long until[RINGS] = { 0 };
    time_t deadline = time(NULL) + STALL_SECONDS;
    bool finished = false;

    phase = name;
    for (unsigned int i = 0; i < RINGS; i++) {
        set_up(&rings[i], i, game, rand_r(seed));
    }
    while (!finished) {
        struct timespec pause = { .tv_nsec = rand_r(seed) % 100000 };

        finished = true;
        for (unsigned int i = 0; i < RINGS; i++) {
            unsigned long done = atomic_load(&rings[i].done);

            if (!atomic_load(&rings[i].finished)) {
                finished = false;
                if (done >= until[i]) {
                    change(&rings[i], seed);
                    until[i] = done + 1 + rand_r(seed) % 300;
                    deadline = time(NULL) + STALL_SECONDS;
                }
            }
        }
        if (game->only_shadow) {
            move_pages();
        }
        require(time(NULL) < deadline, "stalled");
        nanosleep(&pause, NULL);
    }
    for (unsigned int i = 0; i < RINGS; i++) {
        take_down(&rings[i]);
    }
}

static void open_ring(struct ring *ring, unsigned int number)
{
    ring->number = number;
    ring->base = GUEST_BASE + number * RING_MEMORY;
    ring->memory = mmap(NULL, RING_MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    require(ring->memory != MAP_FAILED, "mmap");
    ring->kick_fd = eventfd(0, EFD_CLOEXEC);
    ring->call_fd[0] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ring->call_fd[1] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ring->interrupt_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ring->device.doorbell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    sem_init(&ring->device.go, 0, 0);
    sem_init(&ring->device.stopped, 0, 0);
    require(relay_map(relay, ring->base, RING_MEMORY, ring->memory) == 0, "relay_map");
}

static void close_ring(struct ring *ring)
{
    int fds[] = { ring->kick_fd, ring->call_fd[0], ring->call_fd[1], ring->interrupt_fd, ring->device.doorbell_fd };

    require(relay_unmap(relay, ring->base, RING_MEMORY) == 0, "relay_unmap");
    for (unsigned int i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
        close(fds[i]);
    }
    munmap(ring->memory, RING_MEMORY);
}

int main(int argc, char **argv)
{
    unsigned int seed = argc > 1 ? strtoul(argv[1], NULL, 0) : 1;
    unsigned int rounds = argc > 2 ? strtoul(argv[2], NULL, 0) : 10000;

    phase = "start";
    require(relay_open(RINGS, &relay) == 0, "relay_open");
    for (unsigned int i = 0; i < RINGS; i++) {
        open_ring(&rings[i], i);
    }
    for (unsigned int event_idx = 0; event_idx < 2; event_idx++) {
        play(event_idx ? "ping-pong, event index" : "ping-pong, flags",
             &(struct game){ event_idx, 1, rounds, false }, &seed);
        play(event_idx ? "bulk, event index" : "bulk, flags", &(struct game){ event_idx, CHAINS, rounds, false },
             &seed);
        relay_log(relay, bitmap, sizeof(bitmap));
        play(event_idx ? "migration, event index" : "migration, flags",
             &(struct game){ event_idx, CHAINS, rounds, true }, &seed);
        compare_moved();
        relay_log(relay, NULL, 0);
        require(relay_log_count(relay).missed == 0, "pages beyond the log");
    }
    for (unsigned int i = 0; i < RINGS; i++) {
        close_ring(&rings[i]);
    }
    relay_close(relay);
    return 0;
}
