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

/*
 * Move a batch of a queue pair. Returns whether anything moved. To be called with the engine's mutex and under
 * guard_run().
 */
bool packets_receive(struct engine *engine, unsigned int pair);
bool packets_transmit(struct engine *engine, unsigned int pair);

#endif
