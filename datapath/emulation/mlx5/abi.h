/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The part of the ABI of libibverbs and libmlx5 (rdma-core 44 to 64, x86-64 and arm64) that a vDPA driver uses.
 * Layouts are asserted here, for they are a promise to programs that were compiled against rdma-core's headers;
 * what those never look at is padding. The definitions are in verbs.c, devx.c, channels.c and steering.c.
 */
#ifndef MLX5_EMULATION_ABI_H
#define MLX5_EMULATION_ABI_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define EXPORT __attribute__((visibility("default")))

struct ibv_device {
    void *ops[2];
    int node_type;
    int transport_type;
    char name[64];
    char dev_name[64];
    char dev_path[256];
    char ibdev_path[256];
    uint8_t padding[8];         /* up to what rdma-core allots */
};
_Static_assert(offsetof(struct ibv_device, name) == 24, "ibv_device.name");
_Static_assert(offsetof(struct ibv_device, ibdev_path) == 408, "ibv_device.ibdev_path");

struct ibv_context {
    struct ibv_device *device;
    void *ops[32];
    int cmd_fd;
    int async_fd;
    int num_comp_vectors;
    pthread_mutex_t mutex;
    void *abi_compat;
};
_Static_assert(offsetof(struct ibv_context, cmd_fd) == 264, "ibv_context.cmd_fd");
#ifdef __x86_64__
_Static_assert(offsetof(struct ibv_context, abi_compat) == 320, "ibv_context.abi_compat");
#endif

struct ibv_pd {
    struct ibv_context *context;
    uint32_t handle;
};

struct ibv_mr {
    struct ibv_context *context;
    struct ibv_pd *pd;
    void *addr;
    size_t length;
    uint32_t handle;
    uint32_t lkey;
    uint32_t rkey;
};
_Static_assert(offsetof(struct ibv_mr, lkey) == 36, "ibv_mr.lkey");

/*
 * What lies before an ibv_context whose abi_compat is all ones; the inline functions of verbs.h look here. It grows
 * at its beginning, and `size` says how much of it there is.
 */
struct verbs_context {
    uint8_t padding_before[344];
    struct ibv_mr *(*alloc_null_mr)(struct ibv_pd *pd);
    uint8_t padding_after[288];
    size_t size;
    struct ibv_context context;
};
_Static_assert(offsetof(struct verbs_context, context) - offsetof(struct verbs_context, alloc_null_mr) == 304,
               "verbs_context.alloc_null_mr");
_Static_assert(offsetof(struct verbs_context, context) - offsetof(struct verbs_context, size) == 8,
               "verbs_context.size");
/* What rdma-core 44 has before the context. */
_Static_assert(offsetof(struct verbs_context, context) == 648, "verbs_context");

struct mlx5dv_context_attr {
    uint32_t flags;
    uint64_t comp_mask;
};
#define MLX5DV_CONTEXT_FLAGS_DEVX 1

struct mlx5dv_pd {
    uint32_t pdn;
    uint64_t comp_mask;
};

struct mlx5dv_obj {
    uint8_t others[96];
    struct {
        struct ibv_pd *in;
        struct mlx5dv_pd *out;
    } pd;
};
#define MLX5DV_OBJ_PD 0x40

struct mlx5dv_devx_umem {
    uint32_t umem_id;
};

struct mlx5dv_devx_uar {
    void *reg_addr;
    void *base_addr;
    uint32_t page_id;
    off_t mmap_off;
    uint64_t comp_mask;
};
_Static_assert(sizeof(struct mlx5dv_devx_uar) == 40, "mlx5dv_devx_uar");

struct mlx5dv_var {
    uint32_t page_id;
    uint32_t length;
    off_t mmap_off;
    uint64_t comp_mask;
};
_Static_assert(sizeof(struct mlx5dv_var) == 24, "mlx5dv_var");

struct mlx5dv_devx_event_channel {
    int fd;
};
#define MLX5DV_OMIT_EVENT_DATA 1

/* What asynchronous events are read as (struct ib_uverbs_async_event_desc), and the type of one (enum ibv_event_type). */
struct async_event {
    uint64_t element;
    uint32_t type;
    uint32_t reserved;
};
#define IBV_EVENT_DEVICE_FATAL 8

struct mlx5dv_devx_async_event_hdr {
    uint64_t cookie;
    uint8_t out_data[];
};

struct mlx5dv_flow_match_parameters {
    size_t match_sz;
    uint64_t match_buf[];
};

#define MLX5DV_DR_DOMAIN_TYPE_NIC_RX 0
#define MLX5DV_UAR_ALLOC_TYPE_BF 0
#define MLX5DV_UAR_ALLOC_TYPE_NC 1
#define IBV_FORK_UNNEEDED 2

#define IBV_ACCESS_LOCAL_WRITE 1u
#define IBV_ACCESS_RELAXED_ORDERING (1u << 20)

struct mlx5dv_devx_obj;
struct mlx5dv_dr_domain;
struct mlx5dv_dr_table;
struct mlx5dv_dr_matcher;
struct mlx5dv_dr_rule;
struct mlx5dv_dr_action;

#endif
