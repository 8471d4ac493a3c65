/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "queue_paths.h"

#include "affinity.h"
#include "bell.h"
#include "steering.h"
#include "tap.h"

/* Where an engine finds the dirty bitmap, in turns of two: beyond every guest's memory. */
#define LOG_IOVA (UINT64_C(1) << 62)
#define LOG_IOVA_TURN (UINT64_C(1) << 61)
#define FEATURE(number) (UINT64_C(1) << (number))

static struct pair *pair_of(struct device *device, const struct virtq *virtq)
{
    return &device->queues->pair[virtq->index / 2];
}

static uint64_t field(const struct virtq *virtq, struct prm_field field)
{
    return prm_get(virtq->body, field);
}

/* See that a pair has its engine. */
static bool need_engine(struct device *device, unsigned int index)
{
    struct pair *pair = &device->queues->pair[index];
    const struct engine_uplink uplink = {
        .pairs = 1,
        .packet_fd = { device->wire.count > 0 ? device->wire.fd[index] : -1 },
        .header = device->wire.header,
        .mtu = device->options.mtu,
    };

    cpu_set_t before;
    int result;

    if (pair->engine != NULL) {
        return true;
    }
    if (device->wire.tap) {
        tap_drain(device->wire.fd[index]);    /* until now nobody was there to have it */
    }
    before = affinity_widen();
    result = engine_open(&uplink, &pair->engine);
    affinity_restore(&before);
    if (result < 0) {
        pair->engine = NULL;
        return false;
    }
    for (unsigned int i = 0; i < 2; i++) {
        engine_set_call(pair->engine, i, device->queues->call_fd[2 * index + i]);
    }
    return engine_open_doorbells(pair->engine, -1) == 0 && bell_watch(device, index);
}

/* Let the engine reach what a key reaches. */
static enum syndrome reach(struct pair *pair, const struct mkey *mkey)
{
    if (pair->reached == mkey) {
        return SYNDROME_NONE;
    }
    if (pair->moving > 0) {     /* both queues of a pair have one key here, as every driver has it */
        return SYNDROME_KEY;
    }
    engine_unmap_all(pair->engine);
    pair->reached = NULL;
    for (unsigned int i = 0; i < mkey->pieces; i++) {
        const struct piece *piece = &mkey->piece[i];

        if (engine_borrow(pair->engine, piece->iova, piece->size, piece->host) < 0) {
            return SYNDROME_KEY_RANGE;
        }
    }
    pair->reached = mkey;
    return SYNDROME_NONE;
}

static uint64_t features_of(const struct virtq *virtq)
{
    return (field(virtq, PRM_VIRTIO_NET_Q_TX_CSUM) ? FEATURE(0) : 0) |
           (field(virtq, PRM_VIRTIO_NET_Q_RX_CSUM) ? FEATURE(1) : 0) |
           (field(virtq, PRM_VIRTIO_NET_Q_TSO_IPV4) ? FEATURE(11) : 0) |
           (field(virtq, PRM_VIRTIO_NET_Q_TSO_IPV6) ? FEATURE(12) : 0);
}

/* How many chains an engine has completed of a queue since it exists. */
static uint64_t done(const struct pair *pair, const struct virtq *virtq)
{
    struct engine_counters now = engine_count(pair->engine, virtq->index % 2);

    return now.packets + (virtq->index % 2 == ENGINE_TX ? now.dropped : 0);
}

/* Let through to a receive queue what rules lead to it. */
static void filter(struct device *device, const struct virtq *virtq)
{
    struct filter wanted;

    if (virtq->index % 2 == ENGINE_RX) {
        steering_filter(device, &virtq->object, &wanted);
        engine_set_filter(pair_of(device, virtq)->engine, &wanted);
    }
}

/* Have a queue's frames come by its own queue of the TAP, or another's. */
static void receive_from_tap(struct device *device, const struct virtq *virtq, bool on)
{
    const int fd = device->wire.fd[virtq->index / 2];

    if (!device->wire.tap || virtq->index % 2 != ENGINE_RX) {
        return;
    }
    if (device->wire.count > 1 && virtq->index > 0) {     /* the first stays, as one must */
        tap_use(fd, on);
    }
    if (on) {
        tap_accept(fd, field(virtq, PRM_VIRTIO_NET_Q_RX_CSUM));
    }
}

/* No queue of a pair moves: it reaches no memory. */
static void let_go(struct pair *pair)
{
    engine_run(pair->engine, false);
    engine_unmap_all(pair->engine);
    engine_set_log(pair->engine, false, 0, 0);
    pair->reached = NULL;
    pair->log_size = 0;
}

/*
 * Mark what a queue receives as it wants it: packet data alone, so that of one that sends nothing is marked. From
 * one bitmap to another no packet goes unmarked.
 */
static enum syndrome follow_log(struct pair *pair, const struct virtq *virtq)
{
    const bool on = virtq->log_key != NULL && field(virtq, PRM_VIRTIO_NET_Q_DIRTY_BITMAP_DUMP_ENABLE);
    const uint64_t size = on ? field(virtq, PRM_VIRTIO_NET_Q_DIRTY_BITMAP_SIZE) : 0;
    const uint64_t before = pair->log_iova, before_size = pair->log_size;
    const uint64_t iova = before == LOG_IOVA ? LOG_IOVA + LOG_IOVA_TURN : LOG_IOVA;

    if (virtq->index % 2 != ENGINE_RX) {
        return SYNDROME_NONE;
    }
    if (on) {
        uint8_t *bitmap = memory_at(virtq->log_key, field(virtq, PRM_VIRTIO_NET_Q_DIRTY_BITMAP_ADDR), size);

        if (bitmap == NULL || engine_borrow(pair->engine, iova, size, bitmap) < 0) {
            return SYNDROME_DIRTY_BITMAP;
        }
        pair->log_iova = iova;
    }
    engine_set_log(pair->engine, on, iova, iova + size);
    pair->log_size = size;
    if (before_size > 0) {
        engine_unmap(pair->engine, before, before_size);
    }
    return SYNDROME_NONE;
}

static enum syndrome start(struct device *device, struct virtq *virtq)
{
    struct pair *pair = pair_of(device, virtq);
    const struct ring_setup setup = {
        .size = field(virtq, PRM_VIRTIO_NET_Q_QUEUE_SIZE),
        .descriptors = field(virtq, PRM_VIRTIO_NET_Q_DESC_ADDR),
        .avail = field(virtq, PRM_VIRTIO_NET_Q_AVAILABLE_ADDR),
        .used = field(virtq, PRM_VIRTIO_NET_Q_USED_ADDR),
        .avail_index = field(virtq, PRM_VIRTIO_NET_Q_HW_AVAILABLE_INDEX),
        .used_index = field(virtq, PRM_VIRTIO_NET_Q_HW_USED_INDEX),
        .short_header = !field(virtq, PRM_VIRTIO_NET_Q_VIRTIO_VERSION_1_0),
    };
    enum syndrome syndrome;

    if (virtq->mkey == NULL || !need_engine(device, virtq->index / 2)) {
        return virtq->mkey == NULL ? SYNDROME_KEY : SYNDROME_NO_MEMORY;
    }
    syndrome = reach(pair, virtq->mkey);
    if (syndrome == SYNDROME_NONE) {
        syndrome = follow_log(pair, virtq);
    }
    if (syndrome == SYNDROME_NONE && engine_start_queue(pair->engine, virtq->index % 2, &setup) < 0) {
        syndrome = SYNDROME_ADDRESSES;
    }
    if (syndrome != SYNDROME_NONE) {
        if (pair->moving == 0) {
            let_go(pair);
        }
        return syndrome;
    }
    virtq->moves = true;
    virtq->counted = done(pair, virtq);
    pair->moving++;
    engine_set_features(pair->engine, features_of(virtq));
    filter(device, virtq);
    receive_from_tap(device, virtq, true);
    engine_run(pair->engine, true);
    engine_kick(pair->engine, virtq->index % 2);
    bell_wake(device);
    return SYNDROME_NONE;
}

enum syndrome queue_paths_settle(struct device *device, struct virtq *virtq)
{
    const bool receives = virtq->index % 2 == ENGINE_RX;
    const bool wanted = !device->died && field(virtq, PRM_VIRTIO_NET_Q_STATE) == PRM_STATE_READY &&
                        (!receives || steering_leads_to(device, &virtq->object));

    if (wanted && !virtq->moves) {
        return start(device, virtq);
    }
    if (wanted) {
        filter(device, virtq);
    }
    if (!wanted) {
        queue_paths_stop(device, virtq);
    }
    return SYNDROME_NONE;
}

void queue_paths_stop(struct device *device, struct virtq *virtq)
{
    struct pair *pair = pair_of(device, virtq);
    struct ring_state state;

    if (!virtq->moves) {
        return;
    }
    receive_from_tap(device, virtq, false);
    state = engine_stop_queue(pair->engine, virtq->index % 2);
    prm_set(virtq->body, PRM_VIRTIO_NET_Q_HW_AVAILABLE_INDEX, state.avail);
    prm_set(virtq->body, PRM_VIRTIO_NET_Q_HW_USED_INDEX, state.used);
    queue_paths_count(device, virtq);
    virtq->moves = false;
    if (--pair->moving == 0) {
        let_go(pair);
    }
}

enum syndrome queue_paths_log(struct device *device, struct virtq *virtq)
{
    return virtq->moves ? follow_log(pair_of(device, virtq), virtq) : SYNDROME_NONE;
}

void queue_paths_count(struct device *device, struct virtq *virtq)
{
    if (virtq->moves && virtq->counters != NULL) {
        const uint64_t now = done(pair_of(device, virtq), virtq);

        virtq->counters->received += now - virtq->counted;
        virtq->counters->completed += now - virtq->counted;
        virtq->counted = now;
    }
}
