/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The device side of one packed virtqueue (virtio 1.3 section 2.8). Each function does for a packed ring what the one
 * of the same name in ring.h says; ring.c calls it. Private to the ring.
 *
 * There is no index that tells how many chains are available: they are found by walking the descriptor ring, each
 * descriptor once, and kept until they are used.
 */
#ifndef LIBVIRT_VDPA_PACKED_H
#define LIBVIRT_VDPA_PACKED_H

#include "ring.h"

/* cffi: begin */
/* cffi: end */

/* Flags of a descriptor beside those of split.h (section 2.8.1). */
#define PACKED_AVAIL 0x80
#define PACKED_USED 0x8000

/* A wrap counter beside a place in the ring (section 2.8.14). */
#define PACKED_WRAP 0x8000

/* What one side wants to hear of (section 2.8.14). */
#define PACKED_EVENTS_ENABLE 0
#define PACKED_EVENTS_DISABLE 1
#define PACKED_EVENTS_DESC 2
#define PACKED_EVENTS_MASK 3

struct packed_descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t id;
    uint16_t flags;
};

struct packed_event {
    uint16_t place;             /* for PACKED_EVENTS_DESC */
    uint16_t flags;
};

int packed_start(struct ring *ring, const struct ring_setup *setup);
struct ring_state packed_position(const struct ring *ring);
bool packed_resolve(struct ring *ring, struct dma_table *table);
unsigned int packed_available(struct ring *ring);
bool packed_chain_at(struct ring *ring, struct dma_table *table, unsigned int ahead, bool write,
                     struct ring_chain *chain);
void packed_use(struct ring *ring, const struct ring_element *elements, unsigned int count);
void packed_publish(struct ring *ring);
bool packed_wants_interrupt(struct ring *ring);
bool packed_arm(struct ring *ring);
void packed_disarm(struct ring *ring);

#endif
