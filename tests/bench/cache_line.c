/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "cache_line.h"

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define BLOCKS 11
#define ROUNDS 2000
/* A block that takes longer has met a processor that does something else. */
#define LIMIT_NS 100e6
/* Looks at the line between two at the clock. */
#define LOOKS 4096

struct line {
    _Alignas(128) uint32_t turn;        /* odd: it is the other one's */
    _Alignas(128) bool over;
    int there;
};

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e9 + time.tv_nsec;
}

static bool stay_on(int processor)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    return pthread_setaffinity_np(pthread_self(), sizeof(set), &set) == 0;
}

static void *answer(void *argument)
{
    struct line *line = argument;

    stay_on(line->there);
    while (!__atomic_load_n(&line->over, __ATOMIC_RELAXED)) {
        uint32_t turn = __atomic_load_n(&line->turn, __ATOMIC_ACQUIRE);

        if (turn % 2 == 1) {
            __atomic_store_n(&line->turn, turn + 1, __ATOMIC_RELEASE);
        }
    }
    return NULL;
}

/* Nanoseconds of a round in one block; negative: it took too long. */
static double block(struct line *line)
{
    double begin = now();

    for (unsigned int round = 0; round < ROUNDS; round++) {
        uint32_t turn = line->turn + 1;

        __atomic_store_n(&line->turn, turn, __ATOMIC_RELEASE);
        for (unsigned int looks = 1; __atomic_load_n(&line->turn, __ATOMIC_ACQUIRE) == turn; looks++) {
            if (looks % LOOKS == 0 && now() - begin > LIMIT_NS) {
                return -1;
            }
        }
    }
    return (now() - begin) / ROUNDS;
}

static int compare(const void *one, const void *other)
{
    double difference = *(const double *)one - *(const double *)other;

    return (difference > 0) - (difference < 0);
}

static double median_of_blocks(struct line *line)
{
    double times[BLOCKS];

    for (unsigned int i = 0; i < BLOCKS; i++) {
        times[i] = block(line);
        if (times[i] < 0) {
            return -1;
        }
    }
    qsort(times, BLOCKS, sizeof(*times), compare);
    return times[BLOCKS / 2];
}

double cache_line_round_trip(int here, int there)
{
    struct line line = { .there = there };
    cpu_set_t before;
    pthread_t thread;
    double found = -1;

    if (pthread_getaffinity_np(pthread_self(), sizeof(before), &before) != 0 || !stay_on(here)) {
        return -1;
    }
    if (pthread_create(&thread, NULL, answer, &line) == 0) {
        found = median_of_blocks(&line);
        __atomic_store_n(&line.over, true, __ATOMIC_RELAXED);
        pthread_join(thread, NULL);
    }
    pthread_setaffinity_np(pthread_self(), sizeof(before), &before);
    return found;
}
