/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* How an eventfd is signalled, with a lock held for which others wait. */
#ifndef LIBVIRT_VDPA_EVENTFD_H
#define LIBVIRT_VDPA_EVENTFD_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <unistd.h>

/* One that does not block. False: it is full, or none. */
static inline bool signal_eventfd(int fd)
{
    static const uint64_t one = 1;

    return write(fd, &one, sizeof(one)) == sizeof(one);
}

/* One that somebody else shares. They share its flags, so it may be one that blocks when full. */
static inline bool signal_other(int fd)
{
    struct pollfd room = { .fd = fd, .events = POLLOUT };

    return poll(&room, 1, 0) == 1 && (room.revents & POLLOUT) && signal_eventfd(fd);
}

#endif
