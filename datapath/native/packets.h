/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How packets get from the uplink into receive buffers, and from transmit buffers to the uplink. Private to
 * the engine.
 */
#ifndef LIBVIRT_VDPA_PACKETS_H
#define LIBVIRT_VDPA_PACKETS_H

#include <stdbool.h>

#include "worker.h"

/* cffi: begin */
/* cffi: end */

enum delivery { DELIVERED, NO_BUFFERS, UNFIT, BAD_RING };

/*
 * Put a packet into as many buffers as it takes (section 5.1.6.4). The first one's part comes last, because the
 * header in it says how many there are.
 */
enum delivery packets_deliver(struct engine *engine, struct ring *ring, struct uplink *uplink);

/*
 * Move a batch of a queue pair. Returns whether anything moved. To be called with the engine's mutex and under
 * guard_run().
 */
bool packets_receive(struct engine *engine, unsigned int pair);
bool packets_transmit(struct engine *engine, unsigned int pair);

/* Bytes of the header before each packet of a queue. */
static inline size_t header_of(const struct ring *ring)
{
    return ring->setup.short_header ? SHORT_NET_HEADER_SIZE : NET_HEADER_SIZE;
}

#endif
