/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a driver lets the device reach: memory regions, UMEMs, and the keys by which queues do. */
#ifndef MLX5_EMULATION_MEMORY_H
#define MLX5_EMULATION_MEMORY_H

#include "commands.h"
#include "device.h"

struct pd {
    struct object object;
    struct ibv_pd abi;
};

struct mr {
    struct object object;
    struct ibv_mr abi;          /* its address is NULL when it is a null one: nothing can be reached by it */
    uint64_t iova;
};

struct umem {
    struct object object;
    struct mlx5dv_devx_umem abi;
    uint8_t *address;
    size_t size;
};

/* A piece of what a key reaches. */
struct piece {
    uint64_t iova;
    uint64_t size;
    uint8_t *host;
};

struct mkey {
    struct object object;
    uint32_t key;               /* object.id << 8, and a byte that the driver has chosen */
    uint64_t start;
    uint64_t length;
    unsigned int pieces;        /* sorted, without overlap; neighbours of one are joined. What is between is a gap */
    struct piece piece[];
};

uint8_t memory_create_mkey(struct command *command);

struct object *memory_pd(struct device *device, uint32_t id);

/* The indirect or direct key of a number; NULL: there is none. */
struct mkey *memory_mkey(struct device *device, uint32_t key);

/* Where `size` bytes from an address on are, in one piece; NULL: not reached. */
uint8_t *memory_at(const struct mkey *mkey, uint64_t address, uint64_t size);

/* Bytes of a UMEM; NULL: there is no such UMEM, or it ends before. *object: the UMEM. */
uint8_t *memory_umem(struct device *device, uint32_t id, uint64_t offset, uint64_t size, struct object **object);

#endif
