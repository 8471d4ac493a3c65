/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The device side of one virtqueue with indirect descriptors and EVENT_IDX: a split one (virtio 1.3 section 2.7),
 * or a packed one, for which packed.c does what is said here. It trusts nothing that stands in the rings: what
 * breaks a rule ends in `error`. Buffers are given back in the order in which they were made available, as
 * IN_ORDER promises, each with an entry of its own.
 *
 * Plain data without thread or lock. Everything but ring_start() touches the driver's memory and so runs
 * under guard_run().
 */
#ifndef LIBVIRT_VDPA_RING_H
#define LIBVIRT_VDPA_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "dma.h"
#include "split.h"

/* cffi: begin */
/* How a driver has set a queue up; addresses are IOVAs. */
struct ring_setup {
    uint16_t size;              /* descriptors, up to RING_MAX_SIZE; of a split ring a power of two */
    bool packed;                /* `avail` and `used` are then the event suppression structures of driver and device */
    uint64_t descriptors;
    uint64_t avail;
    uint64_t used;
    uint16_t avail_index;       /* where to begin; of a packed ring see struct ring_state */
    uint16_t used_index;
    bool event_idx;             /* negotiated features */
    bool indirect;
    bool mergeable;             /* of the network device: packets may span receive buffers */
    bool short_header;          /* of the network device: the header of virtio 0.95, without num_buffers */
    uint16_t prefetch;          /* heads of a split ring to fetch ahead of need, as hardware may */
};

/*
 * The next entry of the available ring to fetch, and of the used ring to write. Of a packed ring: places in the
 * descriptor ring in bits 14 to 0, with the wrap counters in bit 15 (section 2.8.1).
 */
struct ring_state {
    uint16_t avail;
    uint16_t used;
};

#define RING_MAX_SIZE 1024
/* cffi: end */

/*
 * Memory pieces of one chain: mappings may split descriptors, and writev() takes no more (UIO_MAXIOV) with a header
 * before them.
 */
#define RING_MAX_SEGMENTS 1023

/* A chain of a packed ring that has been made available. */
struct packed_chain {
    uint16_t slot;              /* of its first descriptor */
    uint16_t count;             /* of descriptors */
    uint16_t id;
};

/* What is known of a packed ring, besides struct ring. */
struct packed_state {
    struct packed_descriptor *descriptors;
    struct packed_event *driver_event;
    struct packed_event *device_event;

    /* Places as in struct ring_state. */
    uint16_t found;             /* up to where chains have been found */
    uint16_t next_used;
    bool hides;                 /* a used descriptor's flags have yet to be written, at `hidden` */
    uint16_t hidden;
    uint16_t hidden_flags;
    uint16_t moved;             /* descriptors used since the driver was last considered, at most a ring's */

    /* Chains that were found and not used, the oldest at `oldest`, and how many descriptors they have. */
    uint16_t oldest;
    uint16_t waiting;
    uint16_t taken;
    struct packed_chain chain[RING_MAX_SIZE];
};

struct ring {
    struct ring_setup setup;
    const char *error;          /* what the driver did wrong; NULL while all is well */

    /* Where the three parts are, as long as the DMA table is of this generation. */
    uint64_t generation;
    struct ring_descriptor *descriptors;
    struct ring_avail *avail;
    struct ring_used *used;

    uint16_t next_avail;        /* next entry of the available ring to fetch */
    uint16_t next_used;
    uint16_t seen;              /* the available ring's index when last read */
    uint16_t reported;          /* next_used when the driver was last considered for an interrupt */
    bool reported_valid;
    bool lazy;                  /* what is given back is shown by ring_publish() alone */
    bool armed;                 /* the driver may have been asked for notifications */

    uint16_t fetched_from;      /* first of the `fetched` heads that were taken ahead, modulo the ring size */
    uint16_t fetched;
    uint16_t head[RING_MAX_SIZE];

    struct packed_state packed;
};

/* One chain of descriptors, all of which are for reading or all for writing. */
struct ring_chain {
    uint16_t head;              /* of a packed ring: the buffer id */
    size_t bytes;
    unsigned int segments;
    struct iovec segment[RING_MAX_SEGMENTS + 1];    /* the last stays free: room to put a header before all */
    uint64_t iova[RING_MAX_SEGMENTS];
};

struct ring_element {
    uint16_t head;
    uint32_t written;
};

/* What both kinds of rings share: note what the driver did wrong, and add a descriptor's memory to a chain. */
bool ring_fail(struct ring *ring, const char *error);
bool ring_add_segments(struct ring *ring, struct dma_table *table, const struct ring_descriptor *from,
                       struct ring_chain *chain, bool write);
void *ring_whole(struct dma_table *table, uint64_t iova, uint64_t bytes, bool write);

/* Begin. -EINVAL: a size, an alignment or an address that no driver may use. Touches no memory. */
int ring_start(struct ring *ring, const struct ring_setup *setup);

/* Where the ring stands; heads that were fetched ahead count as fetched. */
struct ring_state ring_position(const struct ring *ring);

/* Find the ring's memory again if mappings have changed. To be called before the functions below. */
bool ring_resolve(struct ring *ring, struct dma_table *table);

/* Read the available index. Returns how many chains ring_chain_at() can look at, 0 on error too. */
unsigned int ring_available(struct ring *ring);

/*
 * Whether ring_chain_at() can look at so many chains; false on error too. Reads the available index, which costs
 * both sides a cache line, only when it has not seen enough yet.
 */
static inline bool ring_has(struct ring *ring, unsigned int count)
{
    return (uint16_t)(ring->seen - ring->next_avail) + ring->fetched >= count || ring_available(ring) >= count;
}

/* Take heads ahead of need, as many as the setup says and there are. */
void ring_prefetch(struct ring *ring);

/*
 * Look at the chain that is `ahead` places behind the next one; ahead < ring_available(). The chain
 * stays available. `write`: it must be for the device to write, else to read.
 */
bool ring_chain_at(struct ring *ring, struct dma_table *table, unsigned int ahead, bool write,
                   struct ring_chain *chain);

/*
 * Have the processor fetch what the next `count` chains will need, all at once instead of one after the other:
 * their memory as far as a small packet goes, and their used elements. count <= ring_available(). Changes
 * nothing, and judges nothing.
 */
void ring_warm(struct ring *ring, struct dma_table *table, unsigned int count, bool write);

/* Give the next `count` chains back, in order, all at once as seen by the driver. */
void ring_use(struct ring *ring, const struct ring_element *elements, unsigned int count);

/*
 * The same of the next chain alone, in registers: an element that has just been stored in two parts and is loaded in
 * one waits until all stores before it are out, those to lines of the other processor among them.
 */
void ring_use_one(struct ring *ring, uint16_t head, uint32_t written);

/* Show the driver what a lazy ring has given back. */
void ring_publish(struct ring *ring);

/* Whether the driver wants an interrupt for what was given back since this was last asked. */
bool ring_wants_interrupt(struct ring *ring);

/* Ask for a notification of new buffers. True: there are some already that ring_available() did not see. */
bool ring_arm(struct ring *ring);

/* Say that no notification is needed for now; a hint, some may come. */
void ring_disarm(struct ring *ring);

#endif
