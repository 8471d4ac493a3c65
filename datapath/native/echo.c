/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "echo.h"

#include <endian.h>
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

/*
 * Copy a frame that is in one piece into a buffer that is, too. Only stores, of which none is loaded again: what has
 * been stored in other parts than it is loaded in waits until all stores before it are out.
 */
static void copy_exchanged(uint8_t *to, const uint8_t *from, size_t length, size_t header_size)
{
    const struct virtio_net_hdr_v1 header = { .num_buffers = htole16(1) };

    memcpy(to, &header, header_size);
    to += header_size;
    memcpy(to, from + ADDRESS_SIZE, ADDRESS_SIZE);
    memcpy(to + ADDRESS_SIZE, from, ADDRESS_SIZE);
    memcpy(to + 2 * ADDRESS_SIZE, from + 2 * ADDRESS_SIZE, length - 2 * ADDRESS_SIZE);
}

/* Send back what is in one piece, into a buffer that is. False: something else is to be done about it. */
static bool echo_straight(struct engine *engine, struct ring *ring, const struct iovec *frame, size_t length)
{
    const struct ring_chain *buffer = &engine->first;
    const size_t header_size = header_of(ring);

    if (frame->iov_len < length || !ring_has(ring, 1) ||
        !ring_chain_at(ring, &engine->dma, 0, true, &engine->first) || buffer->segments == 0 ||
        buffer->segment[0].iov_len < header_size + length) {
        return false;
    }
    copy_exchanged(buffer->segment[0].iov_base, frame->iov_base, length, header_size);
    dma_mark(&engine->dma, &engine->log, buffer->iova[0], header_size + length);
    ring_use_one(ring, buffer->head, header_size + length);
    return true;
}

/* Send back a frame in pieces, or into some. */
static enum delivery echo_in_pieces(struct engine *engine, struct ring *ring, struct uplink *uplink,
                                    unsigned int from, size_t length)
{
    enum delivery result;

    uplink->packet.header = (struct virtio_net_hdr_v1){ 0 };
    gather(uplink->packet.frame, &engine->chain.segment[from], length);
    exchange_addresses(uplink->packet.frame);
    uplink->frame_length = length;
    result = packets_deliver(engine, ring, uplink);
    uplink->frame_length = 0;
    return result;
}

ssize_t echo_frame(struct engine *engine, unsigned int pair, unsigned int from, size_t length)
{
    struct queue *queue = &engine->queue[rx_of(pair)];
    struct ring *ring = &queue->ring;
    enum delivery result = BAD_RING;

    if (!engine_is_live(engine, rx_of(pair)) || length < 2 * ADDRESS_SIZE) {
        return -EINVAL;
    }
    if (ring_resolve(ring, &engine->dma)) {
        result = echo_straight(engine, ring, &engine->chain.segment[from], length)
                     ? DELIVERED
                     : echo_in_pieces(engine, ring, &engine->uplink[pair], from, length);
    }
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
    engine_break(engine, rx_of(pair), ring->error);
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

static void warm(struct engine *engine, unsigned int index, bool write)
{
    struct ring *ring = &engine->queue[index].ring;

    if (engine_is_live(engine, index) && ring_resolve(ring, &engine->dma)) {
        unsigned int waiting = ring_available(ring);

        ring_warm(ring, &engine->dma, waiting < ECHO_SHOWN ? waiting : ECHO_SHOWN, write);
    }
}

void echo_warm(struct engine *engine, unsigned int pair)
{
    warm(engine, tx_of(pair), false);
    warm(engine, rx_of(pair), true);
}
