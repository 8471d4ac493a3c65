/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "relay_ours.h"

#include <stdlib.h>
#include <string.h>

#include "guard.h"
#include "shadow.h"
#include "used_entries.h"

struct ours {
    struct ours_guest guest;
    struct dma_table table;
    struct dirty_log log;
    struct shadow *shadow;
    struct ring_avail *avail;           /* the guest's */
    struct ring_avail *private_avail;
    struct ring_used *private_used;
    unsigned int carried;               /* by the last turn */
};

struct ours *ours_begin(const struct ours_guest *guest)
{
    struct ours *ours = calloc(1, sizeof(*ours));
    struct shadow_setup setup;

    if (ours == NULL) {
        return NULL;
    }
    ours->guest = *guest;
    ours->avail = (struct ring_avail *)((uint8_t *)guest->memory + guest->avail);
    ours->private_avail = calloc(1, avail_bytes(guest->size));
    ours->private_used = calloc(1, used_bytes(guest->size));
    setup = (struct shadow_setup){
        .size = guest->size,
        .descriptors = guest->descriptors,
        .avail = guest->avail,
        .used = guest->used,
        .private_avail = ours->private_avail,
        .private_used = ours->private_used,
    };
    if (guard_install() < 0 || dma_borrow(&ours->table, 0, guest->memory_size, guest->memory) < 0 ||
        shadow_new(&setup, &ours->shadow) < 0) {
        ours_end(ours);
        return NULL;
    }
    return ours;
}

void ours_end(struct ours *ours)
{
    shadow_free(ours->shadow);
    dma_remove_all(&ours->table);
    free(ours->private_avail);
    free(ours->private_used);
    free(ours);
}

/* A turn of the relay's thread, as far as used entries go. */
static void turn(void *argument)
{
    struct ours *ours = argument;

    ours->carried = 0;
    if (shadow_resolve(ours->shadow, &ours->table)) {
        ours->carried = shadow_complete(ours->shadow, &ours->table, &ours->log);
    }
    log_flush(&ours->log);
}

/* Turns until what the device has completed is carried over. */
static bool carry(struct ours *ours, uint16_t batch)
{
    for (uint16_t done = 0; done < batch; done += ours->carried) {
        if (!guard_run(turn, ours) || ours->carried == 0) {
            return false;
        }
    }
    return true;
}

/* Give the device all buffers, which the guest has made available. */
static const char *offer(struct ours *ours)
{
    uint16_t given = 0;

    if (!shadow_resolve(ours->shadow, &ours->table)) {
        return shadow_position(ours->shadow).error;
    }
    while (given < ours->guest.size) {
        unsigned int count = shadow_give(ours->shadow);

        if (count == 0) {
            return shadow_position(ours->shadow).error ?: "not all buffers were given to the device";
        }
        given += count;
    }
    return NULL;
}

const char *ours_relay(struct ours *ours, uint32_t length, uint16_t batch, uint8_t *log, size_t log_size,
                       double *times, int count)
{
    uint16_t size = ours->guest.size;
    volatile uint16_t *index = &ours->private_used->index;

    for (uint16_t n = 0; n < size; n++) {
        ours->private_used->ring[n] = (struct ring_used_element){.id = n, .length = length};
    }
    ours->log = (struct dirty_log){.bitmap = log, .bytes = log_size};
    for (int n = 0; n < count; n++) {
        const char *error = offer(ours);
        double begin;

        if (error != NULL) {
            return error;
        }
        if (log != NULL) {
            memset(log, 0, log_size);
        }
        begin = nanoseconds();
        for (uint16_t done = 0; done < size; done += batch) {
            *index += batch;
            if (!carry(ours, batch)) {
                return shadow_position(ours->shadow).error ?: "less was carried over than was completed";
            }
        }
        times[n] = (nanoseconds() - begin) / size;
        /* Make the same heads available again: the guest's ring still names them. */
        ours->avail->index += size;
    }
    return NULL;
}
