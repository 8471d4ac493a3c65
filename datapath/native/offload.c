/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "offload.h"

#include <endian.h>
#include <linux/if_ether.h>

/* Bytes of the tag of IEEE 802.1Q, which the MTU does not count. */
#define VLAN_TAG 4

/* What may be left to the receiving side, by the feature bits of one direction. */
struct rights {
    bool checksum;
    bool tcp4;
    bool tcp6;
    bool ecn;
};

static bool has(uint64_t features, unsigned int bit)
{
    return features >> bit & 1;
}

bool offload_is_plain(const struct virtio_net_hdr_v1 *header)
{
    return !(header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) && header->gso_type == VIRTIO_NET_HDR_GSO_NONE;
}

static bool may_segment(const struct virtio_net_hdr_v1 *header, const struct rights *rights)
{
    /* Section 5.1.6.2.1: segments need checksums of their own, so that one must have been left out. */
    if (!(header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) || header->gso_size == 0) {
        return false;
    }
    if ((header->gso_type & VIRTIO_NET_HDR_GSO_ECN) && !rights->ecn) {
        return false;
    }
    switch (header->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_TCPV4:
        return rights->tcp4;
    case VIRTIO_NET_HDR_GSO_TCPV6:
        return rights->tcp6;
    default:
        return false;
    }
}

static bool may_pass(const struct virtio_net_hdr_v1 *header, const struct rights *rights)
{
    if ((header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) && !rights->checksum) {
        return false;
    }
    return header->gso_type == VIRTIO_NET_HDR_GSO_NONE || may_segment(header, rights);
}

bool offload_transmit(struct virtio_net_hdr_v1 *header, uint64_t features, size_t frame_bytes)
{
    const struct rights rights = {
        .checksum = has(features, VIRTIO_NET_F_CSUM),
        .tcp4 = has(features, VIRTIO_NET_F_HOST_TSO4),
        .tcp6 = has(features, VIRTIO_NET_F_HOST_TSO6),
        .ecn = has(features, VIRTIO_NET_F_HOST_ECN),
    };

    header->flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM;
    header->num_buffers = 0;
    if (!may_pass(header, &rights)) {
        return false;
    }
    if (offload_is_plain(header)) {
        *header = (struct virtio_net_hdr_v1){ 0 };
        return true;
    }
    if (header->gso_type == VIRTIO_NET_HDR_GSO_NONE) {
        header->hdr_len = header->gso_size = 0;
    } else if (le16toh(header->hdr_len) > frame_bytes) {
        header->hdr_len = 0;        /* a hint that nobody may rely on */
    }
    return (size_t)le16toh(header->csum_start) + le16toh(header->csum_offset) + sizeof(uint16_t) <= frame_bytes;
}

bool offload_receive(struct virtio_net_hdr_v1 *header, uint64_t features)
{
    const struct rights rights = {
        .checksum = has(features, VIRTIO_NET_F_GUEST_CSUM),
        .tcp4 = has(features, VIRTIO_NET_F_GUEST_TSO4),
        .tcp6 = has(features, VIRTIO_NET_F_GUEST_TSO6),
        .ecn = has(features, VIRTIO_NET_F_GUEST_ECN),
    };
    uint8_t known = VIRTIO_NET_HDR_F_NEEDS_CSUM | (rights.checksum ? VIRTIO_NET_HDR_F_DATA_VALID : 0);

    header->flags &= known;
    return may_pass(header, &rights);
}

bool offload_fits(const struct virtio_net_hdr_v1 *header, uint16_t mtu, size_t frame_bytes)
{
    if (mtu == 0) {
        return true;
    }
    if (header->gso_type != VIRTIO_NET_HDR_GSO_NONE) {
        return le16toh(header->gso_size) <= mtu;
    }
    return frame_bytes <= (size_t)mtu + ETH_HLEN + VLAN_TAG;
}
