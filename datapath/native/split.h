/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The layout of a split virtqueue in memory (virtio 1.3 section 2.7), and single accesses to what another
 * party writes at the same time. Ground of ring.c and shadow.c; no state, no policy.
 */
#ifndef LIBVIRT_VDPA_SPLIT_H
#define LIBVIRT_VDPA_SPLIT_H

#include <endian.h>
#include <stdbool.h>
#include <stdint.h>

/* Section 2.7.5: flags of a descriptor. */
#define DESC_NEXT 1
#define DESC_WRITE 2
#define DESC_INDIRECT 4
/* Sections 2.7.6 and 2.7.8: the one flag of each ring. */
#define AVAIL_NO_INTERRUPT 1
#define USED_NO_NOTIFY 1

struct ring_descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

struct ring_avail {
    uint16_t flags;
    uint16_t index;
    uint16_t ring[];            /* then used_event */
};

struct ring_used_element {
    uint32_t id;
    uint32_t length;
};

struct ring_used {
    uint16_t flags;
    uint16_t index;
    struct ring_used_element ring[];    /* then avail_event */
};

/* The other side writes at the same time: each value is read once, and then judged. */
static inline uint16_t load16(const uint16_t *from)
{
    return le16toh(__atomic_load_n(from, __ATOMIC_RELAXED));
}

static inline uint32_t load32(const uint32_t *from)
{
    return le32toh(__atomic_load_n(from, __ATOMIC_RELAXED));
}

static inline uint64_t load64(const uint64_t *from)
{
    return le64toh(__atomic_load_n(from, __ATOMIC_RELAXED));
}

static inline void store16(uint16_t *to, uint16_t value)
{
    __atomic_store_n(to, htole16(value), __ATOMIC_RELAXED);
}

static inline uint64_t descriptors_bytes(uint16_t size)
{
    return sizeof(struct ring_descriptor) * size;
}

static inline uint64_t avail_bytes(uint16_t size)
{
    return sizeof(struct ring_avail) + sizeof(uint16_t) * (size + 1u);
}

static inline uint64_t used_bytes(uint16_t size)
{
    return sizeof(struct ring_used) + sizeof(struct ring_used_element) * size + sizeof(uint16_t);
}

static inline uint16_t *used_event_of(struct ring_avail *avail, uint16_t size)
{
    return &avail->ring[size];
}

static inline uint16_t *avail_event_of(struct ring_used *used, uint16_t size)
{
    return (uint16_t *)&used->ring[size];
}

/* Sections 2.7.7.2 and 2.7.10: did an index pass the other side's event index on its way from `old`? */
static inline bool event_passed(uint16_t event, uint16_t now, uint16_t old)
{
    return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

#endif
