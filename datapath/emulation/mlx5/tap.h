/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A TAP interface for an uplink (Linux Documentation/networking/tuntap.rst): up, and maybe in a bridge, with a
 * queue for each pair. It vanishes with its descriptors. datapath/emulation/tap.py makes the same for NICs that
 * are programs of their own; nothing of Python runs here.
 */
#ifndef MLX5_EMULATION_TAP_H
#define MLX5_EMULATION_TAP_H

#include <stdbool.h>

/*
 * Make one, with its first queue in use. 0, or -errno with a line on standard error.
 *
 * bridge: may be empty. fd: gets as many non-blocking descriptors as there are pairs.
 */
int tap_open(const char *name, const char *bridge, unsigned int mtu, unsigned int pairs, int *fd);

/* Have the kernel use a queue, or not; what waits in one that goes out of use is lost. A TAP of one queue has it. */
void tap_use(int fd, bool on);

/* Have the kernel hand over frames whose checksum is still to be made, or not. */
void tap_accept(int fd, bool checksums);

/* Throw away what waits in a queue. */
void tap_drain(int fd);

#endif
