/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A VF without an uplink: each frame that its driver sends comes back to it on the same queue pair, with the two
 * Ethernet addresses exchanged. For measurements of the virtqueues alone. Private to the engine.
 */
#ifndef LIBVIRT_VDPA_ECHO_H
#define LIBVIRT_VDPA_ECHO_H

#include <stddef.h>
#include <sys/types.h>

#include "worker.h"

/* cffi: begin */
/* cffi: end */

/* Frames after which the driver is shown what has been done: each time its processor loses the index from its cache. */
#define ECHO_SHOWN 32

/*
 * Send back the frame of so many bytes that the engine's chain holds from a segment on. Returns them, or a
 * negative errno: -EAGAIN, there are no buffers; others, it is lost.
 */
ssize_t echo_frame(struct engine *engine, unsigned int pair, unsigned int from, size_t length);

/* Show the driver all that has been sent and has come back. */
void echo_show(struct engine *engine, unsigned int pair);

/* Have the processor fetch what the next ECHO_SHOWN frames of a pair will need. */
void echo_warm(struct engine *engine, unsigned int pair);

#endif
