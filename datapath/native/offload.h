/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The header before each packet (virtio 1.3 section 5.1.6), by which driver and uplink leave checksums and
 * segmentation to each other: what of it may pass, after what was negotiated. Private to the engine.
 */
#ifndef LIBVIRT_VDPA_OFFLOAD_H
#define LIBVIRT_VDPA_OFFLOAD_H

#include <linux/virtio_net.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
/* cffi: end */

#define NET_HEADER_SIZE 12
/* Without num_buffers: where neither VERSION_1 nor MRG_RXBUF was accepted (section 5.1.6.1). */
#define SHORT_NET_HEADER_SIZE 10
_Static_assert(sizeof(struct virtio_net_hdr_v1) == NET_HEADER_SIZE, "section 5.1.6");
_Static_assert(sizeof(struct virtio_net_hdr) == SHORT_NET_HEADER_SIZE, "section 5.1.6.1");

/* Whether a header leaves nothing to anybody, so that the frame can go without it. */
bool offload_is_plain(const struct virtio_net_hdr_v1 *header);

/*
 * Make a driver's header fit for the uplink: fields that mean nothing are cleared (section 5.1.6.2.2). False:
 * it asks for what was not negotiated, or for what cannot be done to a frame of so many bytes.
 */
bool offload_transmit(struct virtio_net_hdr_v1 *header, uint64_t features, size_t frame_bytes);

/* The same for a header of the uplink's and a driver who has accepted `features` (section 5.1.6.4.1). */
bool offload_receive(struct virtio_net_hdr_v1 *header, uint64_t features);

/*
 * Whether the wire takes a frame: it is not longer than the MTU, its Ethernet header and a VLAN tag, or is going
 * to be cut into segments that are not (section 5.1.4.2). An MTU of 0 is none.
 */
bool offload_fits(const struct virtio_net_hdr_v1 *header, uint16_t mtu, size_t frame_bytes);

#endif
