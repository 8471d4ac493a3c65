/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The part of libmlx5 that is DevX: mailboxes, UMEMs, pages of doorbells. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>

#include "bell.h"
#include "channels.h"
#include "commands.h"
#include "memory.h"
#include "queues.h"

/* The device's only event queue that completions can go to. */
#define EQN 1

static void *refused(int error)
{
    errno = error;
    return NULL;
}

/* Execute a mailbox about `object`, or about none; *created is what it has made. */
static int run(struct device *device, enum command_verb verb, struct object *object, const void *in, size_t in_size,
               void *out, size_t out_size, struct object **created)
{
    struct command command = {
        .device = device, .in = in, .in_size = in_size, .out = out, .out_size = out_size, .object = object,
    };
    uint8_t status = command_begin(device);
    int result;

    if (status == PRM_STATUS_OK) {
        result = command_execute(&command, verb);
    } else {
        result = status_to_errno(status);
        if (out_size >= PRM_COMMAND_OUT_SIZE) {
            prm_set(out, PRM_COMMAND_OUT_STATUS, status);
            prm_set(out, PRM_COMMAND_OUT_SYNDROME, SYNDROME_INJECTED);
        }
    }
    if (created != NULL) {
        *created = result == 0 ? command.object : NULL;
    }
    command_end(device);
    return result;
}

EXPORT int mlx5dv_devx_general_cmd(struct ibv_context *context, const void *in, size_t in_size, void *out,
                                   size_t out_size)
{
    return run(device_of(context), VERB_GENERAL, NULL, in, in_size, out, out_size, NULL);
}

EXPORT struct mlx5dv_devx_obj *mlx5dv_devx_obj_create(struct ibv_context *context, const void *in, size_t in_size,
                                                      void *out, size_t out_size)
{
    struct object *created;
    int result = run(device_of(context), VERB_CREATE, NULL, in, in_size, out, out_size, &created);

    return result == 0 ? (struct mlx5dv_devx_obj *)created : refused(result);
}

EXPORT int mlx5dv_devx_obj_modify(struct mlx5dv_devx_obj *object, const void *in, size_t in_size, void *out,
                                  size_t out_size)
{
    return run(device_get(), VERB_MODIFY, (struct object *)object, in, in_size, out, out_size, NULL);
}

EXPORT int mlx5dv_devx_obj_query(struct mlx5dv_devx_obj *object, const void *in, size_t in_size, void *out,
                                 size_t out_size)
{
    return run(device_get(), VERB_QUERY, (struct object *)object, in, in_size, out, out_size, NULL);
}

static uint8_t destroy(struct device *device, struct object *object)
{
    if (object->users > 0) {
        return PRM_STATUS_BAD_RESOURCE_STATE;
    }
    if (object->kind == KIND_VIRTQ) {
        queues_forget(device, (struct virtq *)object);
    }
    channels_forget(device, object);
    return object_free(device, object);
}

EXPORT int mlx5dv_devx_obj_destroy(struct mlx5dv_devx_obj *abi)
{
    struct device *device = device_get();
    uint8_t status = command_begin(device);

    if (status == PRM_STATUS_OK) {
        status = destroy(device, (struct object *)abi);
    }
    command_end(device);
    return status_to_errno(status);
}

EXPORT int mlx5dv_devx_query_eqn(struct ibv_context *context, uint32_t vector, uint32_t *eqn)
{
    if (vector >= (uint32_t)context->num_comp_vectors) {
        return EINVAL;
    }
    *eqn = EQN;
    return 0;
}

/* --- UMEMs --- */

EXPORT struct mlx5dv_devx_umem *mlx5dv_devx_umem_reg(struct ibv_context *context, void *address, size_t size,
                                                     uint32_t access)
{
    struct device *device = device_of(context);
    uint8_t status;
    struct umem *umem;

    if (address == NULL || size == 0 || (access & ~IBV_ACCESS_LOCAL_WRITE) != 0) {
        return refused(EINVAL);
    }
    status = command_begin(device);
    umem = status == PRM_STATUS_OK ? object_new(device, KIND_UMEM, sizeof(*umem)) : refused(status_to_errno(status));
    if (umem != NULL) {
        umem->abi.umem_id = umem->object.id;
        umem->address = address;
        umem->size = size;
    }
    command_end(device);
    return umem != NULL ? &umem->abi : NULL;
}

EXPORT int mlx5dv_devx_umem_dereg(struct mlx5dv_devx_umem *abi)
{
    struct device *device = device_get();
    uint8_t status = command_begin(device);

    if (status == PRM_STATUS_OK) {
        status = object_free(device, &container_of(abi, struct umem, abi)->object);
    }
    command_end(device);
    return status_to_errno(status);
}

/* --- pages of doorbells --- */

/* A page of the device's memory, which costs a command; -1 with errno. */
static int take_page(struct device *device)
{
    uint8_t status = command_begin(device);
    int page = status == PRM_STATUS_OK ? device_take_page(device) : -1;

    command_end(device);
    if (page < 0) {
        errno = status == PRM_STATUS_OK ? ENOSPC : status_to_errno(status);
    }
    return page;
}

static void free_page(struct device *device, unsigned int page)
{
    pthread_mutex_lock(&device->lock);
    bell_take_down(device, page);
    device_free_page(device, page);
    pthread_mutex_unlock(&device->lock);
}

EXPORT struct mlx5dv_var *mlx5dv_alloc_var(struct ibv_context *context, uint32_t flags)
{
    struct device *device = device_of(context);
    struct mlx5dv_var *var;
    int page;

    if (flags != 0) {
        return refused(EOPNOTSUPP);
    }
    page = take_page(device);
    var = page < 0 ? NULL : calloc(1, sizeof(*var));
    if (var == NULL) {
        return NULL;
    }
    pthread_mutex_lock(&device->lock);
    bell_hang(device, page);
    pthread_mutex_unlock(&device->lock);
    *var = (struct mlx5dv_var){ .page_id = page, .length = PAGE_SIZE, .mmap_off = (off_t)page * PAGE_SIZE };
    return var;
}

EXPORT void mlx5dv_free_var(struct mlx5dv_var *var)
{
    free_page(device_get(), var->page_id);
    free(var);
}

EXPORT struct mlx5dv_devx_uar *mlx5dv_devx_alloc_uar(struct ibv_context *context, uint32_t type)
{
    struct device *device = device_of(context);
    struct mlx5dv_devx_uar *uar;
    int page;

    if (type != MLX5DV_UAR_ALLOC_TYPE_BF && type != MLX5DV_UAR_ALLOC_TYPE_NC) {
        return refused(EOPNOTSUPP);
    }
    page = take_page(device);
    uar = page < 0 ? NULL : calloc(1, sizeof(*uar));
    if (uar != NULL) {
        uint8_t *base = device->memory + page * PAGE_SIZE;

        /* Doorbells of a QP that sends, of which there is none, begin at the half of the page. */
        *uar = (struct mlx5dv_devx_uar){
            .reg_addr = base + PAGE_SIZE / 2, .base_addr = base, .page_id = page, .mmap_off = (off_t)page * PAGE_SIZE,
        };
    }
    return uar;
}

EXPORT void mlx5dv_devx_free_uar(struct mlx5dv_devx_uar *uar)
{
    free_page(device_get(), uar->page_id);
    free(uar);
}
