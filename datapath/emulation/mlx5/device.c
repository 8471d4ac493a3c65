/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "channels.h"
#include "queues.h"
#include "steering.h"
#include "tap.h"

struct device *device_get(void)
{
    static struct device device = {
        .lock = PTHREAD_MUTEX_INITIALIZER, .memory_fd = -1,
        .async_fd = { -1, -1 },
    };

    return &device;
}

static bool describe(struct device *device)
{
    struct ibv_device *ibv = &device->ibv;

    if (device->context != NULL) {
        return true;
    }
    if (!options_read(&device->options)) {
        return false;
    }
    ibv->node_type = 1;         /* IBV_NODE_CA */
    snprintf(ibv->name, sizeof(ibv->name), "%s", device->options.name);
    snprintf(ibv->dev_name, sizeof(ibv->dev_name), "uverbs0");
    snprintf(ibv->dev_path, sizeof(ibv->dev_path), "/dev/infiniband/uverbs0");
    memcpy(ibv->ibdev_path, device->options.ibdev_path, sizeof(ibv->ibdev_path));
    return true;
}

bool device_describe(struct device *device)
{
    bool known;

    pthread_mutex_lock(&device->lock);
    known = describe(device);
    pthread_mutex_unlock(&device->lock);
    return known;
}

static int map_memory(struct device *device)
{
    const size_t size = DEVICE_PAGES * PAGE_SIZE;

    device->memory_fd = memfd_create("mlx5-device", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (device->memory_fd < 0 || ftruncate(device->memory_fd, size) < 0 ||
        fcntl(device->memory_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
        return -errno;
    }
    device->memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, device->memory_fd, 0);
    if (device->memory == MAP_FAILED) {
        device->memory = NULL;
        return -errno;
    }
    memset(device->page_taken, 0, sizeof(device->page_taken));
    device->page_taken[0] = true;
    return 0;
}

static void unmap_memory(struct device *device)
{
    if (device->memory != NULL) {
        munmap(device->memory, DEVICE_PAGES * PAGE_SIZE);
    }
    if (device->memory_fd >= 0) {
        close(device->memory_fd);
    }
    device->memory = NULL;
    device->memory_fd = -1;
}

/* The kernel's end of a context's asynchronous events, of which each is read whole. */
static int open_events(struct device *device)
{
    return socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, device->async_fd) < 0 ? -errno : 0;
}

static void close_events(struct device *device)
{
    for (unsigned int i = 0; i < 2; i++) {
        if (device->async_fd[i] >= 0) {
            close(device->async_fd[i]);
        }
        device->async_fd[i] = -1;
    }
}

static int open_wire(struct device *device)
{
    const struct options *options = &device->options;
    struct wire *wire = &device->wire;
    int result;

    *wire = (struct wire){ .count = options->uplinks, .header = options->header };
    memcpy(wire->fd, options->uplink, sizeof(wire->fd));
    if (options->tap[0] == '\0') {
        return 0;
    }
    result = tap_open(options->tap, options->bridge, options->mtu, options->pairs, wire->fd);
    if (result == 0) {
        wire->tap = wire->header = true;
        wire->count = options->pairs;
    }
    return result;
}

static void close_wire(struct device *device)
{
    for (unsigned int i = 0; device->wire.tap && i < device->wire.count; i++) {
        close(device->wire.fd[i]);
    }
    device->wire = (struct wire){ 0 };
}

int device_open(struct device *device)
{
    int result;

    if (device->context != NULL) {
        return -EBUSY;
    }
    device->died = device->hangs = false;
    result = open_wire(device);
    if (result == 0) {
        result = open_events(device);
    }
    if (result == 0) {
        result = map_memory(device);
    }
    if (result == 0) {
        result = queues_open(device);
    }
    if (result == 0) {
        device->context = calloc(1, sizeof(*device->context));
        result = device->context == NULL ? -ENOMEM : 0;
    }
    if (result < 0) {
        device_close(device);
        return result;
    }
    device->commands = 0;
    return 0;
}

void device_close(struct device *device)
{
    queues_close(device);
    steering_close(device);
    channels_close(device);
    while (device->objects != NULL) {
        struct object *object = device->objects;

        device->objects = object->next;
        free(object->used);
        free(object);
    }
    unmap_memory(device);
    close_events(device);
    close_wire(device);
    free(device->context);
    device->context = NULL;
}

static int64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void sleep_until(int64_t ns)
{
    const struct timespec when = { ns / 1000000000, ns % 1000000000 };

    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL) == EINTR) {
    }
}

/*
 * Give a command to the slot that is free first; when it is done. Firmware takes the next command of its queue by
 * itself, so whether a driver's thread is slow to wake up does not matter.
 */
static int64_t take_slot(struct device *device)
{
    int64_t *first = &device->slot_until[0], now = now_ns();

    for (unsigned int i = 1; i < device->options.slots; i++) {
        if (device->slot_until[i] < *first) {
            first = &device->slot_until[i];
        }
    }
    *first = (*first > now ? *first : now) + device->options.latency_us * INT64_C(1000);
    return *first;
}

void device_die(struct device *device, bool hangs)
{
    const struct async_event event = { .type = IBV_EVENT_DEVICE_FATAL };

    device->hangs |= hangs;
    if (device->died) {
        return;
    }
    device->died = true;
    queues_halt(device);
    send(device->async_fd[1], &event, sizeof(event), MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Die where the options say so. With the device held. */
static void die_at(struct device *device, unsigned int number)
{
    const struct options *options = &device->options;

    if ((options->dead > 0 && number >= options->dead) || (options->hang > 0 && number >= options->hang)) {
        device_die(device, options->hang > 0 && number >= options->hang);
    }
}

/* As a call into a kernel whose firmware does not answer: it does not come back. */
static void wait_for_ever(struct device *device)
{
    pthread_mutex_unlock(&device->lock);
    for (;;) {
        pause();
    }
}

uint8_t command_begin(struct device *device)
{
    unsigned int number;
    int64_t done;

    pthread_mutex_lock(&device->lock);
    if (device->hangs) {
        wait_for_ever(device);
    }
    number = ++device->commands;
    done = take_slot(device);
    pthread_mutex_unlock(&device->lock);
    sleep_until(done);
    pthread_mutex_lock(&device->lock);
    die_at(device, number);
    if (device->hangs) {
        wait_for_ever(device);
    }
    if (number == device->options.fail || device->died) {
        return PRM_STATUS_INTERNAL_ERROR;
    }
    return PRM_STATUS_OK;
}

void command_end(struct device *device)
{
    pthread_mutex_unlock(&device->lock);
}

/* For tests: commands that were begun since the function was opened, which may have been closed again. */
EXPORT unsigned int mlx5_emulation_commands(void)
{
    struct device *device = device_get();
    unsigned int commands;

    pthread_mutex_lock(&device->lock);
    commands = device->commands;
    pthread_mutex_unlock(&device->lock);
    return commands;
}

int status_to_errno(uint8_t status)
{
    switch (status) {
    case PRM_STATUS_OK:
        return 0;
    case PRM_STATUS_INTERNAL_ERROR:
    case PRM_STATUS_BAD_SYSTEM_STATE:
    case PRM_STATUS_BAD_INPUT_LENGTH:
    case PRM_STATUS_BAD_OUTPUT_LENGTH:
        return EIO;
    case PRM_STATUS_RESOURCE_BUSY:
        return EBUSY;
    case PRM_STATUS_EXCEEDS_LIMIT:
        return ENOMEM;
    case PRM_STATUS_NO_RESOURCES:
        return EAGAIN;
    default:
        return EINVAL;
    }
}

int device_take_page(struct device *device)
{
    for (unsigned int i = 0; i < DEVICE_PAGES; i++) {
        if (!device->page_taken[i]) {
            device->page_taken[i] = true;
            memset(device->memory + i * PAGE_SIZE, 0, PAGE_SIZE);
            return i;
        }
    }
    return -1;
}

void device_free_page(struct device *device, unsigned int page)
{
    device->page_taken[page] = false;
}

/* One that no object has; there are far fewer objects than numbers. */
static uint32_t next_id(struct device *device)
{
    bool taken = true;

    while (taken) {
        device->last_id = device->last_id % 0xffffff + 1;
        taken = false;
        for (struct object *object = device->objects; object != NULL; object = object->next) {
            taken |= object->id == device->last_id;
        }
    }
    return device->last_id;
}

void *object_new(struct device *device, enum object_kind kind, size_t size)
{
    struct object *object = calloc(1, size);

    if (object != NULL) {
        object->kind = kind;
        object->id = next_id(device);
        object->next = device->objects;
        device->objects = object;
    }
    return object;
}

bool object_use(struct object *object, struct object *used)
{
    struct object **more;

    if (used == NULL) {
        return true;
    }
    more = realloc(object->used, (object->uses + 1) * sizeof(*more));
    if (more == NULL) {
        return false;
    }
    object->used = more;
    object->used[object->uses++] = used;
    used->users++;
    return true;
}

void object_let_go(struct object *object, struct object *used)
{
    for (unsigned int i = 0; i < object->uses; i++) {
        if (object->used[i] == used) {
            object->used[i] = object->used[--object->uses];
            used->users--;
            return;
        }
    }
}

uint8_t object_free(struct device *device, struct object *object)
{
    struct object **at = &device->objects;

    if (object->users > 0) {
        return PRM_STATUS_BAD_RESOURCE_STATE;
    }
    while (*at != object) {
        at = &(*at)->next;
    }
    *at = object->next;
    for (unsigned int i = 0; i < object->uses; i++) {
        object->used[i]->users--;
    }
    free(object->used);
    free(object);
    return PRM_STATUS_OK;
}

struct object *object_find(struct device *device, enum object_kind kind, uint32_t id)
{
    for (struct object *object = device->objects; object != NULL; object = object->next) {
        if (object->kind == kind && object->id == id) {
            return object;
        }
    }
    return NULL;
}
