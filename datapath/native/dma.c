/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "dma.h"

#include <errno.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "log.h"

/* Index of the first map that ends behind iova; `count` if there is none. */
static size_t first_ending_behind(const struct dma_table *table, uint64_t iova)
{
    size_t low = 0, high = table->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct dma_map *map = &table->map[middle];

        if (map->iova + (map->size - 1) < iova) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static bool contains(const struct dma_map *map, uint64_t iova)
{
    return iova >= map->iova && iova - map->iova < map->size;
}

static int make_room(struct dma_table *table)
{
    size_t room = table->room ? table->room * 2 : 16;
    struct dma_map *map;

    if (table->count == DMA_MAX_MAPS) {
        return -ENOSPC;
    }
    if (table->count < table->room) {
        return 0;
    }
    map = realloc(table->map, room * sizeof(*map));
    if (map == NULL) {
        return -ENOMEM;
    }
    table->map = map;
    table->room = room;
    return 0;
}

#ifndef XFS_SUPER_MAGIC
#define XFS_SUPER_MAGIC 0x58465342
#endif
#define ZFS_SUPER_MAGIC 0x2fc12fc1

/*
 * Whether a page of the file comes within a bounded time. On FUSE or a network the first touch of a page may
 * wait for a server, for ever, and no signal ends that; a client could be that server itself. Hence those
 * that are known to read from memory or a local disk: memfd, /dev/shm and hugepages, and where libvirt keeps
 * the memory of a guest with <source type='file'/>. Not overlayfs, which anybody can put on top of FUSE.
 */
static bool is_prompt(int fd)
{
    static const unsigned int known[] = {
        TMPFS_MAGIC, HUGETLBFS_MAGIC, RAMFS_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC,
        F2FS_SUPER_MAGIC, ZFS_SUPER_MAGIC,
    };
    struct statfs status;

    if (fstatfs(fd, &status) < 0) {
        return false;
    }
    for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++) {
        if ((unsigned int)status.f_type == known[i]) {
            return true;
        }
    }
    return false;
}

/*
 * Map a part of a file, refusing pages that the file does not reach: touching them would raise SIGBUS. The last
 * page may be in the file in part: a dirty log is as long as its bits are.
 */
static int map_file(int fd, uint64_t offset, uint64_t size, bool writable, uint8_t **host)
{
    struct stat status;
    uint64_t end;
    void *address;

    if (__builtin_add_overflow(offset, size, &end) || end > INT64_MAX || offset % DMA_PAGE_SIZE != 0) {
        return -EINVAL;
    }
    if (fstat(fd, &status) < 0) {
        return -errno;
    }
    if (((uint64_t)status.st_size + DMA_PAGE_SIZE - 1) / DMA_PAGE_SIZE < end / DMA_PAGE_SIZE) {
        return -EINVAL;
    }
    if (!S_ISREG(status.st_mode) || !is_prompt(fd)) {
        return -EOPNOTSUPP;
    }
    address = mmap(NULL, size, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED | MAP_NORESERVE,
                   fd, (off_t)offset);
    if (address == MAP_FAILED) {
        return -errno;
    }
    *host = address;
    return 0;
}

/* Make room for a range and say at which index it belongs. */
static int find_place(struct dma_table *table, uint64_t iova, uint64_t size, size_t *at)
{
    uint64_t last;

    if (size == 0 || __builtin_add_overflow(iova, size - 1, &last)) {
        return -EINVAL;
    }
    *at = first_ending_behind(table, iova);
    if (*at < table->count && table->map[*at].iova <= last) {
        return -EEXIST;
    }
    return make_room(table);
}

static void put(struct dma_table *table, size_t at, struct dma_map map)
{
    memmove(&table->map[at + 1], &table->map[at], (table->count - at) * sizeof(map));
    table->map[at] = map;
    table->count++;
    table->generation++;
}

int dma_add(struct dma_table *table, uint64_t iova, uint64_t size, int fd, uint64_t offset, bool writable)
{
    struct dma_map map = { .iova = iova, .size = size, .writable = writable };
    size_t at;
    int result;

    if ((iova | size) % DMA_PAGE_SIZE != 0) {
        return -EINVAL;
    }
    result = find_place(table, iova, size, &at);
    if (result == 0 && fd >= 0) {
        result = map_file(fd, offset, size, writable, &map.host);
    }
    if (result == 0) {
        put(table, at, map);
    }
    return result;
}

int dma_borrow(struct dma_table *table, uint64_t iova, uint64_t size, void *host)
{
    struct dma_map map = { .iova = iova, .size = size, .host = host, .writable = true, .borrowed = true };
    size_t at;
    int result = find_place(table, iova, size, &at);

    if (result == 0) {
        put(table, at, map);
    }
    return result;
}

static void unmap(const struct dma_map *map)
{
    if (map->host != NULL && !map->borrowed) {
        munmap(map->host, map->size);
    }
}

int dma_remove(struct dma_table *table, uint64_t iova, uint64_t size)
{
    size_t at = first_ending_behind(table, iova);
    struct dma_map *map;

    if (at == table->count || table->map[at].iova != iova || table->map[at].size != size) {
        return -ENOENT;
    }
    map = &table->map[at];
    unmap(map);
    table->count--;
    memmove(map, map + 1, (table->count - at) * sizeof(*map));
    table->recent = 0;
    table->generation++;
    return 0;
}

void dma_remove_all(struct dma_table *table)
{
    for (size_t i = 0; i < table->count; i++) {
        unmap(&table->map[i]);
    }
    free(table->map);
    *table = (struct dma_table){ .generation = table->generation + 1 };
}

ssize_t dma_find(struct dma_table *table, uint64_t iova)
{
    size_t at = first_ending_behind(table, iova);

    if (at == table->count || !contains(&table->map[at], iova)) {
        return -1;
    }
    table->recent = at;
    return at;
}

bool dma_read(struct dma_table *table, uint64_t iova, void *to, uint64_t length)
{
    while (length > 0) {
        uint64_t part = length;
        const void *from = dma_translate(table, iova, &part, false);

        if (from == NULL) {
            return false;
        }
        memcpy(to, from, part);
        to = (uint8_t *)to + part;
        iova += part;
        length -= part;
    }
    return true;
}

void dma_mark(struct dma_table *table, const struct dma_log *log, uint64_t iova, uint64_t length)
{
    if (!log->on || length == 0) {
        return;
    }
    for (uint64_t page = iova / DMA_PAGE_SIZE; page <= (iova + length - 1) / DMA_PAGE_SIZE; page++) {
        uint64_t at = log->base + page / 8, one = 1;
        uint8_t *byte;

        if (at < log->base || at >= log->end) {
            return;
        }
        byte = dma_translate(table, at, &one, true);
        if (byte != NULL) {
            log_set(byte, (uint8_t)(1u << (page % 8)));
        }
    }
}
