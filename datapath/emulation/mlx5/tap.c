/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "tap.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

/* struct virtio_net_hdr_v1, as on the rings (virtio 1.3 section 5.1.6). */
#define HEADER_SIZE 12
#define LONGEST_FRAME 65536

static int failed(const char *name, const char *what, const char *remedy)
{
    const int error = errno;

    fprintf(stderr, "emulated mlx5: TAP %s: %s%s; %s\n", name, what, strerror(error), remedy);
    return -error;
}

static void set_name(struct ifreq *request, const char *name)
{
    memset(request, 0, sizeof(*request));
    strncpy(request->ifr_name, name, IFNAMSIZ - 1);
}

static int open_queue(const char *name, bool first, bool several)
{
    const int little_endian = 1, header = HEADER_SIZE;
    struct ifreq request;
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

    if (fd < 0) {
        return failed(name, "/dev/net/tun: ", "is the tun module loaded?");
    }
    set_name(&request, name);
    /* Exclusive: one of that name may be a persistent TAP of somebody else's. */
    request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (first ? IFF_TUN_EXCL : 0) |
                        (several ? IFF_MULTI_QUEUE : 0);
    if (ioctl(fd, TUNSETIFF, &request) < 0 || ioctl(fd, TUNSETVNETHDRSZ, &header) < 0 ||
        ioctl(fd, TUNSETVNETLE, &little_endian) < 0) {
        const int result = failed(name, "", "it needs CAP_NET_ADMIN and a free name");

        close(fd);
        return result;
    }
    return fd;
}

static int set_up(int control, const char *name, unsigned int mtu)
{
    struct ifreq request;

    set_name(&request, name);
    request.ifr_mtu = mtu;
    if (ioctl(control, SIOCSIFMTU, &request) < 0) {
        return -1;
    }
    set_name(&request, name);
    if (ioctl(control, SIOCGIFFLAGS, &request) < 0) {
        return -1;
    }
    request.ifr_flags |= IFF_UP;
    return ioctl(control, SIOCSIFFLAGS, &request);
}

static int enslave(int control, const char *name, const char *bridge)
{
    struct ifreq request, whose;

    set_name(&request, name);
    if (ioctl(control, SIOCGIFINDEX, &request) < 0) {
        return -1;
    }
    set_name(&whose, bridge);
    whose.ifr_ifindex = request.ifr_ifindex;
    return ioctl(control, SIOCBRADDIF, &whose);
}

static int configure(const char *name, const char *bridge, unsigned int mtu)
{
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int result = 0;

    if (control < 0 || set_up(control, name, mtu) < 0) {
        result = failed(name, "", "it cannot be brought up");
    } else if (bridge[0] != '\0' && enslave(control, name, bridge) < 0) {
        result = failed(name, "its bridge: ", "does the bridge exist?");
    }
    if (control >= 0) {
        close(control);
    }
    return result;
}

int tap_open(const char *name, const char *bridge, unsigned int mtu, unsigned int pairs, int *fd)
{
    unsigned int opened = 0;
    int result = 0;

    while (result >= 0 && opened < pairs) {
        result = open_queue(name, opened == 0, pairs > 1);
        if (result >= 0) {
            fd[opened++] = result;
        }
    }
    if (result >= 0) {
        result = configure(name, bridge, mtu);
    }
    if (result < 0) {
        while (opened > 0) {
            close(fd[--opened]);
        }
        return result;
    }
    /* From the end, for the last queue takes the place of one that goes. */
    for (unsigned int i = pairs; i > 1; i--) {
        tap_use(fd[i - 1], false);
    }
    return 0;
}

void tap_use(int fd, bool on)
{
    struct ifreq request = { .ifr_flags = on ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE };

    /* It fails where the queue is as it should be, the TAP has but one, or somebody has removed it. */
    (void)ioctl(fd, TUNSETQUEUE, &request);
}

void tap_accept(int fd, bool checksums)
{
    (void)ioctl(fd, TUNSETOFFLOAD, checksums ? TUN_F_CSUM : 0);
}

void tap_drain(int fd)
{
    char frame[LONGEST_FRAME];

    while (read(fd, frame, sizeof(frame)) > 0) {
    }
}
