/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "queues.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "bell.h"
#include "capabilities.h"
#include "channels.h"
#include "event_queues.h"
#include "queue_paths.h"

/* Where the object begins in a mailbox. */
#define BODY 0x10
/* Of error_type: a ring or its memory is broken. A real device's values are not known. */
#define ERROR_BAD_RING 1

static uint64_t field(const struct virtq *virtq, struct prm_field field)
{
    return prm_get(virtq->body, field);
}

static void set(struct virtq *virtq, struct prm_field field, uint64_t value)
{
    prm_set(virtq->body, field, value);
}

static uint8_t bad_parameter(struct command *command, enum syndrome syndrome)
{
    return command_refuse(command, PRM_STATUS_BAD_PARAMETER, syndrome);
}

static uint8_t bad_resource(struct command *command, enum syndrome syndrome)
{
    return command_refuse(command, PRM_STATUS_BAD_RESOURCE, syndrome);
}

int queues_open(struct device *device)
{
    struct queues *queues = calloc(1, sizeof(*queues));

    if (queues == NULL) {
        return -ENOMEM;
    }
    device->queues = queues;
    for (unsigned int i = 0; i < 2 * OPTIONS_MAX_PAIRS; i++) {
        queues->call_fd[i] = -1;
    }
    for (unsigned int i = 0; i < 2 * device->options.pairs; i++) {
        queues->call_fd[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (queues->call_fd[i] < 0) {
            return -errno;
        }
    }
    return bell_open(device);
}

void queues_close(struct device *device)
{
    struct queues *queues = device->queues;

    if (queues == NULL) {
        return;
    }
    bell_close(device);
    for (unsigned int i = 0; i < OPTIONS_MAX_PAIRS; i++) {
        if (queues->pair[i].engine != NULL) {
            engine_close(queues->pair[i].engine);
        }
    }
    for (unsigned int i = 0; i < 2 * OPTIONS_MAX_PAIRS; i++) {
        if (queues->call_fd[i] >= 0) {
            close(queues->call_fd[i]);
        }
    }
    free(queues);
    device->queues = NULL;
}

/* --- counters --- */

uint8_t queues_create_counters(struct command *command)
{
    struct counters *counters;

    for (size_t i = BODY; i < command->in_size; i++) {
        if (command->in[i] != 0) {
            return bad_parameter(command, SYNDROME_RESERVED);
        }
    }
    counters = object_new(command->device, KIND_COUNTERS, sizeof(*counters));
    if (counters == NULL) {
        return command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
    }
    command->object = &counters->object;
    return PRM_STATUS_OK;
}

uint8_t queues_query_counters(struct command *command)
{
    const struct counters *counters = (const struct counters *)command->object;

    for (unsigned int i = 0; i < 2 * command->device->options.pairs; i++) {
        struct virtq *virtq = command->device->queues->virtq[i];

        if (virtq != NULL && virtq->counters == counters) {
            queue_paths_count(command->device, virtq);
        }
    }
    prm_set(command->out, PRM_QUERY_VIRTIO_Q_COUNTERS_OUT_RECEIVED_DESC, counters->received);
    prm_set(command->out, PRM_QUERY_VIRTIO_Q_COUNTERS_OUT_COMPLETED_DESC, counters->completed);
    prm_set(command->out, PRM_QUERY_VIRTIO_Q_COUNTERS_OUT_BAD_DESC_ERRORS, counters->bad_descriptors);
    prm_set(command->out, PRM_QUERY_VIRTIO_Q_COUNTERS_OUT_OBJ_ID, counters->object.id);
    return PRM_STATUS_OK;
}

/* --- what a queue refers to --- */

/* Change what `*place` refers to. False: no memory. */
static bool refer(struct virtq *virtq, struct object **place, struct object *to)
{
    if (*place != NULL) {
        object_let_go(&virtq->object, *place);
    }
    *place = to;
    return object_use(&virtq->object, to);
}

static uint8_t take_umems(struct command *command, struct virtq *virtq)
{
    static const struct prm_field umem[][3] = {
        { PRM_VIRTIO_NET_Q_UMEM_1_ID, PRM_VIRTIO_NET_Q_UMEM_1_OFFSET, PRM_VIRTIO_NET_Q_UMEM_1_SIZE },
        { PRM_VIRTIO_NET_Q_UMEM_2_ID, PRM_VIRTIO_NET_Q_UMEM_2_OFFSET, PRM_VIRTIO_NET_Q_UMEM_2_SIZE },
        { PRM_VIRTIO_NET_Q_UMEM_3_ID, PRM_VIRTIO_NET_Q_UMEM_3_OFFSET, PRM_VIRTIO_NET_Q_UMEM_3_SIZE },
    };
    const uint64_t needed = UMEM_BYTES_PER_ENTRY * field(virtq, PRM_VIRTIO_NET_Q_QUEUE_SIZE) + UMEM_BYTES;

    for (size_t i = 0; i < sizeof(umem) / sizeof(*umem); i++) {
        const uint64_t size = field(virtq, umem[i][2]);
        struct object *object;

        if (size < needed || memory_umem(command->device, field(virtq, umem[i][0]), field(virtq, umem[i][1]), size,
                                         &object) == NULL) {
            return bad_resource(command, SYNDROME_UMEM);
        }
        if (!object_use(&virtq->object, object)) {
            return command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
        }
    }
    return PRM_STATUS_OK;
}

/* A key that is 0 is none yet. */
static uint8_t take_key(struct command *command, struct virtq *virtq, struct mkey **place, uint32_t key)
{
    struct mkey *mkey = memory_mkey(command->device, key);
    struct object *before = *place != NULL ? &(*place)->object : NULL;

    if (mkey == NULL && key != 0) {
        return bad_resource(command, SYNDROME_KEY);
    }
    if (!refer(virtq, &before, mkey != NULL ? &mkey->object : NULL)) {
        return command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
    }
    *place = mkey;
    return PRM_STATUS_OK;
}

static uint8_t take_event_mode(struct command *command, struct virtq *virtq)
{
    struct object *qp = NULL;

    switch (field(virtq, PRM_VIRTIO_NET_Q_EVENT_MODE)) {
    case PRM_EVENT_MODE_NONE:
        break;
    case PRM_EVENT_MODE_QP:
        qp = object_find(command->device, KIND_QP, field(virtq, PRM_VIRTIO_NET_Q_EVENT_QPN_OR_MSIX));
        if (qp == NULL) {
            return bad_resource(command, SYNDROME_QP);
        }
        if (!event_queues_can_send(qp)) {
            return command_refuse(command, PRM_STATUS_BAD_RESOURCE_STATE, SYNDROME_QP_STATE);
        }
        break;
    default:
        return bad_parameter(command, SYNDROME_EVENT_MODE);
    }
    return refer(virtq, &virtq->event_qp, qp)
               ? PRM_STATUS_OK
               : command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
}

/* --- create --- */

static uint8_t check_new(struct command *command, const struct virtq *virtq)
{
    const uint64_t size = field(virtq, PRM_VIRTIO_NET_Q_QUEUE_SIZE);

    if (virtq->index > 2 * command->device->options.pairs ||
        command->device->queues->virtq[virtq->index] != NULL) {
        return command_refuse(command, PRM_STATUS_BAD_INDEX, SYNDROME_QUEUE_INDEX);
    }
    if (size == 0 || size > RING_MAX_SIZE || (size & (size - 1)) != 0) {
        return bad_parameter(command, SYNDROME_QUEUE_SIZE);
    }
    if (field(virtq, PRM_VIRTIO_NET_Q_VIRTIO_Q_TYPE) != PRM_QUEUE_TYPE_SPLIT) {
        return bad_parameter(command, SYNDROME_QUEUE_TYPE);
    }
    if (field(virtq, PRM_VIRTIO_NET_Q_STATE) != PRM_STATE_INIT) {
        return bad_parameter(command, SYNDROME_STATE);
    }
    if (field(virtq, PRM_VIRTIO_NET_Q_MODIFY_FIELD_SELECT) != 0) {
        return bad_parameter(command, SYNDROME_MODIFY_SELECT);
    }
    return PRM_STATUS_OK;
}

static uint8_t take_objects(struct command *command, struct virtq *virtq)
{
    const uint32_t counter_set = field(virtq, PRM_VIRTIO_NET_Q_COUNTER_SET_ID);
    struct object *pd = memory_pd(command->device, field(virtq, PRM_VIRTIO_NET_Q_PD));
    struct object *tis = object_find(command->device, KIND_TIS, field(virtq, PRM_VIRTIO_NET_Q_TISN_OR_QPN));
    struct object *counters = object_find(command->device, KIND_COUNTERS, counter_set);
    uint8_t status;

    if (pd == NULL || tis == NULL) {
        return bad_resource(command, pd == NULL ? SYNDROME_PD : SYNDROME_TIS);
    }
    if (counters == NULL && counter_set != 0) {
        return bad_resource(command, SYNDROME_COUNTERS);
    }
    if (!object_use(&virtq->object, pd) || !object_use(&virtq->object, tis) ||
        !object_use(&virtq->object, counters)) {
        return command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
    }
    virtq->counters = (struct counters *)counters;
    status = take_umems(command, virtq);
    if (status == PRM_STATUS_OK) {
        status = take_event_mode(command, virtq);
    }
    if (status == PRM_STATUS_OK) {
        status = take_key(command, virtq, &virtq->mkey, field(virtq, PRM_VIRTIO_NET_Q_VIRTIO_Q_MKEY));
    }
    return status;
}

uint8_t queues_create(struct command *command)
{
    struct virtq *virtq = object_new(command->device, KIND_VIRTQ, sizeof(*virtq));
    uint8_t status;

    if (virtq == NULL) {
        return command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
    }
    command->object = &virtq->object;
    memcpy(virtq->body, command->in + BODY, sizeof(virtq->body));
    virtq->index = field(virtq, PRM_VIRTIO_NET_Q_QUEUE_INDEX);
    status = check_new(command, virtq);
    if (status == PRM_STATUS_OK) {
        status = take_objects(command, virtq);
    }
    if (status == PRM_STATUS_OK) {
        command->device->queues->virtq[virtq->index] = virtq;
    }
    return status;
}

/* --- modify --- */

/* What can be modified: by which bit, and which fields go along. */
static const struct change {
    uint64_t select;
    bool always;                /* while it is READY, too */
    unsigned int fields;
    struct prm_field field[4];
} changes[] = {
    { PRM_MODIFY_DIRTY_BITMAP, true, 3,
      { PRM_VIRTIO_NET_Q_DIRTY_BITMAP_MKEY, PRM_VIRTIO_NET_Q_DIRTY_BITMAP_SIZE,
        PRM_VIRTIO_NET_Q_DIRTY_BITMAP_ADDR } },
    { PRM_MODIFY_DIRTY_ENABLE, true, 1, { PRM_VIRTIO_NET_Q_DIRTY_BITMAP_DUMP_ENABLE } },
    { PRM_MODIFY_PERIOD, true, 3,
      { PRM_VIRTIO_NET_Q_QUEUE_PERIOD_MODE, PRM_VIRTIO_NET_Q_QUEUE_PERIOD_US, PRM_VIRTIO_NET_Q_QUEUE_MAX_COUNT } },
    { PRM_MODIFY_ADDRESSES, false, 3,
      { PRM_VIRTIO_NET_Q_DESC_ADDR, PRM_VIRTIO_NET_Q_USED_ADDR, PRM_VIRTIO_NET_Q_AVAILABLE_ADDR } },
    { PRM_MODIFY_AVAILABLE_INDEX, false, 1, { PRM_VIRTIO_NET_Q_HW_AVAILABLE_INDEX } },
    { PRM_MODIFY_USED_INDEX, false, 1, { PRM_VIRTIO_NET_Q_HW_USED_INDEX } },
    { PRM_MODIFY_TYPE, false, 1, { PRM_VIRTIO_NET_Q_VIRTIO_Q_TYPE } },
    { PRM_MODIFY_VERSION_1_0, false, 1, { PRM_VIRTIO_NET_Q_VIRTIO_VERSION_1_0 } },
    { PRM_MODIFY_MKEY, false, 1, { PRM_VIRTIO_NET_Q_VIRTIO_Q_MKEY } },
    { PRM_MODIFY_FEATURES, false, 4,
      { PRM_VIRTIO_NET_Q_TSO_IPV4, PRM_VIRTIO_NET_Q_TSO_IPV6, PRM_VIRTIO_NET_Q_TX_CSUM,
        PRM_VIRTIO_NET_Q_RX_CSUM } },
    { PRM_MODIFY_EVENT_MODE, false, 2,
      { PRM_VIRTIO_NET_Q_EVENT_MODE, PRM_VIRTIO_NET_Q_EVENT_QPN_OR_MSIX } },
};

/* Copy what is selected. */
static uint8_t take_fields(struct command *command, struct virtq *virtq, uint64_t select)
{
    const bool ready = field(virtq, PRM_VIRTIO_NET_Q_STATE) == PRM_STATE_READY;
    uint64_t known = PRM_MODIFY_STATE;

    for (size_t i = 0; i < sizeof(changes) / sizeof(*changes); i++) {
        const struct change *change = &changes[i];

        known |= change->select;
        if ((select & change->select) != 0 && ready && !change->always) {
            return command_refuse(command, PRM_STATUS_BAD_RESOURCE_STATE, SYNDROME_MODIFY_SELECT);
        }
    }
    if (select == 0 || (select & ~known) != 0) {
        return bad_parameter(command, SYNDROME_MODIFY_SELECT);
    }
    for (size_t i = 0; i < sizeof(changes) / sizeof(*changes); i++) {
        for (unsigned int j = 0; (select & changes[i].select) != 0 && j < changes[i].fields; j++) {
            set(virtq, changes[i].field[j], prm_get(command->in + BODY, changes[i].field[j]));
        }
    }
    return PRM_STATUS_OK;
}

/* Follow what was copied. */
static uint8_t follow(struct command *command, struct virtq *virtq, uint64_t select)
{
    uint8_t status = PRM_STATUS_OK;

    if ((select & PRM_MODIFY_TYPE) != 0 && field(virtq, PRM_VIRTIO_NET_Q_VIRTIO_Q_TYPE) != PRM_QUEUE_TYPE_SPLIT) {
        return bad_parameter(command, SYNDROME_QUEUE_TYPE);
    }
    if ((select & PRM_MODIFY_MKEY) != 0) {
        status = take_key(command, virtq, &virtq->mkey, field(virtq, PRM_VIRTIO_NET_Q_VIRTIO_Q_MKEY));
    }
    if (status == PRM_STATUS_OK && (select & PRM_MODIFY_EVENT_MODE) != 0) {
        status = take_event_mode(command, virtq);
    }
    if (status == PRM_STATUS_OK && (select & PRM_MODIFY_DIRTY_BITMAP) != 0) {
        status = take_key(command, virtq, &virtq->log_key, field(virtq, PRM_VIRTIO_NET_Q_DIRTY_BITMAP_MKEY));
    }
    if (status == PRM_STATUS_OK && (select & (PRM_MODIFY_DIRTY_BITMAP | PRM_MODIFY_DIRTY_ENABLE)) != 0 &&
        queue_paths_log(command->device, virtq) != SYNDROME_NONE) {
        status = bad_parameter(command, SYNDROME_DIRTY_BITMAP);
    }
    return status;
}

static bool is_way(const struct options *options, uint64_t from, uint64_t to)
{
    return (from == PRM_STATE_INIT && to == PRM_STATE_READY) ||
           (from == PRM_STATE_READY && to == PRM_STATE_SUSPENDED) ||
           (from == PRM_STATE_SUSPENDED && to == PRM_STATE_READY && options->resumes);
}

static uint8_t go_to(struct command *command, struct virtq *virtq, uint64_t state)
{
    const uint64_t before = field(virtq, PRM_VIRTIO_NET_Q_STATE);
    enum syndrome syndrome;

    if (!is_way(&command->device->options, before, state) ||
        virtq->index == 2 * command->device->options.pairs) {
        return command_refuse(command, PRM_STATUS_BAD_RESOURCE_STATE, SYNDROME_STATE);
    }
    set(virtq, PRM_VIRTIO_NET_Q_STATE, state);
    if (state == PRM_STATE_READY && virtq->mkey == NULL) {
        set(virtq, PRM_VIRTIO_NET_Q_STATE, before);
        return bad_resource(command, SYNDROME_KEY);
    }
    syndrome = queue_paths_settle(command->device, virtq);
    if (syndrome != SYNDROME_NONE) {
        set(virtq, PRM_VIRTIO_NET_Q_STATE, before);
        return bad_parameter(command, syndrome);
    }
    return PRM_STATUS_OK;
}

uint8_t queues_modify(struct command *command)
{
    struct virtq *virtq = (struct virtq *)command->object;
    const uint8_t *body = command->in + BODY;
    const uint64_t select = prm_get(body, PRM_VIRTIO_NET_Q_MODIFY_FIELD_SELECT);
    uint8_t status;

    if (prm_get(body, PRM_VIRTIO_NET_Q_QUEUE_INDEX) != virtq->index) {
        return command_refuse(command, PRM_STATUS_BAD_INDEX, SYNDROME_QUEUE_INDEX);
    }
    status = take_fields(command, virtq, select);
    if (status == PRM_STATUS_OK) {
        status = follow(command, virtq, select);
    }
    if (status == PRM_STATUS_OK && (select & PRM_MODIFY_STATE) != 0) {
        status = go_to(command, virtq, prm_get(body, PRM_VIRTIO_NET_Q_STATE));
    }
    return status;
}

/* --- query, and what happens by itself --- */

uint8_t queues_query(struct command *command)
{
    const struct virtq *virtq = (const struct virtq *)command->object;

    memcpy(command->out + BODY, virtq->body, sizeof(virtq->body));
    prm_set(command->out, PRM_QUERY_VIRTIO_NET_Q_OUT_MODIFY_FIELD_SELECT, 0);
    prm_set(command->out, PRM_QUERY_VIRTIO_NET_Q_OUT_OBJ_ID, virtq->object.id);
    return PRM_STATUS_OK;
}

void queues_halt(struct device *device)
{
    for (unsigned int i = 0; i < 2 * device->options.pairs; i++) {
        if (device->queues->virtq[i] != NULL) {
            queue_paths_stop(device, device->queues->virtq[i]);
        }
    }
}

void queues_forget(struct device *device, struct virtq *virtq)
{
    queue_paths_stop(device, virtq);
    if (device->queues->virtq[virtq->index] == virtq) {
        device->queues->virtq[virtq->index] = NULL;
    }
}

static void go_to_error(struct device *device, struct virtq *virtq)
{
    queue_paths_stop(device, virtq);
    set(virtq, PRM_VIRTIO_NET_Q_STATE, PRM_STATE_ERROR);
    set(virtq, PRM_VIRTIO_NET_Q_ERROR_TYPE, ERROR_BAD_RING);
    if (virtq->counters != NULL) {
        virtq->counters->bad_descriptors++;
    }
    channels_raise(device, &virtq->object, PRM_EVENT_OBJECT_CHANGE);
}

/* Start or stop a queue; one that cannot be started is broken. */
static void settle(struct device *device, struct virtq *virtq)
{
    if (virtq != NULL && queue_paths_settle(device, virtq) != SYNDROME_NONE) {
        go_to_error(device, virtq);
    }
}

void queues_steer(struct device *device)
{
    for (unsigned int i = ENGINE_RX; i < 2 * device->options.pairs; i += 2) {
        settle(device, device->queues->virtq[i]);
    }
}

void queues_break(struct device *device, unsigned int pair)
{
    struct virtq **both = &device->queues->virtq[2 * pair];
    struct engine *engine = device->queues->pair[pair].engine;
    unsigned int broken;

    if (engine_fault(engine, &broken) == NULL) {
        return;
    }
    for (unsigned int i = 0; i < 2; i++) {
        if (both[i] != NULL) {
            queue_paths_stop(device, both[i]);
        }
    }
    engine_reset(engine);
    if (both[broken] != NULL) {
        go_to_error(device, both[broken]);
    }
    settle(device, both[!broken]);
}
