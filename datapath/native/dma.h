/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A device's memory by IOVA: for an emulated device what its client mapped, and where the dirty log is; for
 * a relay what the front-end shares. Plain data without a lock; the owner's mutex guards it. Whoever
 * touches memory that was translated here does so under guard_run(), for the file behind it may shrink.
 */
#ifndef LIBVIRT_VDPA_DMA_H
#define LIBVIRT_VDPA_DMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* cffi: begin */
/*
 * Mappings that one device may have, as announced in VERSION (max_dma_maps). Linux allows a process 65530
 * (vm.max_map_count), which the VFs of a NIC share.
 */
#define DMA_MAX_MAPS 1000
/* cffi: end */

/* Alignment of mappings, as announced in VERSION (pgsizes), and the unit of the dirty log. */
#define DMA_PAGE_SIZE 4096

struct dma_map {
    uint64_t iova;
    uint64_t size;
    uint8_t *host;              /* NULL: no descriptor came along, so the device cannot reach it */
    bool writable;
    bool borrowed;              /* somebody else unmaps it */
};

struct dma_table {
    struct dma_map *map;        /* sorted by iova, without overlap */
    size_t count;
    size_t room;
    size_t recent;              /* the map that was found last: most likely the next as well */
    uint64_t generation;        /* changes with every change of the table */
};

/* Bit n of the bitmap at `base` says that page n was written; bytes from `end` on do not exist. */
struct dma_log {
    bool on;
    uint64_t base;
    uint64_t end;
};

/*
 * Map `size` bytes of fd from `offset` on; the fd may be closed afterwards. fd -1 only keeps the range.
 * -EINVAL: empty, unaligned, wraps, or of pages beyond the file's end. -EEXIST: overlaps. -ENOSPC: too many.
 * -EOPNOTSUPP: a file whose pages may not come.
 */
int dma_add(struct dma_table *table, uint64_t iova, uint64_t size, int fd, uint64_t offset, bool writable);

/* The same with memory that is mapped here already, and stays so until it is removed. No alignment needed. */
int dma_borrow(struct dma_table *table, uint64_t iova, uint64_t size, void *host);

/* Drop a mapping, exactly as it was made. -ENOENT: there is none. */
int dma_remove(struct dma_table *table, uint64_t iova, uint64_t size);

void dma_remove_all(struct dma_table *table);

/* Where a map is that holds iova; -1: nowhere. Remembers it as the most likely one. */
ssize_t dma_find(struct dma_table *table, uint64_t iova);

/*
 * Where `*length` bytes at iova are. Shortens *length at the end of the mapping; the rest may be in
 * another. NULL: not mapped, or not writable though that is what is wanted. Here, for it is what the engine does
 * most.
 */
static inline void *dma_translate(struct dma_table *table, uint64_t iova, uint64_t *length, bool write)
{
    const struct dma_map *map = &table->map[table->recent];
    uint64_t into;

    if (table->recent >= table->count || iova - map->iova >= map->size) {
        ssize_t at = dma_find(table, iova);

        if (at < 0) {
            return NULL;
        }
        map = &table->map[at];
    }
    into = iova - map->iova;
    if (map->host == NULL || (write && !map->writable)) {
        return NULL;
    }
    if (*length > map->size - into) {
        *length = map->size - into;
    }
    return map->host + into;
}

/* Copy from memory that may span mappings. False: not all of it is mapped. */
bool dma_read(struct dma_table *table, uint64_t iova, void *to, uint64_t length);

/* Mark written pages. What lies beyond the log, or where the log is not mapped, is passed over. */
void dma_mark(struct dma_table *table, const struct dma_log *log, uint64_t iova, uint64_t length);

#endif
