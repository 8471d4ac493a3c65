/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "written.h"

#include <string.h>

/* Descriptors of one chain to look at. Some drivers let an indirect chain be longer than a small ring. */
#define AT_LEAST 1024

/* Where descriptors come from: the ring's own table, or an indirect one. */
struct view {
    const struct ring_descriptor *descriptors;      /* NULL: an indirect table */
    uint64_t address;
    uint32_t entries;
};

static bool load_descriptor(struct dma_table *table, const struct view *view, uint16_t index,
                            struct ring_descriptor *out)
{
    struct ring_descriptor raw;

    if (index >= view->entries) {
        return false;
    }
    if (view->descriptors != NULL) {
        memcpy(&raw, &view->descriptors[index], sizeof(raw));
    } else if (!dma_read(table, view->address + index * sizeof(raw), &raw, sizeof(raw))) {
        return false;
    }
    /* From here on only the copy counts: keep the compiler from reading the guest's memory again. */
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    *out = (struct ring_descriptor){
        .address = le64toh(raw.address),
        .length = le32toh(raw.length),
        .flags = le16toh(raw.flags),
        .next = le16toh(raw.next),
    };
    return true;
}

void written_mark(struct dirty_log *log, struct dma_table *table, const struct ring_descriptor *descriptors,
                  uint16_t size, uint16_t head, uint32_t length)
{
    struct view view = { .descriptors = descriptors, .entries = size };
    unsigned int limit = size > AT_LEAST ? size : AT_LEAST;
    struct ring_descriptor descriptor;
    uint16_t index = head;

    for (unsigned int count = 0; length > 0 && count < limit; count++) {
        if (!load_descriptor(table, &view, index, &descriptor)) {
            return;
        }
        if (descriptor.flags & DESC_INDIRECT) {
            if (view.descriptors == NULL) {
                return;         /* within another: section 2.7.5.3.1 forbids it */
            }
            view = (struct view){ NULL, descriptor.address, descriptor.length / sizeof(descriptor) };
            index = 0;
            continue;
        }
        if (descriptor.flags & DESC_WRITE) {
            uint32_t part = descriptor.length < length ? descriptor.length : length;

            log_mark(log, descriptor.address, part);
            length -= part;
        }
        if (!(descriptor.flags & DESC_NEXT)) {
            return;
        }
        index = descriptor.next;
    }
}
