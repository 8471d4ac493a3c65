/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The shadow of one split virtqueue (virtio 1.3 section 2.7): a private available and used ring that a
 * device works on, together with the guest's own descriptor table. Towards the guest this is the device,
 * towards the device the driver: heads are copied one way, used entries the other, and each side's wish for
 * notifications is heard, and ours told. The private rings begin at 0, the guest's wherever they are.
 *
 * A device that is given the rings so does not begin where the guest's descriptor table does, as IN_ORDER has it
 * (section 2.7.14), so it is never asked for it. A guest that was promised the order gets it here.
 *
 * It trusts nothing that stands in either pair of rings: what breaks a rule ends in `error`, and what the
 * device completed without having been given it never reaches the guest.
 *
 * Plain data without thread or lock. Everything but the first four functions touches memory that others
 * share and so runs under guard_run(). Those that take a log leave log_flush() to the caller, but for the
 * buffers of shadow_complete(), which are in the log before the guest sees them. One of them that was left in
 * the middle may be called again if the log was lost (log_lose()), otherwise the ring is lost.
 */
#ifndef LIBVIRT_VDPA_SHADOW_H
#define LIBVIRT_VDPA_SHADOW_H

#include <stdbool.h>
#include <stdint.h>

#include "dma.h"
#include "log.h"
#include "split.h"

/* cffi: begin */
struct shadow_setup {
    uint16_t size;              /* descriptors, a power of two up to 32768 */
    bool event_idx;             /* negotiated, on both sides */
    bool in_order;              /* by the guest alone: completions that come too early wait for those before */
    uint64_t descriptors;       /* guest physical addresses of the guest's ring */
    uint64_t avail;
    uint64_t used;
    uint16_t index;             /* where to begin in both of the guest's rings: its used index */
    void *private_avail;        /* in this process; zeroed */
    void *private_used;
};

/* Where it stands; the indices are the guest's. */
struct shadow_state {
    uint16_t avail;             /* next head to take */
    uint16_t used;              /* next used entry to write */
    uint16_t in_flight;         /* heads that the device has */
    const char *error;          /* what the guest or the device did wrong; NULL while all is well */
};
/* cffi: end */

/* Entries that one call moves at most, so that nobody waits long for a busy ring. */
#define SHADOW_BATCH 64

struct shadow {
    struct shadow_setup setup;
    const char *error;

    /* The guest's ring in this process, as long as the DMA table is of this generation. */
    uint64_t generation;
    const struct ring_descriptor *descriptors;
    struct ring_avail *avail;
    struct ring_used *used;
    /* The device's. */
    struct ring_avail *private_avail;
    struct ring_used *private_used;

    /* The guest's indices, and ours on the private rings. */
    uint16_t next_avail;
    uint16_t next_used;
    uint16_t given;             /* private available index: heads that the device was given */
    uint16_t completed;         /* private used index: those that it gave back */

    uint16_t rung;              /* `given` when the device was last considered for a notification */
    uint16_t reported;          /* `next_used` when the guest was last considered for an interrupt */
    bool reported_valid;
    bool guest_armed;           /* the guest may have been asked for notifications */
    bool device_armed;

    /* Completions that have been taken from the device and not yet passed on. */
    unsigned int waiting;
    struct { uint16_t head; uint32_t length; } batch[SHADOW_BATCH];

    struct shadow_buffer {
        bool outstanding;       /* by head: the device has it, or */
        bool done;              /* has completed it, but not yet one before it (in_order) */
        uint32_t length;        /* as the device said when it was done */
        uint16_t head;          /* by place in the guest's available ring: what was taken from there */
    } buffer[];
};

/* -EINVAL: a size, an alignment or an address that cannot be. Touches no shared memory. */
int shadow_new(const struct shadow_setup *setup, struct shadow **shadow);
void shadow_free(struct shadow *shadow);

struct shadow_state shadow_position(const struct shadow *shadow);

/* Break the ring, unless it is broken already. Returns false. */
bool shadow_fail(struct shadow *shadow, const char *error);

/* Find the guest's ring again if mappings have changed. To be called before the functions below. */
bool shadow_resolve(struct shadow *shadow, struct dma_table *table);

/* Carry completions over, a batch at most; mark what the device and this have written. How many. */
unsigned int shadow_complete(struct shadow *shadow, struct dma_table *table, struct dirty_log *log);

/* Give the device heads, a batch at most. How many. */
unsigned int shadow_give(struct shadow *shadow);

/* Whether the device wants to hear of what it was given, or the guest of what was completed, since last asked. */
bool shadow_wants_doorbell(struct shadow *shadow);
bool shadow_wants_interrupt(struct shadow *shadow);

/* Say to both sides that no notification is needed for now; a hint, some may come. */
void shadow_disarm(struct shadow *shadow, struct dirty_log *log);

/*
 * Ask for notifications: of the device always, of the guest where `heads` is set. True: there is something
 * already that the calls before did not see.
 */
bool shadow_arm(struct shadow *shadow, struct dirty_log *log, bool heads);

/*
 * Leave the guest's ring to whoever serves it next, from next_used on: with notifications wanted. An error
 * where the device has completed out of order, so that the heads that it has are not those that come next.
 */
void shadow_leave(struct shadow *shadow, struct dirty_log *log);

#endif
