/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "shadow.h"

#include <errno.h>
#include <stdlib.h>

#include "barrier.h"
#include "written.h"

#define MAX_SIZE 32768

bool shadow_fail(struct shadow *shadow, const char *error)
{
    if (shadow->error == NULL) {
        shadow->error = error;
    }
    return false;
}

/*
 * What SIGBUS may leave behind must be in memory by then, though to the compiler no access can be left in
 * the middle.
 */
static void settle(void)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

/* The place of a free-running index. */
static uint16_t slot(const struct shadow *shadow, uint16_t index)
{
    return index & (shadow->setup.size - 1);
}

int shadow_new(const struct shadow_setup *setup, struct shadow **out)
{
    uint16_t size = setup->size;
    struct shadow *shadow;

    if (size == 0 || size > MAX_SIZE || (size & (size - 1)) != 0) {
        return -EINVAL;
    }
    /* Section 2.7: alignment of the three parts. */
    if (setup->descriptors % 16 != 0 || setup->avail % 2 != 0 || setup->used % 4 != 0) {
        return -EINVAL;
    }
    if (setup->private_avail == NULL || (uintptr_t)setup->private_avail % 2 != 0 ||
        setup->private_used == NULL || (uintptr_t)setup->private_used % 4 != 0) {
        return -EINVAL;
    }
    shadow = calloc(1, sizeof(*shadow) + size * sizeof(shadow->buffer[0]));
    if (shadow == NULL) {
        return -ENOMEM;
    }
    shadow->setup = *setup;
    shadow->private_avail = setup->private_avail;
    shadow->private_used = setup->private_used;
    shadow->next_avail = shadow->next_used = shadow->reported = setup->index;
    /* The guest's ring as the device before us left it may ask for notifications; zeroed, the private does. */
    shadow->guest_armed = shadow->device_armed = true;
    *out = shadow;
    return 0;
}

void shadow_free(struct shadow *shadow)
{
    free(shadow);
}

struct shadow_state shadow_position(const struct shadow *shadow)
{
    return (struct shadow_state){
        .avail = shadow->next_avail,
        .used = shadow->next_used,
        .in_flight = shadow->next_avail - shadow->next_used,
        .error = shadow->error,
    };
}

static void *whole(struct dma_table *table, uint64_t iova, uint64_t bytes)
{
    uint64_t length = bytes;
    void *host = dma_translate(table, iova, &length, true);

    return length == bytes ? host : NULL;
}

bool shadow_resolve(struct shadow *shadow, struct dma_table *table)
{
    const struct shadow_setup *setup = &shadow->setup;

    if (shadow->descriptors != NULL && shadow->generation == table->generation) {
        return true;
    }
    shadow->descriptors = whole(table, setup->descriptors, descriptors_bytes(setup->size));
    shadow->avail = whole(table, setup->avail, avail_bytes(setup->size));
    shadow->used = whole(table, setup->used, used_bytes(setup->size));
    shadow->generation = table->generation;
    if (shadow->descriptors == NULL || shadow->avail == NULL || shadow->used == NULL) {
        shadow->descriptors = NULL;
        return shadow_fail(shadow, "a part of the guest's ring is not in one mapping of memory");
    }
    return true;
}

/* Of completions that were taken from the device, those that are next in the guest's order. */
static void take_in_order(struct shadow *shadow)
{
    while (shadow->waiting < SHADOW_BATCH) {
        uint16_t next = shadow->next_used + shadow->waiting;
        uint16_t head = shadow->buffer[slot(shadow, next)].head;
        struct shadow_buffer *buffer = &shadow->buffer[head];

        if (next == shadow->next_avail || !buffer->done) {
            return;
        }
        buffer->done = buffer->outstanding = false;
        shadow->batch[shadow->waiting].head = head;
        shadow->batch[shadow->waiting].length = buffer->length;
        shadow->waiting++;
    }
}

/* Take completions from the device, as far as they are of what it was given. */
static void fetch(struct shadow *shadow)
{
    uint16_t index = le16toh(device_load_acquire(&shadow->private_used->index));
    uint16_t done = index - shadow->completed;
    unsigned int count = done < SHADOW_BATCH || shadow->setup.in_order ? done : SHADOW_BATCH, i;

    if (done > (uint16_t)(shadow->given - shadow->completed)) {
        shadow_fail(shadow, "the device has completed more than it was given");
        return;
    }
    for (i = 0; i < count; i++) {
        const struct ring_used_element *entry =
            &shadow->private_used->ring[slot(shadow, shadow->completed + i)];
        uint32_t id = load32(&entry->id), length = load32(&entry->length);

        if (id >= shadow->setup.size || !shadow->buffer[id].outstanding || shadow->buffer[id].done) {
            shadow_fail(shadow, "the device has completed what it was not given");
            break;
        }
        if (shadow->setup.in_order) {
            shadow->buffer[id].done = true;
            shadow->buffer[id].length = length;
            continue;
        }
        shadow->buffer[id].outstanding = false;
        shadow->batch[i].head = id;
        shadow->batch[i].length = length;
    }
    shadow->completed += i;
    if (shadow->setup.in_order) {
        take_in_order(shadow);
    } else {
        shadow->waiting = i;
    }
}

static void mark_batch(struct shadow *shadow, struct dma_table *table, struct dirty_log *log)
{
    for (unsigned int i = 0; log->bitmap != NULL && i < shadow->waiting; i++) {
        written_mark(log, table, shadow->descriptors, shadow->setup.size, shadow->batch[i].head,
                     shadow->batch[i].length);
    }
}

/* Mark a part of the guest's used ring that has just been written. */
static void mark_used(struct shadow *shadow, struct dirty_log *log, const void *part, uint64_t bytes)
{
    log_mark(log, shadow->setup.used + (uint64_t)((const uint8_t *)part - (uint8_t *)shadow->used), bytes);
}

/* Mark entries of the guest's used ring, which may go on at its beginning, and its index. */
static void mark_entries(struct shadow *shadow, struct dirty_log *log, uint16_t first, unsigned int count)
{
    unsigned int from = slot(shadow, first), before_end = shadow->setup.size - from;
    unsigned int part = count < before_end ? count : before_end;
    const struct ring_used_element *ring = shadow->used->ring;

    mark_used(shadow, log, &ring[from], part * sizeof(*ring));
    mark_used(shadow, log, ring, (count - part) * sizeof(*ring));
    mark_used(shadow, log, &shadow->used->index, sizeof(shadow->used->index));
}

static void pass_on(struct shadow *shadow)
{
    for (unsigned int i = 0; i < shadow->waiting; i++) {
        struct ring_used_element *entry = &shadow->used->ring[slot(shadow, shadow->next_used + i)];

        entry->id = htole32(shadow->batch[i].head);
        entry->length = htole32(shadow->batch[i].length);
    }
    shadow->next_used += shadow->waiting;
    shadow->waiting = 0;
    /* Release: a guest that sees the index sees the entries, and what the device had written before. */
    __atomic_store_n(&shadow->used->index, htole16(shadow->next_used), __ATOMIC_RELEASE);
}

unsigned int shadow_complete(struct shadow *shadow, struct dma_table *table, struct dirty_log *log)
{
    uint16_t first = shadow->next_used;
    unsigned int count;

    if (shadow->waiting == 0) {
        fetch(shadow);
        settle();
    }
    count = shadow->waiting;
    if (count == 0) {
        return 0;
    }
    /*
     * Before the guest sees them and may use the descriptors for something else; and in the bitmap itself, for
     * what dies after the guest has seen them marks no more.
     */
    mark_batch(shadow, table, log);
    log_flush(log);
    pass_on(shadow);
    settle();
    mark_entries(shadow, log, first, count);
    return count;
}

unsigned int shadow_give(struct shadow *shadow)
{
    /* Acquire: what the guest wrote before it moved the index is passed on with it to the device. */
    uint16_t index = le16toh(__atomic_load_n(&shadow->avail->index, __ATOMIC_ACQUIRE));
    uint16_t ahead = index - shadow->next_avail;
    uint16_t room = shadow->setup.size - (uint16_t)(shadow->next_avail - shadow->next_used);
    unsigned int count = ahead < SHADOW_BATCH ? ahead : SHADOW_BATCH;

    if (ahead > room) {
        shadow_fail(shadow, "the available index is ahead by more than the ring holds");
        return 0;
    }
    for (unsigned int i = 0; i < count; i++) {
        uint16_t head = load16(&shadow->avail->ring[slot(shadow, shadow->next_avail + i)]);

        if (head >= shadow->setup.size || shadow->buffer[head].outstanding) {
            shadow_fail(shadow, "a head is beyond the descriptor table, or available twice");
            return 0;
        }
        shadow->buffer[head].outstanding = true;
        shadow->buffer[slot(shadow, shadow->next_avail + i)].head = head;
        store16(&shadow->private_avail->ring[slot(shadow, shadow->given + i)], head);
    }
    if (count > 0) {
        shadow->next_avail += count;
        shadow->given += count;
        device_store_release(&shadow->private_avail->index, htole16(shadow->given));
    }
    return count;
}

bool shadow_wants_doorbell(struct shadow *shadow)
{
    uint16_t old = shadow->rung, now = shadow->given;

    if (old == now) {
        return false;
    }
    shadow->rung = now;
    /* The index must be out before the device's wish is read; the device does the reverse. */
    device_fence();
    if (!shadow->setup.event_idx) {
        return !(load16(&shadow->private_used->flags) & USED_NO_NOTIFY);
    }
    return event_passed(load16(avail_event_of(shadow->private_used, shadow->setup.size)), now, old);
}

bool shadow_wants_interrupt(struct shadow *shadow)
{
    uint16_t old = shadow->reported, now = shadow->next_used;
    bool valid = shadow->reported_valid;

    if (old == now) {
        return false;
    }
    shadow->reported = now;
    shadow->reported_valid = true;
    /* The index must be out before the guest's wish is read; the guest does the reverse. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!shadow->setup.event_idx) {
        return !(load16(&shadow->avail->flags) & AVAIL_NO_INTERRUPT);
    }
    /* What the device before us reported is not known: the first time counts as wanted. */
    return !valid || event_passed(load16(used_event_of(shadow->avail, shadow->setup.size)), now, old);
}

void shadow_disarm(struct shadow *shadow, struct dirty_log *log)
{
    /* With EVENT_IDX nothing is to be done: the event indices fall behind by themselves. */
    if (!shadow->setup.event_idx) {
        if (shadow->guest_armed) {
            store16(&shadow->used->flags, USED_NO_NOTIFY);
            mark_used(shadow, log, &shadow->used->flags, sizeof(shadow->used->flags));
        }
        if (shadow->device_armed) {
            store16(&shadow->private_avail->flags, AVAIL_NO_INTERRUPT);
        }
    }
    shadow->guest_armed = shadow->device_armed = false;
}

/* Ask the guest for notifications of whatever comes after next_avail. */
static void arm_guest(struct shadow *shadow, struct dirty_log *log)
{
    uint16_t *wish = &shadow->used->flags;

    if (shadow->setup.event_idx) {
        wish = avail_event_of(shadow->used, shadow->setup.size);
        store16(wish, shadow->next_avail);
    } else {
        store16(wish, 0);
    }
    shadow->guest_armed = true;
    mark_used(shadow, log, wish, sizeof(*wish));
}

bool shadow_arm(struct shadow *shadow, struct dirty_log *log, bool heads)
{
    if (shadow->setup.event_idx) {
        store16(used_event_of(shadow->private_avail, shadow->setup.size), shadow->completed);
    } else {
        store16(&shadow->private_avail->flags, 0);
    }
    shadow->device_armed = true;
    if (heads) {
        arm_guest(shadow, log);
    }
    /* The wishes must be out before the indices are read; guest and device do the reverse. */
    device_fence();
    return load16(&shadow->private_used->index) != shadow->completed ||
           (heads && load16(&shadow->avail->index) != shadow->next_avail);
}

void shadow_leave(struct shadow *shadow, struct dirty_log *log)
{
    arm_guest(shadow, log);
    for (uint16_t index = shadow->next_used; index != shadow->next_avail; index++) {
        uint16_t head = load16(&shadow->avail->ring[slot(shadow, index)]);

        if (head >= shadow->setup.size || !shadow->buffer[head].outstanding) {
            shadow_fail(shadow, "the device has completed out of order: what it still has cannot be given again");
            return;
        }
    }
}
