/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "written.h"

/* Descriptors of one chain to look at. Some drivers let an indirect chain be longer than a small ring. */
#define AT_LEAST 1024

/* Where descriptors come from: the ring's own table, or an indirect one. */
struct view {
    const struct ring_descriptor *descriptors;      /* NULL: an indirect table */
    uint64_t address;
    uint32_t entries;
};

/* A descriptor in the guest's memory, or a copy of it. NULL: there is none. */
static const struct ring_descriptor *find(struct dma_table *table, const struct view *view, uint16_t index,
                                          struct ring_descriptor *copy)
{
    if (index >= view->entries) {
        return NULL;
    }
    if (view->descriptors != NULL) {
        return &view->descriptors[index];
    }
    return dma_read(table, view->address + index * sizeof(*copy), copy, sizeof(*copy)) ? copy : NULL;
}

void written_mark(struct dirty_log *log, struct dma_table *table, const struct ring_descriptor *descriptors,
                  uint16_t size, uint16_t head, uint32_t length)
{
    struct view view = { .descriptors = descriptors, .entries = size };
    unsigned int limit = size > AT_LEAST ? size : AT_LEAST;
    uint16_t index = head;

    for (unsigned int count = 0; length > 0 && count < limit; count++) {
        struct ring_descriptor copy;
        const struct ring_descriptor *descriptor = find(table, &view, index, &copy);
        uint16_t flags;

        if (descriptor == NULL) {
            return;
        }
        flags = load16(&descriptor->flags);
        if (flags & DESC_INDIRECT) {
            if (view.descriptors == NULL) {
                return;         /* within another: section 2.7.5.3.1 forbids it */
            }
            view = (struct view){
                NULL, load64(&descriptor->address), load32(&descriptor->length) / sizeof(copy),
            };
            index = 0;
            continue;
        }
        if (flags & DESC_WRITE) {
            uint32_t all = load32(&descriptor->length), part = all < length ? all : length;

            log_mark(log, load64(&descriptor->address), part);
            length -= part;
        }
        if (!(flags & DESC_NEXT)) {
            return;
        }
        index = load16(&descriptor->next);
    }
}
