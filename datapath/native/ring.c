/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <string.h>

#include "packed.h"

bool ring_fail(struct ring *ring, const char *error)
{
    ring->error = error;
    return false;
}

/* The place of a free-running index. */
static uint16_t slot(const struct ring *ring, uint16_t index)
{
    return index & (ring->setup.size - 1);
}

int ring_start(struct ring *ring, const struct ring_setup *setup)
{
    uint16_t size = setup->size;

    if (setup->packed) {
        return packed_start(ring, setup);
    }
    if (size == 0 || size > RING_MAX_SIZE || (size & (size - 1)) != 0) {
        return -EINVAL;
    }
    /* Section 2.7: alignment of the three parts. */
    if (setup->descriptors % 16 != 0 || setup->avail % 2 != 0 || setup->used % 4 != 0) {
        return -EINVAL;
    }
    *ring = (struct ring){
        .setup = *setup,
        .next_avail = setup->avail_index,
        .seen = setup->avail_index,
        .next_used = setup->used_index,
        .reported = setup->used_index,
        .armed = true,
    };
    if (setup->prefetch > size) {
        ring->setup.prefetch = size;
    }
    return 0;
}

struct ring_state ring_position(const struct ring *ring)
{
    if (ring->setup.packed) {
        return packed_position(ring);
    }
    return (struct ring_state){ .avail = ring->next_avail, .used = ring->next_used };
}

void *ring_whole(struct dma_table *table, uint64_t iova, uint64_t bytes, bool write)
{
    uint64_t length = bytes;
    void *host = dma_translate(table, iova, &length, write);

    return length == bytes ? host : NULL;
}

bool ring_resolve(struct ring *ring, struct dma_table *table)
{
    const struct ring_setup *setup = &ring->setup;

    if (setup->packed) {
        return packed_resolve(ring, table);
    }
    if (ring->descriptors != NULL && ring->generation == table->generation) {
        return true;
    }
    ring->descriptors = ring_whole(table, setup->descriptors, descriptors_bytes(setup->size), false);
    ring->avail = ring_whole(table, setup->avail, avail_bytes(setup->size), false);
    ring->used = ring_whole(table, setup->used, used_bytes(setup->size), true);
    ring->generation = table->generation;
    if (ring->descriptors == NULL || ring->avail == NULL || ring->used == NULL) {
        ring->descriptors = NULL;
        return ring_fail(ring, "a part of the ring is not in one mapping of memory");
    }
    return true;
}

unsigned int ring_available(struct ring *ring)
{
    uint16_t index, waiting;

    if (ring->setup.packed) {
        return packed_available(ring);
    }
    index = le16toh(__atomic_load_n(&ring->avail->index, __ATOMIC_ACQUIRE));
    waiting = index - ring->next_avail;
    if (waiting > ring->setup.size - ring->fetched) {
        ring_fail(ring, "the available index is ahead by more than the ring holds");
        return 0;
    }
    ring->seen = index;
    return waiting + ring->fetched;
}

static uint16_t *fetched_head(struct ring *ring, unsigned int ahead)
{
    return &ring->head[slot(ring, ring->fetched_from + ahead)];
}

void ring_prefetch(struct ring *ring)
{
    if (ring->setup.packed) {
        return;                 /* the driver sees no index by which it could tell */
    }
    while (ring->fetched < ring->setup.prefetch && ring->next_avail != ring->seen) {
        *fetched_head(ring, ring->fetched) = load16(&ring->avail->ring[slot(ring, ring->next_avail)]);
        ring->fetched++;
        ring->next_avail++;
    }
}

static uint16_t head_at(struct ring *ring, unsigned int ahead)
{
    if (ahead < ring->fetched) {
        return *fetched_head(ring, ahead);
    }
    ahead -= ring->fetched;
    return load16(&ring->avail->ring[slot(ring, ring->next_avail + ahead)]);
}

/* Add the memory of one descriptor to a chain. */
bool ring_add_segments(struct ring *ring, struct dma_table *table, const struct ring_descriptor *from,
                       struct ring_chain *chain, bool write)
{
    uint64_t iova = from->address, left = from->length, last;

    if (left > 0 && __builtin_add_overflow(iova, left - 1, &last)) {
        return ring_fail(ring, "a descriptor's memory wraps around the end of the address space");
    }
    if (((from->flags & DESC_WRITE) != 0) != write) {
        return ring_fail(ring, write ? "a receive buffer is not for the device to write"
                                     : "a transmit buffer is not for the device to read");
    }
    chain->bytes += left;
    while (left > 0) {
        uint64_t part = left;
        void *host = dma_translate(table, iova, &part, write);

        if (host == NULL) {
            return ring_fail(ring, "a descriptor's memory is not mapped");
        }
        if (chain->segments == RING_MAX_SEGMENTS) {
            return ring_fail(ring, "a chain is of too many pieces");
        }
        chain->segment[chain->segments] = (struct iovec){ .iov_base = host, .iov_len = part };
        chain->iova[chain->segments] = iova;
        chain->segments++;
        iova += part;
        left -= part;
    }
    return true;
}

/* Where descriptors come from: the ring's own table, or an indirect one. */
struct table_view {
    bool indirect;
    uint64_t iova;
    uint32_t entries;
};

static bool load_descriptor(struct ring *ring, struct dma_table *table, const struct table_view *view,
                            uint16_t index, struct ring_descriptor *out)
{
    struct ring_descriptor raw;

    if (index >= view->entries) {
        return ring_fail(ring, "a descriptor number is beyond its table");
    }
    if (!view->indirect) {
        memcpy(&raw, &ring->descriptors[index], sizeof(raw));
    } else if (!dma_read(table, view->iova + (uint64_t)index * sizeof(raw), &raw, sizeof(raw))) {
        return ring_fail(ring, "an indirect table is not mapped");
    }
    /* From here on only the copy counts: keep the compiler from reading the driver's memory again. */
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    *out = (struct ring_descriptor){
        .address = le64toh(raw.address),
        .length = le32toh(raw.length),
        .flags = le16toh(raw.flags),
        .next = le16toh(raw.next),
    };
    return true;
}

/* Section 2.7.5.3: go on in the table that a descriptor names. */
static bool enter_indirect(struct ring *ring, const struct ring_descriptor *from, struct table_view *view)
{
    uint64_t last;

    if (!ring->setup.indirect) {
        return ring_fail(ring, "an indirect descriptor, though that was not negotiated");
    }
    if (view->indirect) {
        return ring_fail(ring, "an indirect descriptor within an indirect table");
    }
    if (from->flags & DESC_NEXT) {
        return ring_fail(ring, "an indirect descriptor that has a next one");
    }
    if (from->length == 0 || from->length % sizeof(*from) != 0 ||
        __builtin_add_overflow(from->address, from->length - 1u, &last)) {
        return ring_fail(ring, "an indirect table of a size or place that cannot be");
    }
    *view = (struct table_view){ true, from->address, from->length / sizeof(*from) };
    return true;
}

bool ring_chain_at(struct ring *ring, struct dma_table *table, unsigned int ahead, bool write,
                   struct ring_chain *chain)
{
    struct table_view view = { .entries = ring->setup.size };
    struct ring_descriptor descriptor;
    uint16_t index;

    if (ring->setup.packed) {
        return packed_chain_at(ring, table, ahead, write, chain);
    }
    index = head_at(ring, ahead);
    chain->head = index;
    chain->bytes = 0;
    chain->segments = 0;
    /* No chain is longer than the ring, indirect or not: so one that bites its tail ends as well. */
    for (unsigned int count = 0; count < ring->setup.size;) {
        if (!load_descriptor(ring, table, &view, index, &descriptor)) {
            return false;
        }
        if (descriptor.flags & DESC_INDIRECT) {
            if (!enter_indirect(ring, &descriptor, &view)) {
                return false;
            }
            index = 0;
            continue;           /* happens once: nesting is refused */
        }
        if (!ring_add_segments(ring, table, &descriptor, chain, write)) {
            return false;
        }
        if (!(descriptor.flags & DESC_NEXT)) {
            return true;
        }
        index = descriptor.next;
        count++;
    }
    return ring_fail(ring, "a chain is longer than the ring");
}

/* Lines of what is written for a small packet: its header, its addresses, and what follows. */
#define WARM_BYTES 128
#define LINE 64

/*
 * To own a line, not only to read it: else the first store to it waits for the other processor, and all later ones
 * behind it. __builtin_prefetch() does so only where GCC is told that every processor can; all of x86-64 take
 * the instruction.
 */
static inline void fetch_to_write(const void *from)
{
#ifdef __x86_64__
    __asm__ volatile ("prefetchw (%0)" : : "r" (from));
#else
    __builtin_prefetch(from, 1);
#endif
}

static void warm(const uint8_t *from, uint64_t bytes, bool write)
{
    for (uint64_t at = 0; at < bytes && at < WARM_BYTES; at += LINE) {
        if (write) {
            fetch_to_write(from + at);
        } else {
            __builtin_prefetch(from + at);
        }
    }
}

void ring_warm(struct ring *ring, struct dma_table *table, unsigned int count, bool write)
{
    if (ring->setup.packed) {
        return;                 /* its descriptors have been read to find the chains */
    }
    for (unsigned int i = 0; i < count; i += LINE / sizeof(struct ring_used_element)) {
        fetch_to_write(&ring->used->ring[slot(ring, ring->next_used + i)]);
    }
    for (unsigned int i = 0; i < count; i++) {
        uint16_t index = head_at(ring, i);
        const struct ring_descriptor *descriptor = &ring->descriptors[index];
        uint64_t bytes;
        const uint8_t *host;

        if (index >= ring->setup.size) {
            return;
        }
        bytes = load32(&descriptor->length);
        host = dma_translate(table, load64(&descriptor->address), &bytes, write);
        if (host != NULL) {
            warm(host, bytes, write);
        }
    }
}

static void drop_head(struct ring *ring)
{
    if (ring->fetched > 0) {
        ring->fetched--;
        ring->fetched_from++;
    } else {
        ring->next_avail++;
    }
}

static void put_used(struct ring *ring, uint16_t head, uint32_t written)
{
    struct ring_used_element *used = &ring->used->ring[slot(ring, ring->next_used)];

    used->id = htole32(head);
    used->length = htole32(written);
    ring->next_used++;
    drop_head(ring);
}

void ring_use(struct ring *ring, const struct ring_element *elements, unsigned int count)
{
    if (ring->setup.packed) {
        packed_use(ring, elements, count);
        return;
    }
    for (unsigned int i = 0; i < count; i++) {
        put_used(ring, elements[i].head, elements[i].written);
    }
    if (!ring->lazy) {
        ring_publish(ring);
    }
}

void ring_use_one(struct ring *ring, uint16_t head, uint32_t written)
{
    if (ring->setup.packed) {
        packed_use(ring, &(struct ring_element){ head, written }, 1);
        return;
    }
    put_used(ring, head, written);
    if (!ring->lazy) {
        ring_publish(ring);
    }
}

void ring_publish(struct ring *ring)
{
    if (ring->setup.packed) {
        packed_publish(ring);
        return;
    }
    /* Release: the driver that sees the index sees the entries, and the data written before. */
    __atomic_store_n(&ring->used->index, htole16(ring->next_used), __ATOMIC_RELEASE);
}

bool ring_wants_interrupt(struct ring *ring)
{
    uint16_t old = ring->reported, new = ring->next_used;
    bool valid = ring->reported_valid;

    if (ring->setup.packed) {
        return packed_wants_interrupt(ring);
    }
    if (old == new) {
        return false;
    }
    ring->reported = new;
    ring->reported_valid = true;
    /* The used index must be out before the driver's wish is read; the driver does the reverse. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!ring->setup.event_idx) {
        return !(load16(&ring->avail->flags) & AVAIL_NO_INTERRUPT);
    }
    return !valid || event_passed(load16(used_event_of(ring->avail, ring->setup.size)), new, old);
}

bool ring_arm(struct ring *ring)
{
    if (ring->setup.packed) {
        return packed_arm(ring);
    }
    ring->armed = true;
    if (ring->setup.event_idx) {
        store16(avail_event_of(ring->used, ring->setup.size), ring->seen);
    } else {
        store16(&ring->used->flags, 0);
    }
    /* The wish must be out before the index is read; the driver does the reverse. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return load16(&ring->avail->index) != ring->seen;
}

void ring_disarm(struct ring *ring)
{
    if (ring->setup.packed) {
        packed_disarm(ring);
        return;
    }
    /* With EVENT_IDX nothing is to be done: avail_event falls behind by itself. */
    if (ring->armed && !ring->setup.event_idx) {
        store16(&ring->used->flags, USED_NO_NOTIFY);
    }
    ring->armed = false;
}
