/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "filter.h"

#include <linux/if_ether.h>
#include <string.h>

/* Bytes of an 802.1Q tag, which stands where the type would, and the part of it that is the VLAN. */
#define TAG_SIZE 4
#define VLAN_MASK 0xfff
/* Marks addresses of groups, in their first byte. */
#define GROUP 1

static uint16_t load_be16(const uint8_t *from)
{
    return from[0] << 8 | from[1];
}

static bool lists(const struct filter *filter, const uint8_t *mac)
{
    for (unsigned int i = 0; i < filter->macs; i++) {
        if (memcmp(filter->mac[i], mac, FILTER_MAC_SIZE) == 0) {
            return true;
        }
    }
    return false;
}

static bool admits_address(const struct filter *filter, const uint8_t *mac)
{
    static const uint8_t broadcast[FILTER_MAC_SIZE] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };
    uint8_t which = mac[0] & GROUP ? filter->multicast : filter->unicast;

    if (memcmp(mac, broadcast, FILTER_MAC_SIZE) == 0) {
        return filter->broadcast;
    }
    return which == FILTER_ALL || (which == FILTER_LISTED && lists(filter, mac));
}

/* VLAN 0 is none: such a tag has a priority alone (IEEE 802.1Q). */
static bool admits_vlan(const struct filter *filter, const uint8_t *frame, size_t length)
{
    uint16_t vlan;

    if (length < ETH_HLEN + TAG_SIZE || load_be16(frame + 2 * ETH_ALEN) != ETH_P_8021Q) {
        return true;
    }
    vlan = load_be16(frame + ETH_HLEN) & VLAN_MASK;
    if (vlan == 0 || filter->vlan == FILTER_ALL) {
        return true;
    }
    return filter->vlan == FILTER_LISTED && (filter->vlans[vlan / 8] & 1 << vlan % 8) != 0;
}

bool filter_admits(const struct filter *filter, const uint8_t *frame, size_t length)
{
    if (!filter->on || filter->promiscuous) {
        return true;
    }
    /* What has no whole address is for nobody. */
    return length >= ETH_ALEN && admits_address(filter, frame) && admits_vlan(filter, frame, length);
}
