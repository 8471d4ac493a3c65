/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "kick_dpdk.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include <rte_io.h>

#include "used_entries.h"

#define SECOND 1e9
/* What a doorbell holds that has not been rung. */
#define AT_REST 0xffff

struct kicks {
    pthread_t thread;
    int epoll_fd;
    struct doorbell doorbell;
};

static void ring(const struct doorbell *doorbell, uint16_t queue)
{
    static const uint64_t one = 1;

    if (doorbell->mapped != NULL) {
        rte_write16(queue, doorbell->mapped);
    } else {
        /* Cannot fail: each ring is waited for. */
        ssize_t ignored = write(doorbell->fd, &one, sizeof(one));

        (void)ignored;
    }
}

/* As in DPDK, an event holds the queue below and the eventfd above. */
static void *relay(void *argument)
{
    struct kicks *kicks = argument;
    struct epoll_event events[2];

    for (;;) {
        int count = epoll_wait(kicks->epoll_fd, events, 2, -1);

        for (int n = 0; n < count; n++) {
            int kick_fd = events[n].data.u64 >> 32;
            uint64_t value;

            while (read(kick_fd, &value, sizeof(value)) < 0 && (errno == EINTR || errno == EAGAIN)) {
            }
            ring(&kicks->doorbell, events[n].data.u32);
        }
    }
    return NULL;
}

struct kicks *dpdk_kicks_begin(int kick_fd, struct doorbell doorbell)
{
    struct kicks *kicks = calloc(1, sizeof(*kicks));
    struct epoll_event wanted = { .events = EPOLLIN | EPOLLPRI, .data.u64 = (uint64_t)kick_fd << 32 };

    if (kicks == NULL) {
        return NULL;
    }
    kicks->doorbell = doorbell;
    kicks->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (kicks->epoll_fd < 0 || epoll_ctl(kicks->epoll_fd, EPOLL_CTL_ADD, kick_fd, &wanted) < 0 ||
        pthread_create(&kicks->thread, NULL, relay, kicks) != 0) {
        if (kicks->epoll_fd >= 0) {
            close(kicks->epoll_fd);
        }
        free(kicks);
        return NULL;
    }
    return kicks;
}

void dpdk_kicks_end(struct kicks *kicks)
{
    /* epoll_wait() is where it is cancelled, as in DPDK. */
    pthread_cancel(kicks->thread);
    pthread_join(kicks->thread, NULL);
    close(kicks->epoll_fd);
    free(kicks);
}

static int has_rung(const struct doorbell *doorbell)
{
    uint64_t value;

    if (doorbell->mapped != NULL) {
        return *doorbell->mapped != AT_REST;
    }
    return read(doorbell->fd, &value, sizeof(value)) == sizeof(value);
}

int kick_times(int kick_fd, struct doorbell doorbell, unsigned int pause, double *times, int count)
{
    static const uint64_t one = 1;
    const struct timespec rest = { .tv_nsec = pause * 1000L };

    for (int n = 0; n < count; n++) {
        double begin;

        nanosleep(&rest, NULL);
        if (doorbell.mapped != NULL) {
            *doorbell.mapped = AT_REST;
        }
        begin = nanoseconds();
        if (write(kick_fd, &one, sizeof(one)) != sizeof(one)) {
            return -1;
        }
        while (!has_rung(&doorbell)) {
            if (nanoseconds() - begin > SECOND) {
                return -1;
            }
        }
        times[n] = nanoseconds() - begin;
    }
    return 0;
}
