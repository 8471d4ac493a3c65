/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "echo.h"

#include <errno.h>
#include <string.h>

#include "packets.h"

#define ADDRESS_SIZE 6

static void gather(uint8_t *to, const struct iovec *from, size_t length)
{
    while (length > 0) {
        size_t part = from->iov_len < length ? from->iov_len : length;

        memcpy(to, from->iov_base, part);
        to += part;
        length -= part;
        from++;
    }
}

static void exchange_addresses(uint8_t *frame)
{
    uint8_t destination[ADDRESS_SIZE];

    memcpy(destination, frame, ADDRESS_SIZE);
    memcpy(frame, frame + ADDRESS_SIZE, ADDRESS_SIZE);
    memcpy(frame + ADDRESS_SIZE, destination, ADDRESS_SIZE);
}

ssize_t echo_frame(struct engine *engine, unsigned int pair, unsigned int from, size_t length)
{
    struct queue *queue = &engine->queue[rx_of(pair)];
    struct uplink *uplink = &engine->uplink[pair];
    enum delivery result = BAD_RING;

    if (!engine_is_live(engine, rx_of(pair)) || length < 2 * ADDRESS_SIZE) {
        return -EINVAL;
    }
    uplink->packet.header = (struct virtio_net_hdr_v1){ 0 };
    gather(uplink->packet.frame, &engine->chain.segment[from], length);
    exchange_addresses(uplink->packet.frame);
    uplink->frame_length = length;
    if (ring_resolve(&queue->ring, &engine->dma)) {
        result = packets_deliver(engine, &queue->ring, uplink);
    }
    uplink->frame_length = 0;
    queue->held = result == NO_BUFFERS;
    switch (result) {
    case DELIVERED:
        queue->count.packets++;
        queue->count.bytes += length;
        return length;
    case UNFIT:
        queue->count.dropped++;
        return length;
    case NO_BUFFERS:            /* there may be some before the driver is asked to notify: look once more */
        queue->awake = true;
        return -EAGAIN;
    case BAD_RING:
        break;
    }
    engine_break(engine, rx_of(pair), queue->ring.error);
    return -EIO;
}

static void show(struct engine *engine, unsigned int index)
{
    struct ring *ring = &engine->queue[index].ring;

    if (engine->queue[index].programmed && ring_resolve(ring, &engine->dma)) {
        ring_publish(ring);
    }
}

void echo_show(struct engine *engine, unsigned int pair)
{
    show(engine, rx_of(pair));
    show(engine, tx_of(pair));
}
