/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The part of libibverbs, and of libmlx5 what belongs to it: devices, contexts, protection domains, memory regions. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "memory.h"

#define KNOWN_ACCESS (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_RELAXED_ORDERING)

static void *refused(int error)
{
    errno = error;
    return NULL;
}

EXPORT int ibv_is_fork_initialized(void)
{
    return IBV_FORK_UNNEEDED;
}

EXPORT int ibv_fork_init(void)
{
    return 0;
}

EXPORT struct ibv_device **ibv_get_device_list(int *count)
{
    struct device *device = device_get();
    struct ibv_device **list = calloc(2, sizeof(*list));
    const bool found = list != NULL && device_describe(device);

    if (found) {
        list[0] = &device->ibv;
    }
    if (count != NULL) {
        *count = found;
    }
    return list;
}

/* The devices stay: a driver may use one that it has found after this. */
EXPORT void ibv_free_device_list(struct ibv_device **list)
{
    free(list);
}

/* By a pointer in the context, never by name. */
static struct ibv_mr *alloc_null_mr(struct ibv_pd *pd);

static struct ibv_context *open_context(struct device *device)
{
    struct verbs_context *verbs;
    int result;

    pthread_mutex_lock(&device->lock);
    result = device_open(device);
    pthread_mutex_unlock(&device->lock);
    if (result < 0) {
        return refused(-result);
    }
    verbs = device->context;
    verbs->alloc_null_mr = alloc_null_mr;
    verbs->size = sizeof(*verbs);
    verbs->context.device = &device->ibv;
    verbs->context.cmd_fd = device->memory_fd;
    verbs->context.async_fd = device->async_fd[0];
    verbs->context.num_comp_vectors = 1;
    verbs->context.abi_compat = (void *)UINTPTR_MAX;
    pthread_mutex_init(&verbs->context.mutex, NULL);
    return &verbs->context;
}

EXPORT struct ibv_context *mlx5dv_open_device(struct ibv_device *abi, struct mlx5dv_context_attr *attributes)
{
    struct device *device = device_get();

    if (abi != &device->ibv || attributes->flags != MLX5DV_CONTEXT_FLAGS_DEVX ||
        attributes->comp_mask != 0) {
        return refused(EINVAL);
    }
    return open_context(device);
}

/* In this process nobody else has opened the device, whose descriptor this would be: it is opened here. */
EXPORT struct ibv_context *ibv_import_device(int cmd_fd)
{
    struct device *device = device_get();

    return cmd_fd < 0 || !device_describe(device) ? refused(EINVAL) : open_context(device);
}

EXPORT int ibv_close_device(struct ibv_context *context)
{
    struct device *device = device_of(context);

    pthread_mutex_lock(&device->lock);
    device_close(device);
    pthread_mutex_unlock(&device->lock);
    return 0;
}

EXPORT int mlx5dv_set_context_attr(struct ibv_context *context, int type, void *attributes)
{
    (void)context;
    (void)type;
    (void)attributes;
    return 0;
}

/* --- protection domains --- */

EXPORT struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
    struct device *device = device_of(context);
    uint8_t status = command_begin(device);
    struct pd *pd = status == PRM_STATUS_OK ? object_new(device, KIND_PD, sizeof(*pd))
                                            : refused(status_to_errno(status));

    if (pd != NULL) {
        pd->abi = (struct ibv_pd){ context, pd->object.id };
    }
    command_end(device);
    return pd != NULL ? &pd->abi : NULL;
}

static int free_object(struct device *device, struct object *object)
{
    uint8_t status = command_begin(device);

    if (status == PRM_STATUS_OK && object_free(device, object) != PRM_STATUS_OK) {
        status = PRM_STATUS_RESOURCE_BUSY;
    }
    command_end(device);
    return status_to_errno(status);
}

EXPORT int ibv_dealloc_pd(struct ibv_pd *pd)
{
    return free_object(device_of(pd->context), &container_of(pd, struct pd, abi)->object);
}

/* As with the device: whatever the number, the domain is made here. */
EXPORT struct ibv_pd *ibv_import_pd(struct ibv_context *context, uint32_t handle)
{
    struct ibv_pd *pd = ibv_alloc_pd(context);

    if (pd != NULL) {
        pd->handle = handle;
    }
    return pd;
}

EXPORT void ibv_unimport_pd(struct ibv_pd *pd)
{
    ibv_dealloc_pd(pd);
}

EXPORT int mlx5dv_init_obj(struct mlx5dv_obj *object, uint64_t type)
{
    if (type != MLX5DV_OBJ_PD) {
        return EOPNOTSUPP;
    }
    object->pd.out->pdn = container_of(object->pd.in, struct pd, abi)->object.id;
    return 0;
}

/* --- memory regions --- */

/* A region, or with no address one that nothing can be reached by. */
static struct ibv_mr *new_mr(struct ibv_pd *pd, void *address, size_t size, uint64_t iova)
{
    struct device *device = device_of(pd->context);
    uint8_t status = command_begin(device);
    struct mr *mr = status == PRM_STATUS_OK ? object_new(device, KIND_MR, sizeof(*mr))
                                            : refused(status_to_errno(status));

    if (mr != NULL && !object_use(&mr->object, &container_of(pd, struct pd, abi)->object)) {
        object_free(device, &mr->object);
        mr = refused(ENOMEM);
    }
    if (mr != NULL) {
        const uint32_t key = mr->object.id << 8;

        mr->abi = (struct ibv_mr){ pd->context, pd, address, size, mr->object.id, key, key };
        mr->iova = iova;
    }
    command_end(device);
    return mr != NULL ? &mr->abi : NULL;
}

EXPORT struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *address, size_t size, uint64_t iova,
                                       unsigned int access)
{
    if (address == NULL || size == 0 || iova + size < iova || (access & ~KNOWN_ACCESS) != 0) {
        return refused(EINVAL);
    }
    return new_mr(pd, address, size, iova);
}

static struct ibv_mr *alloc_null_mr(struct ibv_pd *pd)
{
    return new_mr(pd, NULL, SIZE_MAX, 0);
}

EXPORT int ibv_dereg_mr(struct ibv_mr *mr)
{
    return free_object(device_of(mr->context), &container_of(mr, struct mr, abi)->object);
}

/* For tests: kill the firmware of the device that is open. */
EXPORT void mlx5_emulation_die(int hangs)
{
    struct device *device = device_get();

    pthread_mutex_lock(&device->lock);
    if (device->context != NULL) {
        device_die(device, hangs != 0);
    }
    pthread_mutex_unlock(&device->lock);
}
