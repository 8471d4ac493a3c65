/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "packets.h"

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "echo.h"
#include "interrupt.h"

/* Packets that one queue moves before the other, or a waiting caller, has its turn. */
#define BATCH 64

/* Interrupt the driver for what was given back, if it wants that. */
static void interrupt_for(struct engine *engine, unsigned int index)
{
    struct queue *queue = &engine->queue[index];

    if (!ring_wants_interrupt(&queue->ring) || queue->call_fd < 0) {
        return;
    }
    queue->count.interrupts++;
    if (interrupt(queue->call_fd) < 0) {
        queue->call_fd = -1;
        engine_break(engine, index, "the eventfd of an interrupt blocks");
    }
}

/* --- receive: uplink to driver --- */

/* Copy into a chain, and log what was written. The chain is long enough. */
static void scatter(struct engine *engine, const struct ring_chain *chain, size_t offset, const void *data,
                    size_t length)
{
    const uint8_t *from = data;

    for (unsigned int i = 0; length > 0; i++) {
        size_t room = chain->segment[i].iov_len, part;

        if (offset >= room) {
            offset -= room;
            continue;
        }
        part = room - offset < length ? room - offset : length;
        memcpy((uint8_t *)chain->segment[i].iov_base + offset, from, part);
        dma_mark(&engine->dma, &engine->log, chain->iova[i] + offset, part);
        from += part;
        length -= part;
        offset = 0;
    }
}

enum delivery packets_deliver(struct engine *engine, struct ring *ring, struct uplink *uplink)
{
    struct packet *packet = &uplink->packet;
    unsigned int buffers = 1;
    const size_t header = header_of(ring), whole = header + uplink->frame_length;
    size_t first, done;

    if (!ring_has(ring, 1)) {
        return ring->error ? BAD_RING : NO_BUFFERS;
    }
    if (!ring_chain_at(ring, &engine->dma, 0, true, &engine->first)) {
        return BAD_RING;
    }
    if (engine->first.bytes < header) {
        ring->error = "a receive buffer is shorter than the packet header";
        return BAD_RING;
    }
    first = engine->first.bytes < whole ? engine->first.bytes : whole;
    engine->used[0] = (struct ring_element){ engine->first.head, first };
    for (done = first; done < whole; buffers++) {
        size_t part = whole - done;

        if (!ring->setup.mergeable || buffers == ring->setup.size) {
            return UNFIT;
        }
        if (!ring_has(ring, buffers + 1)) {
            return ring->error ? BAD_RING : NO_BUFFERS;
        }
        if (!ring_chain_at(ring, &engine->dma, buffers, true, &engine->chain)) {
            return BAD_RING;
        }
        part = part < engine->chain.bytes ? part : engine->chain.bytes;
        scatter(engine, &engine->chain, 0, packet->frame + (done - header), part);
        engine->used[buffers] = (struct ring_element){ engine->chain.head, part };
        done += part;
    }
    packet->header.num_buffers = htole16(buffers);
    scatter(engine, &engine->first, 0, &packet->header, header);
    scatter(engine, &engine->first, header, packet->frame, first - header);
    if (buffers == 1) {
        ring_use_one(ring, engine->first.head, first);
    } else {
        ring_use(ring, engine->used, buffers);
    }
    return DELIVERED;
}

/* Read the next packet from an uplink. Returns its bytes, 0 when there is none. */
static size_t read_packet(struct engine *engine, unsigned int pair)
{
    struct packet *packet = &engine->uplink[pair].packet;
    void *to = engine->header ? (void *)packet : packet->frame;
    ssize_t length;

    packet->header = (struct virtio_net_hdr_v1){ 0 };
    do {
        length = read(engine->uplink[pair].packet_fd, to,
                      engine->header ? sizeof(*packet) : sizeof(packet->frame));
    } while (length < 0 && errno == EINTR);
    if (length > 0) {
        return length;
    }
    if (length == 0 || errno != EAGAIN) {
        engine_lose_uplink(engine, pair);
    }
    return 0;
}

/* See that a packet is at hand. */
static bool fetch_packet(struct engine *engine, unsigned int pair)
{
    struct uplink *uplink = &engine->uplink[pair];
    size_t header = engine->header ? NET_HEADER_SIZE : 0;

    while (uplink->frame_length == 0 && !uplink->lost) {
        size_t length = read_packet(engine, pair);

        if (length == 0) {
            return false;
        }
        if (length > header) {
            uplink->frame_length = length - header;
        }
    }
    return uplink->frame_length > 0;
}

/* Whether the packet at hand is one for the driver. One that fills its place may have been longer. */
static bool may_deliver(const struct engine *engine, struct uplink *uplink)
{
    struct virtio_net_hdr_v1 *header = &uplink->packet.header;

    return uplink->frame_length < MAX_FRAME && offload_receive(header, engine->features) &&
           offload_fits(header, engine->mtu, uplink->frame_length);
}

static void receive_one(struct engine *engine, unsigned int pair)
{
    struct queue *queue = &engine->queue[rx_of(pair)];
    struct uplink *uplink = &engine->uplink[pair];
    enum delivery result = UNFIT;

    if (!filter_admits(&engine->filter, uplink->packet.frame, uplink->frame_length)) {
        queue->held = false;
        queue->count.filtered++;
        uplink->frame_length = 0;
        return;
    }
    if (may_deliver(engine, uplink)) {
        result = packets_deliver(engine, &queue->ring, uplink);
    }
    queue->held = result == NO_BUFFERS;
    switch (result) {
    case DELIVERED:
        queue->count.packets++;
        queue->count.bytes += uplink->frame_length;
        uplink->frame_length = 0;
        break;
    case UNFIT:
        queue->count.dropped++;
        uplink->frame_length = 0;
        break;
    case NO_BUFFERS:
        break;
    case BAD_RING:
        engine_break(engine, rx_of(pair), queue->ring.error);
        break;
    }
}

/* See what buffers there are, and take some ahead if that is asked for. */
static bool look_at_buffers(struct engine *engine, struct ring *ring)
{
    if (!ring_resolve(ring, &engine->dma)) {
        return false;
    }
    if (ring_available(ring) > 0) {
        ring_prefetch(ring);
    }
    return ring->error == NULL;
}

bool packets_receive(struct engine *engine, unsigned int pair)
{
    struct queue *queue = &engine->queue[rx_of(pair)];
    bool live = engine_is_live(engine, rx_of(pair));
    unsigned int moved = 0;

    if (engine->echo) {         /* more buffers: what has been sent may come back now */
        engine->queue[tx_of(pair)].awake = true;
        return false;
    }
    if (live && !look_at_buffers(engine, &queue->ring)) {
        engine_break(engine, rx_of(pair), queue->ring.error);
        return false;
    }
    if (!live && engine_leaves_packets(engine)) {
        return false;
    }
    for (; moved < BATCH && fetch_packet(engine, pair); moved++) {
        if (!live) {            /* nobody receives: what comes is lost, as on any NIC */
            queue->count.dropped++;
            engine->uplink[pair].frame_length = 0;
            continue;
        }
        receive_one(engine, pair);
        if (queue->held || engine->fault != NULL) {
            break;
        }
    }
    if (live && engine->fault == NULL && moved > 0) {
        interrupt_for(engine, rx_of(pair));
    }
    return moved > 0;
}

/* --- transmit: driver to uplink --- */

/* Take the header off the front of a chain. Returns how many segments are left out after that. */
static unsigned int take_header(struct ring_chain *chain, struct virtio_net_hdr_v1 *header, size_t size)
{
    size_t done = 0;
    unsigned int i = 0;

    while (done < size) {
        struct iovec *segment = &chain->segment[i];
        size_t left = size - done;
        size_t part = left < segment->iov_len ? left : segment->iov_len;

        memcpy((uint8_t *)header + done, segment->iov_base, part);
        done += part;
        segment->iov_base = (uint8_t *)segment->iov_base + part;
        segment->iov_len -= part;
        i += segment->iov_len == 0;
    }
    return i;
}

/*
 * Write the frame that a chain holds from a segment on, after `header` unless that is NULL. Returns the bytes of
 * the frame or a negative errno.
 */
static ssize_t write_frame(const struct uplink *uplink, struct ring_chain *chain, unsigned int from,
                           struct virtio_net_hdr_v1 *header)
{
    unsigned int segments = chain->segments - from;
    struct iovec *first = &chain->segment[from];
    size_t before = 0;
    ssize_t sent;

    if (header != NULL) {
        if (from == 0) {
            memmove(first + 1, first, segments * sizeof(*first));
        } else {
            first--;
        }
        *first = (struct iovec){ .iov_base = header, .iov_len = NET_HEADER_SIZE };
        before = NET_HEADER_SIZE;
        segments++;
    }
    do {
        sent = writev(uplink->packet_fd, first, segments);
    } while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : sent - (ssize_t)before;
}

/* Whether a frame can be sent as its header wants it. */
static bool may_send(const struct engine *engine, struct virtio_net_hdr_v1 *header, size_t length)
{
    return length > 0 && length < MAX_FRAME && offload_transmit(header, engine->features, length) &&
           offload_fits(header, engine->mtu, length) && (engine->header || offload_is_plain(header));
}

/* Send the chain at hand. False: not now, or never (fault). */
static bool transmit_one(struct engine *engine, unsigned int pair)
{
    struct queue *queue = &engine->queue[tx_of(pair)];
    const struct uplink *uplink = &engine->uplink[pair];
    struct ring_chain *chain = &engine->chain;
    const uint16_t head = chain->head;      /* an echo needs the chain for its own */
    const size_t header_size = header_of(&queue->ring);
    size_t length = chain->bytes - header_size;
    struct virtio_net_hdr_v1 header;
    unsigned int from;
    ssize_t sent = -EINVAL;

    if (chain->bytes < header_size) {
        engine_break(engine, tx_of(pair), "a transmit buffer is shorter than the packet header");
        return false;
    }
    /* A copy: the driver must not change what has been looked at. */
    from = take_header(chain, &header, header_size);
    if (may_send(engine, &header, length)) {
        if (engine->echo) {
            sent = echo_frame(engine, pair, from, length);
        } else if (!uplink->lost) {
            sent = write_frame(uplink, chain, from, engine->header ? &header : NULL);
        }
    }
    if (sent == -EAGAIN) {
        queue->held = true;
        return false;
    }
    if (sent == -EFAULT) {
        engine_break(engine, tx_of(pair), "memory has gone under a transmit buffer");
        return false;
    }
    if (sent < 0) {             /* nothing that can be sent, or no uplink: the driver need not know */
        queue->count.dropped++;
    } else {
        queue->count.packets++;
        queue->count.bytes += sent;
    }
    ring_use_one(&queue->ring, head, 0);
    return true;
}

bool packets_transmit(struct engine *engine, unsigned int pair)
{
    struct queue *queue = &engine->queue[tx_of(pair)];
    struct ring *ring = &queue->ring;
    unsigned int moved = 0;

    if (!engine_is_live(engine, tx_of(pair))) {
        return false;
    }
    queue->held = false;
    if (ring_resolve(ring, &engine->dma)) {
        ring_disarm(ring);
        if (engine->echo) {
            echo_warm(engine, pair);
        }
        while (moved < BATCH && ring_has(ring, 1) &&
               ring_chain_at(ring, &engine->dma, 0, false, &engine->chain) && transmit_one(engine, pair)) {
            moved++;
            if (engine->echo && moved % ECHO_SHOWN == 0) {
                echo_show(engine, pair);
                echo_warm(engine, pair);
            }
        }
        if (engine->echo) {
            echo_show(engine, pair);
        }
    }
    if (ring->error != NULL) {
        engine_break(engine, tx_of(pair), ring->error);
    } else if (moved > 0) {
        interrupt_for(engine, tx_of(pair));
        if (engine->echo && engine_is_live(engine, rx_of(pair))) {
            interrupt_for(engine, rx_of(pair));
        }
    }
    return moved > 0;
}
