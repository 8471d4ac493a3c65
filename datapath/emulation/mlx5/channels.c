/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "channels.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Bytes of an event queue's entry, which follows the cookie where it is not left out. */
#define ENTRY_SIZE 64

struct channel {
    struct mlx5dv_devx_event_channel abi;   /* the driver's end */
    int device_fd;
    bool cookies_only;
};

struct subscription {
    struct subscription *next;
    struct channel *channel;
    const struct object *object;
    uint16_t event;
    uint64_t cookie;
};

void channels_raise(struct device *device, const struct object *object, uint16_t event)
{
    for (struct subscription *it = device->subscriptions; it != NULL; it = it->next) {
        uint8_t message[sizeof(it->cookie) + ENTRY_SIZE] = { 0 };

        if (it->object == object && it->event == event) {
            memcpy(message, &it->cookie, sizeof(it->cookie));
            /* One that does not fit is lost, as where the kernel has no memory for it. */
            send(it->channel->device_fd, message, it->channel->cookies_only ? sizeof(it->cookie) : sizeof(message),
                 MSG_DONTWAIT | MSG_NOSIGNAL);
        }
    }
}

/* End the subscriptions that are of a channel or to an object. */
static void unsubscribe(struct device *device, const struct channel *channel, const struct object *object)
{
    struct subscription **at = &device->subscriptions;

    while (*at != NULL) {
        struct subscription *it = *at;

        if (it->channel == channel || it->object == object) {
            *at = it->next;
            free(it);
        } else {
            at = &it->next;
        }
    }
}

void channels_forget(struct device *device, const struct object *object)
{
    unsubscribe(device, NULL, object);
}

void channels_close(struct device *device)
{
    while (device->subscriptions != NULL) {
        unsubscribe(device, NULL, device->subscriptions->object);
    }
}

EXPORT struct mlx5dv_devx_event_channel *mlx5dv_devx_create_event_channel(struct ibv_context *context, int flags)
{
    struct channel *channel = calloc(1, sizeof(*channel));
    int ends[2];

    (void)context;
    if (channel == NULL) {
        return NULL;
    }
    /* One read, one event: hence packets. */
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) {
        free(channel);
        return NULL;
    }
    channel->abi.fd = ends[0];
    channel->device_fd = ends[1];
    channel->cookies_only = flags & MLX5DV_OMIT_EVENT_DATA;
    return &channel->abi;
}

EXPORT void mlx5dv_devx_destroy_event_channel(struct mlx5dv_devx_event_channel *abi)
{
    struct channel *channel = (struct channel *)abi;
    struct device *device = device_get();

    pthread_mutex_lock(&device->lock);
    unsubscribe(device, channel, NULL);
    pthread_mutex_unlock(&device->lock);
    close(channel->abi.fd);
    close(channel->device_fd);
    free(channel);
}

static bool raises(const struct object *object, uint16_t event)
{
    return (object->kind == KIND_CQ && event == PRM_EVENT_COMPLETION) ||
           (object->kind == KIND_VIRTQ && event == PRM_EVENT_OBJECT_CHANGE);
}

static int subscribe(struct device *device, struct channel *channel, struct object *object, uint16_t event,
                     uint64_t cookie)
{
    struct subscription *made;

    if (!raises(object, event)) {
        return EINVAL;
    }
    made = calloc(1, sizeof(*made));
    if (made == NULL) {
        return ENOMEM;
    }
    *made = (struct subscription){ device->subscriptions, channel, object, event, cookie };
    device->subscriptions = made;
    return 0;
}

EXPORT int mlx5dv_devx_subscribe_devx_event(struct mlx5dv_devx_event_channel *channel, struct mlx5dv_devx_obj *object,
                                            uint16_t size, uint16_t events[], uint64_t cookie)
{
    struct device *device = device_get();
    int result = object == NULL || size % sizeof(*events) != 0 ? EINVAL : 0;

    pthread_mutex_lock(&device->lock);
    for (unsigned int i = 0; result == 0 && i < size / sizeof(*events); i++) {
        result = subscribe(device, (struct channel *)channel, (struct object *)object, events[i], cookie);
    }
    pthread_mutex_unlock(&device->lock);
    return result;
}

/* A thread may be cancelled here: it holds nothing. */
EXPORT ssize_t mlx5dv_devx_get_event(struct mlx5dv_devx_event_channel *channel,
                                     struct mlx5dv_devx_async_event_hdr *event, size_t size)
{
    return read(channel->fd, event, size);
}
