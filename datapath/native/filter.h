/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The receive filter of a VF: which of the frames that come are for its driver, by destination address and VLAN
 * (virtio 1.3 sections 5.1.6.5.1 to 5.1.6.5.3). Private to the engine.
 */
#ifndef LIBVIRT_VDPA_FILTER_H
#define LIBVIRT_VDPA_FILTER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
#define FILTER_MAC_SIZE 6
#define FILTER_MAX_MACS 256
/* Bytes of a bit for each VLAN. */
#define FILTER_VLAN_BYTES 512

/* What passes of a kind: nothing, what is listed, everything. */
#define FILTER_NONE 0
#define FILTER_LISTED 1
#define FILTER_ALL 2

struct filter {
    bool on;                    /* without this everything passes */
    bool promiscuous;           /* nor does anything below count with this */
    bool broadcast;
    uint8_t unicast;
    uint8_t multicast;
    uint8_t vlan;
    unsigned int macs;          /* how many are listed, of whichever kind */
    uint8_t mac[FILTER_MAX_MACS][FILTER_MAC_SIZE];
    uint8_t vlans[FILTER_VLAN_BYTES];   /* VLAN n is bit n % 8 of byte n / 8 */
};
/* cffi: end */

/* Whether a frame is for the driver. */
bool filter_admits(const struct filter *filter, const uint8_t *frame, size_t length);

#endif
