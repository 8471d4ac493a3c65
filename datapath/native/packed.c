/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "packed.h"

#include <errno.h>
#include <string.h>

/* Chains that one look at the ring finds at most, so that a full one does not keep packets waiting. */
#define FOUND_AT_ONCE 64

/* Move a place on; the wrap counter turns at the end of the ring. */
static uint16_t forward(const struct ring *ring, uint16_t place, uint16_t by)
{
    uint32_t slot = (place & ~PACKED_WRAP) + by;

    if (slot < ring->setup.size) {
        return place + by;
    }
    return (slot - ring->setup.size) | (~place & PACKED_WRAP);
}

static uint16_t slot_of(uint16_t place)
{
    return place & ~PACKED_WRAP;
}

/* The flags by which the device gives back a descriptor there. */
static uint16_t used_flags(uint16_t place)
{
    return place & PACKED_WRAP ? PACKED_AVAIL | PACKED_USED : 0;
}

static bool is_available(uint16_t flags, uint16_t place)
{
    bool wrap = place & PACKED_WRAP;

    return !!(flags & PACKED_AVAIL) == wrap && !!(flags & PACKED_USED) != wrap;
}

int packed_start(struct ring *ring, const struct ring_setup *setup)
{
    uint16_t size = setup->size;

    if (size == 0 || size > RING_MAX_SIZE || slot_of(setup->avail_index) >= size ||
        slot_of(setup->used_index) >= size) {
        return -EINVAL;
    }
    /* Section 2.8.10: alignment of the three parts. */
    if (setup->descriptors % 16 != 0 || setup->avail % 4 != 0 || setup->used % 4 != 0) {
        return -EINVAL;
    }
    *ring = (struct ring){ .setup = *setup, .armed = true };
    /* What was fetched and not used is fetched again, as the driver has not seen it back. */
    ring->packed.found = ring->packed.next_used = setup->used_index;
    return 0;
}

struct ring_state packed_position(const struct ring *ring)
{
    return (struct ring_state){ .avail = ring->packed.next_used, .used = ring->packed.next_used };
}

bool packed_resolve(struct ring *ring, struct dma_table *table)
{
    const struct ring_setup *setup = &ring->setup;
    struct packed_state *packed = &ring->packed;

    if (packed->descriptors != NULL && ring->generation == table->generation) {
        return true;
    }
    packed->descriptors = ring_whole(table, setup->descriptors,
                                     sizeof(*packed->descriptors) * setup->size, true);
    packed->driver_event = ring_whole(table, setup->avail, sizeof(*packed->driver_event), false);
    packed->device_event = ring_whole(table, setup->used, sizeof(*packed->device_event), true);
    ring->generation = table->generation;
    if (packed->descriptors == NULL || packed->driver_event == NULL || packed->device_event == NULL) {
        packed->descriptors = NULL;
        return ring_fail(ring, "a part of the ring is not in one mapping of memory");
    }
    return true;
}

static uint16_t flags_at(const struct ring *ring, uint16_t place)
{
    const uint16_t *flags = &ring->packed.descriptors[slot_of(place)].flags;

    /* Acquire: who sees the first flags of a chain sees all of it (section 2.8.21). */
    return le16toh(__atomic_load_n(flags, __ATOMIC_ACQUIRE));
}

static struct packed_chain *chain_of(struct ring *ring, unsigned int ahead)
{
    unsigned int at = ring->packed.oldest + ahead;

    return &ring->packed.chain[at < RING_MAX_SIZE ? at : at - RING_MAX_SIZE];
}

/* Find one more chain. False: there is none, or an error. */
static bool find_chain(struct ring *ring)
{
    struct packed_state *packed = &ring->packed;
    uint16_t place = packed->found, flags = flags_at(ring, place);
    struct packed_chain *chain;
    uint16_t count = 1;

    if (!is_available(flags, place)) {
        return false;
    }
    if (packed->taken == ring->setup.size) {
        return ring_fail(ring, "more descriptors are available than the ring holds");
    }
    while (flags & DESC_NEXT) {
        if (packed->taken + count == ring->setup.size) {
            return ring_fail(ring, "a chain is longer than the ring, or runs into another");
        }
        place = forward(ring, place, 1);
        flags = flags_at(ring, place);
        count++;
    }
    chain = chain_of(ring, packed->waiting);
    *chain = (struct packed_chain){
        .slot = slot_of(packed->found),
        .count = count,
        /* The id is that of the last descriptor (section 2.8.6). */
        .id = load16(&packed->descriptors[slot_of(place)].id),
    };
    packed->found = forward(ring, place, 1);
    packed->taken += count;
    packed->waiting++;
    return true;
}

unsigned int packed_available(struct ring *ring)
{
    for (unsigned int i = 0; i < FOUND_AT_ONCE && find_chain(ring); i++) {
        continue;
    }
    return ring->error == NULL ? ring->packed.waiting : 0;
}

/* Judge a copy: the driver must not change what has been looked at. */
static struct ring_descriptor load(const struct packed_descriptor *from)
{
    return (struct ring_descriptor){
        .address = load64(&from->address),
        .length = load32(&from->length),
        .flags = load16(&from->flags),
    };
}

/* Section 2.8.7: a table's descriptors are one chain, in which WRITE alone of the flags counts. */
static bool add_table(struct ring *ring, struct dma_table *table, const struct ring_descriptor *from, bool write,
                      struct ring_chain *chain)
{
    uint32_t entries = from->length / sizeof(struct packed_descriptor);
    uint64_t last;

    if (!ring->setup.indirect) {
        return ring_fail(ring, "an indirect descriptor, though that was not negotiated");
    }
    if (entries == 0 || from->length % sizeof(struct packed_descriptor) != 0 ||
        __builtin_add_overflow(from->address, from->length - 1u, &last)) {
        return ring_fail(ring, "an indirect table of a size or place that cannot be");
    }
    if (entries > ring->setup.size) {
        return ring_fail(ring, "a chain is longer than the ring");
    }
    for (uint32_t i = 0; i < entries; i++) {
        struct packed_descriptor raw;
        struct ring_descriptor entry;

        if (!dma_read(table, from->address + i * sizeof(raw), &raw, sizeof(raw))) {
            return ring_fail(ring, "an indirect table is not mapped");
        }
        entry = load(&raw);
        if (!ring_add_segments(ring, table, &entry, chain, write)) {
            return false;
        }
    }
    return true;
}

bool packed_chain_at(struct ring *ring, struct dma_table *table, unsigned int ahead, bool write,
                     struct ring_chain *chain)
{
    const struct packed_chain *found = chain_of(ring, ahead);
    uint16_t slot = found->slot;

    chain->head = found->id;
    chain->bytes = 0;
    chain->segments = 0;
    for (uint16_t i = 0; i < found->count; i++) {
        struct ring_descriptor descriptor = load(&ring->packed.descriptors[slot]);

        if (descriptor.flags & DESC_INDIRECT) {
            if (found->count > 1) {
                return ring_fail(ring, "an indirect descriptor in a chain");
            }
            return add_table(ring, table, &descriptor, write, chain);
        }
        if (!ring_add_segments(ring, table, &descriptor, chain, write)) {
            return false;
        }
        slot = slot + 1u < ring->setup.size ? slot + 1 : 0;
    }
    return true;
}

/* Show one used descriptor, or keep it for packed_publish() if it is the first: the driver looks no further. */
static void give_back(struct ring *ring, const struct ring_element *element)
{
    struct packed_state *packed = &ring->packed;
    uint16_t place = packed->next_used;
    struct packed_descriptor *descriptor = &packed->descriptors[slot_of(place)];
    uint16_t flags = used_flags(place) | (element->written > 0 ? DESC_WRITE : 0);

    __atomic_store_n(&descriptor->id, htole16(element->head), __ATOMIC_RELAXED);
    __atomic_store_n(&descriptor->length, htole32(element->written), __ATOMIC_RELAXED);
    if (packed->hides) {
        __atomic_store_n(&descriptor->flags, htole16(flags), __ATOMIC_RELEASE);
        return;
    }
    packed->hides = true;
    packed->hidden = place;
    packed->hidden_flags = flags;
}

static unsigned int lesser(unsigned int a, unsigned int b)
{
    return a < b ? a : b;
}

void packed_use(struct ring *ring, const struct ring_element *elements, unsigned int count)
{
    struct packed_state *packed = &ring->packed;

    for (unsigned int i = 0; i < count; i++) {
        uint16_t descriptors = chain_of(ring, 0)->count;

        give_back(ring, &elements[i]);
        packed->next_used = forward(ring, packed->next_used, descriptors);
        packed->moved = lesser(packed->moved + descriptors, ring->setup.size);
        packed->taken -= descriptors;
        packed->waiting--;
        packed->oldest = packed->oldest + 1 < RING_MAX_SIZE ? packed->oldest + 1 : 0;
    }
    if (!ring->lazy) {
        packed_publish(ring);
    }
}

void packed_publish(struct ring *ring)
{
    struct packed_state *packed = &ring->packed;

    if (packed->hides) {
        /* Release: the driver that sees these flags sees the others, and the data written before. */
        __atomic_store_n(&packed->descriptors[slot_of(packed->hidden)].flags, htole16(packed->hidden_flags),
                         __ATOMIC_RELEASE);
        packed->hides = false;
    }
}

/* A driver's or device's wish, whose two halves are read and written at once. */
static struct packed_event load_event(const struct packed_event *from)
{
    uint32_t both = load32((const uint32_t *)from);

    return (struct packed_event){ .place = both & 0xffff, .flags = both >> 16 & PACKED_EVENTS_MASK };
}

static void store_event(struct packed_event *to, uint16_t place, uint16_t flags)
{
    __atomic_store_n((uint32_t *)to, htole32((uint32_t)flags << 16 | place), __ATOMIC_RELAXED);
}

bool packed_wants_interrupt(struct ring *ring)
{
    struct packed_state *packed = &ring->packed;
    uint16_t moved = packed->moved, now = slot_of(packed->next_used), event;
    bool valid = ring->reported_valid;
    struct packed_event wish;

    if (moved == 0) {
        return false;
    }
    packed->moved = 0;
    ring->reported_valid = true;
    /* The used descriptors must be out before the driver's wish is read; the driver does the reverse. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    wish = load_event(packed->driver_event);
    if (wish.flags == PACKED_EVENTS_DISABLE) {
        return false;
    }
    if (wish.flags != PACKED_EVENTS_DESC || !ring->setup.event_idx || !valid) {
        return true;
    }
    event = slot_of(wish.place);
    if ((wish.place ^ packed->next_used) & PACKED_WRAP) {
        event -= ring->setup.size;      /* of the round before */
    }
    return event_passed(event, now, now - moved);
}

bool packed_arm(struct ring *ring)
{
    struct packed_state *packed = &ring->packed;

    ring->armed = true;
    store_event(packed->device_event, packed->found,
                ring->setup.event_idx ? PACKED_EVENTS_DESC : PACKED_EVENTS_ENABLE);
    /* The wish must be out before the descriptor is read; the driver does the reverse. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return is_available(flags_at(ring, packed->found), packed->found);
}

void packed_disarm(struct ring *ring)
{
    if (ring->armed) {
        store_event(ring->packed.device_event, 0, PACKED_EVENTS_DISABLE);
    }
    ring->armed = false;
}
