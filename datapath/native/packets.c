/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "packets.h"

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "interrupt.h"

/* Packets that one queue moves before the other, or a waiting caller, has its turn. */
#define BATCH 64
#define NET_HEADER_SIZE 12

/* Section 5.1.6: what stands before every packet. Without offloads only num_buffers is not 0. */
struct net_header {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t header_length;
    uint16_t gso_size;
    uint16_t checksum_start;
    uint16_t checksum_offset;
    uint16_t num_buffers;
};
_Static_assert(sizeof(struct net_header) == NET_HEADER_SIZE, "virtio_net_hdr_v1");

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

enum delivery { DELIVERED, NO_BUFFERS, TOO_LONG, BAD_RING };

/*
 * Put the packet at hand into as many buffers as it takes (section 5.1.6.4). The first one's part comes
 * last, because the header in it says how many there are.
 */
static enum delivery deliver(struct engine *engine, struct ring *ring, bool mergeable)
{
    struct net_header header = { 0 };
    unsigned int buffers = 1;
    size_t first, done;

    if (ring_available(ring) == 0) {
        return ring->error ? BAD_RING : NO_BUFFERS;
    }
    if (!ring_chain_at(ring, &engine->dma, 0, true, &engine->first)) {
        return BAD_RING;
    }
    if (engine->first.bytes < NET_HEADER_SIZE) {
        ring->error = "a receive buffer is shorter than the packet header";
        return BAD_RING;
    }
    first = engine->first.bytes - NET_HEADER_SIZE;
    first = first < engine->packet_length ? first : engine->packet_length;
    engine->used[0] = (struct ring_element){ engine->first.head, NET_HEADER_SIZE + first };
    for (done = first; done < engine->packet_length; buffers++) {
        size_t part = engine->packet_length - done;

        if (!mergeable || buffers == ring->setup.size) {
            return TOO_LONG;
        }
        if (buffers >= ring_available(ring)) {
            return ring->error ? BAD_RING : NO_BUFFERS;
        }
        if (!ring_chain_at(ring, &engine->dma, buffers, true, &engine->chain)) {
            return BAD_RING;
        }
        part = part < engine->chain.bytes ? part : engine->chain.bytes;
        scatter(engine, &engine->chain, 0, engine->packet + done, part);
        engine->used[buffers] = (struct ring_element){ engine->chain.head, part };
        done += part;
    }
    header.num_buffers = htole16(buffers);
    scatter(engine, &engine->first, 0, &header, sizeof(header));
    scatter(engine, &engine->first, sizeof(header), engine->packet, first);
    ring_use(ring, engine->used, buffers);
    return DELIVERED;
}

/* See that a packet is at hand. */
static bool fetch_packet(struct engine *engine)
{
    ssize_t length;

    if (engine->packet_length > 0) {
        return true;
    }
    if (engine->uplink_lost) {
        return false;
    }
    do {
        length = read(engine->packet_fd, engine->packet, sizeof(engine->packet));
    } while (length < 0 && errno == EINTR);
    if (length > 0) {
        engine->packet_length = length;
        return true;
    }
    if (length == 0 || errno != EAGAIN) {
        engine_lose_uplink(engine);
    }
    return false;
}

static void receive_one(struct engine *engine, struct queue *queue)
{
    enum delivery result = deliver(engine, &queue->ring, queue->ring.setup.mergeable);

    queue->held = result == NO_BUFFERS;
    switch (result) {
    case DELIVERED:
        queue->count.packets++;
        queue->count.bytes += engine->packet_length;
        engine->packet_length = 0;
        break;
    case TOO_LONG:
        queue->count.dropped++;
        engine->packet_length = 0;
        break;
    case NO_BUFFERS:
        break;
    case BAD_RING:
        engine_break(engine, ENGINE_RX, queue->ring.error);
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

bool packets_receive(struct engine *engine)
{
    struct queue *queue = &engine->queue[ENGINE_RX];
    bool live = engine_is_live(engine, ENGINE_RX);
    unsigned int moved = 0;

    if (live && !look_at_buffers(engine, &queue->ring)) {
        engine_break(engine, ENGINE_RX, queue->ring.error);
        return false;
    }
    if (!live && engine_leaves_packets(engine)) {
        return false;
    }
    for (; moved < BATCH && fetch_packet(engine); moved++) {
        if (!live) {            /* nobody receives: what comes is lost, as on any NIC */
            queue->count.dropped++;
            engine->packet_length = 0;
            continue;
        }
        receive_one(engine, queue);
        if (queue->held || engine->fault != NULL) {
            break;
        }
    }
    if (live && engine->fault == NULL && moved > 0) {
        interrupt_for(engine, ENGINE_RX);
    }
    return moved > 0;
}

/* --- transmit: driver to uplink --- */

/* Leave the first bytes of a chain out. Returns how many segments at its start are to be passed over. */
static unsigned int skip(struct ring_chain *chain, size_t bytes)
{
    unsigned int i = 0;

    while (i < chain->segments && bytes >= chain->segment[i].iov_len) {
        bytes -= chain->segment[i].iov_len;
        i++;
    }
    if (i < chain->segments) {
        chain->segment[i].iov_base = (uint8_t *)chain->segment[i].iov_base + bytes;
        chain->segment[i].iov_len -= bytes;
    }
    return i;
}

/* Send the chain at hand. False: not now, or never (fault). */
static bool transmit_one(struct engine *engine, struct queue *queue)
{
    struct ring_chain *chain = &engine->chain;
    unsigned int from;
    ssize_t sent = -1;

    if (chain->bytes < NET_HEADER_SIZE) {
        engine_break(engine, ENGINE_TX, "a transmit buffer is shorter than the packet header");
        return false;
    }
    from = skip(chain, NET_HEADER_SIZE);
    if (from < chain->segments && chain->bytes <= MAX_PACKET && !engine->uplink_lost) {
        do {
            sent = writev(engine->packet_fd, chain->segment + from, chain->segments - from);
        } while (sent < 0 && errno == EINTR);
        if (sent < 0 && errno == EAGAIN) {
            queue->held = true;
            return false;
        }
        if (sent < 0 && errno == EFAULT) {
            engine_break(engine, ENGINE_TX, "memory has gone under a transmit buffer");
            return false;
        }
    }
    if (sent < 0) {             /* not a packet, or no uplink: the driver need not know */
        queue->count.dropped++;
    } else {
        queue->count.packets++;
        queue->count.bytes += sent;
    }
    ring_use(&queue->ring, &(struct ring_element){ .head = chain->head }, 1);
    return true;
}

bool packets_transmit(struct engine *engine)
{
    struct queue *queue = &engine->queue[ENGINE_TX];
    struct ring *ring = &queue->ring;
    unsigned int moved = 0;

    if (!engine_is_live(engine, ENGINE_TX)) {
        return false;
    }
    queue->held = false;
    if (ring_resolve(ring, &engine->dma)) {
        ring_disarm(ring);
        while (moved < BATCH && ring_available(ring) > 0 &&
               ring_chain_at(ring, &engine->dma, 0, false, &engine->chain) && transmit_one(engine, queue)) {
            moved++;
        }
    }
    if (ring->error != NULL) {
        engine_break(engine, ENGINE_TX, ring->error);
    } else if (moved > 0) {
        interrupt_for(engine, ENGINE_TX);
    }
    return moved > 0;
}
