/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The barriers of shadow rings and of the dirty log, each put to the test by itself: two threads do, at the
 * same moment and again and again, what must not both go unnoticed. A processor that reorders a store and a
 * later load (x86-64 does) shows within some thousands of meetings where a barrier is missing. Not for the
 * sanitizers, which are too slow to meet.
 *
 *     shadow_litmus [MEETINGS]
 */
#define _GNU_SOURCE
#include "shadow.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#define SIZE 8u
#define PAGE 4096u
#define AVAIL_AT 0x400u
#define USED_AT 0x800u

static _Alignas(4096) uint8_t memory[PAGE];
static struct ring_descriptor *const descriptors = (void *)memory;
static struct ring_avail *const avail = (void *)(memory + AVAIL_AT);
static struct ring_used *const used = (void *)(memory + USED_AT);
static _Alignas(4096) uint8_t private_memory[PAGE];
static struct ring_avail *const private_avail = (void *)(private_memory + AVAIL_AT);
static struct ring_used *const private_used = (void *)(private_memory + USED_AT);

static struct shadow *shadow;
static struct dma_table table;
static struct dirty_log no_log;
static bool event_idx;

/* For the dirty log: a page, its bit, what a migration has of it, and two who log. */
static uint64_t page, moved;
static uint8_t bitmap[1];
static struct dirty_log logs[2] = { { .bitmap = bitmap, .bytes = 1 }, { .bitmap = bitmap, .bytes = 1 } };

static void full_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static void require(bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "shadow_litmus, %s: %s\n", event_idx ? "event index" : "flags", what);
        _Exit(1);
    }
}

/* Steps of guest and device, one buffer at a time. */

static void guest_offers(void)
{
    store16(&avail->ring[avail->index % SIZE], 0);
    __atomic_store_n(&avail->index, avail->index + 1, __ATOMIC_RELEASE);
}

static void device_completes(void)
{
    private_used->ring[private_used->index % SIZE] = (struct ring_used_element){ 0, 0 };
    __atomic_store_n(&private_used->index, private_used->index + 1, __ATOMIC_RELEASE);
}

static bool guest_would_kick(void)
{
    uint16_t now = avail->index;

    full_fence();
    return event_idx ? event_passed(load16(avail_event_of(used, SIZE)), now, now - 1)
                     : !(load16(&used->flags) & USED_NO_NOTIFY);
}

static bool device_would_interrupt(void)
{
    uint16_t now = private_used->index;

    full_fence();
    return event_idx ? event_passed(load16(used_event_of(private_avail, SIZE)), now, now - 1)
                     : !(load16(&private_avail->flags) & AVAIL_NO_INTERRUPT);
}

/* Once around with nobody wanting anything, so that the event indices are behind. */
static void go_round(void)
{
    guest_offers();
    require(shadow_give(shadow) == 1, "a buffer was not given");
    shadow_wants_doorbell(shadow);
    device_completes();
    require(shadow_complete(shadow, &table, &no_log) == 1, "a buffer was not completed");
    shadow_wants_interrupt(shadow);
    shadow_disarm(shadow, &no_log);
    require(event_idx || (used->flags == USED_NO_NOTIFY && private_avail->flags == AVAIL_NO_INTERRUPT),
            "notifications are not suppressed");
    store16(&avail->flags, AVAIL_NO_INTERRUPT);
    store16(&private_used->flags, USED_NO_NOTIFY);
}

/* A meeting: what one thread does and the other. One of the two has to notice. */
struct meeting {
    void (*before)(void);
    bool (*ours)(void);
    bool (*theirs)(void);
    void (*after)(void);
    const char *lost;
};

static bool arm(void)
{
    return shadow_arm(shadow, &no_log, true);
}

static void before_completion(void)
{
    guest_offers();
    shadow_give(shadow);
    shadow_wants_doorbell(shadow);
}

static bool complete_and_see(void)
{
    device_completes();
    return device_would_interrupt();
}

static void carry_over(void)
{
    require(shadow_complete(shadow, &table, &no_log) == 1, "a buffer was not completed");
    shadow_wants_interrupt(shadow);
}

static bool offer_and_see(void)
{
    guest_offers();
    return guest_would_kick();
}

static void give_and_carry_over(void)
{
    require(shadow_give(shadow) == 1, "a buffer was not given");
    shadow_wants_doorbell(shadow);
    device_completes();
    carry_over();
}

static void before_interrupt(void)
{
    before_completion();
    device_completes();
}

static bool carry_over_and_see(void)
{
    shadow_complete(shadow, &table, &no_log);
    return shadow_wants_interrupt(shadow);
}

static uint16_t guest_seen;

static bool guest_falls_asleep(void)
{
    if (event_idx) {
        store16(used_event_of(avail, SIZE), guest_seen);
    } else {
        store16(&avail->flags, 0);
    }
    full_fence();
    return load16(&used->index) != guest_seen;
}

static void guest_looks(void)
{
    guest_seen = used->index;
}

static bool give_and_see(void)
{
    shadow_give(shadow);
    return shadow_wants_doorbell(shadow);
}

static uint16_t device_seen;

static bool device_falls_asleep(void)
{
    if (event_idx) {
        store16(avail_event_of(private_used, SIZE), device_seen);
    } else {
        store16(&private_used->flags, 0);
    }
    full_fence();
    return load16(&private_avail->index) != device_seen;
}

static void before_doorbell(void)
{
    device_seen = private_avail->index;
    guest_offers();
}

static void complete_and_carry_over(void)
{
    device_completes();
    carry_over();
}

static void mark_all(void)
{
    bitmap[0] = 0xff;
    moved = page;
}

static bool write_and_log(void)
{
    __atomic_store_n(&page, page + 1, __ATOMIC_RELAXED);
    log_mark(&logs[0], 0, 1);
    log_flush(&logs[0]);
    return false;
}

static bool take_and_copy(void)
{
    __atomic_exchange_n(&bitmap[0], 0, __ATOMIC_SEQ_CST);
    moved = __atomic_load_n(&page, __ATOMIC_RELAXED);
    return false;
}

static void check_moved(void)
{
    require(moved == page || bitmap[0] & 1, "a page that was written is neither moved nor marked");
}

static void mark_none(void)
{
    bitmap[0] = 0;
}

static bool log_first(void)
{
    log_mark(&logs[0], 0, 1);
    log_flush(&logs[0]);
    return false;
}

static bool log_second(void)
{
    log_mark(&logs[1], PAGE, 1);
    log_flush(&logs[1]);
    return false;
}

static void check_both(void)
{
    require(bitmap[0] == 3, "a bit was lost that somebody else set beside");
}

static const struct meeting meetings[] = {
    { before_completion, arm, complete_and_see, carry_over, "a completion while the relay falls asleep" },
    { NULL, arm, offer_and_see, give_and_carry_over, "a buffer while the relay falls asleep" },
    { before_interrupt, carry_over_and_see, guest_falls_asleep, NULL, "a completion while the guest falls asleep" },
    { before_doorbell, give_and_see, device_falls_asleep, complete_and_carry_over,
      "a buffer while the device falls asleep" },
    { mark_all, write_and_log, take_and_copy, check_moved, NULL },
    { mark_none, log_first, log_second, check_both, NULL },
};
#define MEETINGS (sizeof(meetings) / sizeof(meetings[0]))

static _Atomic unsigned int turn;       /* counts the threads that have come to a point where both must be */
static bool theirs_noticed;
static unsigned int count;

static void wait_for_other(unsigned int *point)
{
    unsigned int both = *point += 2;

    atomic_fetch_add(&turn, 1);
    for (unsigned int spins = 0; (int)(atomic_load(&turn) - both) < 0; spins++) {
        if (spins > 1000) {
            sched_yield();
        }
    }
}

static void dawdle(unsigned int *seed)
{
    for (volatile unsigned int spin = rand_r(seed) % 40; spin > 0; spin--) {
    }
}

static void *other(void *argument)
{
    unsigned int point = 0, seed = 2;

    (void)argument;
    for (unsigned int i = 0; i < count; i++) {
        for (unsigned int at = 0; at < MEETINGS; at++) {
            wait_for_other(&point);
            dawdle(&seed);
            theirs_noticed = meetings[at].theirs();
            wait_for_other(&point);
        }
    }
    return NULL;
}

static void meet(void)
{
    unsigned int point = 0, seed = 1;
    pthread_t thread;

    atomic_store(&turn, 0);
    require(pthread_create(&thread, NULL, other, NULL) == 0, "pthread_create");
    for (unsigned int i = 0; i < count; i++) {
        for (unsigned int at = 0; at < MEETINGS; at++) {
            const struct meeting *meeting = &meetings[at];
            bool noticed;

            go_round();
            guest_looks();
            if (meeting->before != NULL) {
                meeting->before();
            }
            wait_for_other(&point);
            dawdle(&seed);
            noticed = meeting->ours();
            wait_for_other(&point);
            require(meeting->lost == NULL || noticed || theirs_noticed, meeting->lost);
            if (meeting->after != NULL) {
                meeting->after();
            }
        }
    }
    pthread_join(thread, NULL);
}

static void play(void)
{
    const struct shadow_setup setup = {
        .size = SIZE, .event_idx = event_idx, .avail = AVAIL_AT, .used = USED_AT,
        .private_avail = private_avail, .private_used = private_used,
    };

    for (unsigned int at = 0; at < PAGE; at++) {
        memory[at] = private_memory[at] = 0;
    }
    descriptors[0] = (struct ring_descriptor){ 0, PAGE, DESC_WRITE, 0 };
    require(shadow_new(&setup, &shadow) == 0 && shadow_resolve(shadow, &table), "no ring");
    meet();
    shadow_free(shadow);
}

int main(int argc, char **argv)
{
    count = argc > 1 ? strtoul(argv[1], NULL, 0) : 50000;
    require(dma_borrow(&table, 0, PAGE, memory) == 0, "dma_borrow");
    for (unsigned int i = 0; i < 2; i++) {
        event_idx = i;
        play();
    }
    dma_remove_all(&table);
    return 0;
}
