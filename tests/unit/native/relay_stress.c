/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Relayed notifications under load: kicks from several threads while rings come and go. Made to run under the
 * sanitizers. Fails when a kick is neither forwarded nor waits in its eventfd for the next ring to come, or
 * when a doorbell is used after the removal of its ring.
 */
#include "relay.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define RINGS 8
#define ROUNDS 20000

static int kick[RINGS];
static int doorbell[RINGS];
static uint16_t notify_register[RINGS];
static atomic_bool done;
static atomic_ulong kicked[RINGS];

static void require(bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "relay_stress: %s\n", what);
        exit(1);
    }
}

static uint64_t drain(int fd)
{
    uint64_t value;

    return read(fd, &value, sizeof(value)) == sizeof(value) ? value : 0;
}

static void *kicker(void *argument)
{
    unsigned int seed = (unsigned int)(uintptr_t)argument;

    while (!atomic_load(&done)) {
        unsigned int ring = rand_r(&seed) % RINGS;

        require(eventfd_write(kick[ring], 1) == 0, "eventfd_write");
        atomic_fetch_add(&kicked[ring], 1);
    }
    return NULL;
}

static void come_and_go(struct relay *relay)
{
    unsigned int seed = 1;
    bool added[RINGS] = { false };

    for (int round = 0; round < ROUNDS; round++) {
        unsigned int ring = rand_r(&seed) % RINGS;

        if (added[ring]) {
            relay_remove(relay, ring);
            drain(doorbell[ring]);
            require(drain(doorbell[ring]) == 0, "doorbell rung after removal");
        } else {
            int kick_fd = rand_r(&seed) % 8 ? kick[ring] : -1;
            bool mapped = rand_r(&seed) % 2;

            require(relay_add(relay, ring, kick_fd, mapped ? -1 : doorbell[ring], &notify_register[ring]) == 0,
                    "relay_add");
            require(relay_ring(relay, ring) == 0, "relay_ring");
        }
        added[ring] = !added[ring];
    }
    for (unsigned int ring = 0; ring < RINGS; ring++) {
        relay_remove(relay, ring);
    }
}

/* Kicked while nobody listened, then added: the doorbell must ring. */
static void nothing_is_lost(struct relay *relay)
{
    for (unsigned int ring = 0; ring < RINGS; ring++) {
        struct timespec pause = { .tv_nsec = 1000000 };
        int tries = 5000;

        require(relay_count(relay, ring).kicks <= kicked[ring], "more kicks forwarded than made");
        require(relay_count(relay, ring).errors == 0, "errors counted");
        eventfd_write(kick[ring], 1);
        drain(doorbell[ring]);
        require(relay_add(relay, ring, kick[ring], doorbell[ring], NULL) == 0, "relay_add at the end");
        while (!drain(doorbell[ring])) {
            require(tries-- > 0, "a waiting kick was lost");
            nanosleep(&pause, NULL);
        }
    }
}

int main(void)
{
    pthread_t kickers[2];
    struct relay *relay;

    for (unsigned int ring = 0; ring < RINGS; ring++) {
        kick[ring] = eventfd(0, EFD_CLOEXEC);
        doorbell[ring] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
    require(relay_open(RINGS, &relay) == 0, "relay_open");
    for (uintptr_t i = 0; i < 2; i++) {
        require(pthread_create(&kickers[i], NULL, kicker, (void *)(i + 1)) == 0, "pthread_create");
    }
    come_and_go(relay);
    atomic_store(&done, true);
    for (int i = 0; i < 2; i++) {
        pthread_join(kickers[i], NULL);
    }
    nothing_is_lost(relay);
    relay_close(relay);
    for (unsigned int ring = 0; ring < RINGS; ring++) {
        close(kick[ring]);
        close(doorbell[ring]);
    }
    return 0;
}
