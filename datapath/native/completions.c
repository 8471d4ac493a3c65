/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "completions.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "eventfd.h"
#include "guard.h"
#include "thread.h"

#define LONGEST_NAP_US 1000000u

struct entry {
    bool added;
    bool owed;                  /* something was completed while there was no eventfd to interrupt by */
    int call_fd;
    struct completion_queue queue;
    struct completions_counters count;
};

struct completions {
    /* Guards all below. The thread has it except while it sleeps or lets callers in. */
    pthread_mutex_t lock;
    pthread_cond_t no_callers;
    _Atomic unsigned int callers;
    pthread_t thread;
    struct completions_setup setup;
    int wake_fd;
    int broken_fd;
    bool stop;
    bool channel_lost;
    unsigned int added;         /* queues */
    unsigned int empty;         /* looks in a row that found nothing */
    unsigned int nap_us;
    struct entry entry[];
};

static void enter(struct completions *completions)
{
    completions->callers++;
    pthread_mutex_lock(&completions->lock);
}

static void leave(struct completions *completions)
{
    if (--completions->callers == 0) {
        pthread_cond_signal(&completions->no_callers);
    }
    pthread_mutex_unlock(&completions->lock);
}

/* While it looks without a pause, too, callers come first; the mutex alone would starve them. */
static void let_callers_in(struct completions *completions)
{
    while (completions->callers > 0) {
        pthread_cond_wait(&completions->no_callers, &completions->lock);
    }
}

/* --- queues --- */

static void interrupt_guest(struct entry *entry)
{
    entry->owed = entry->call_fd < 0;
    entry->count.interrupts += !entry->owed && signal_other(entry->call_fd);
}

/* How many completions there are of a queue; the guest has been interrupted for them. */
static unsigned int serve(struct completions *completions, struct entry *entry)
{
    bool failed = false;
    unsigned int completed = completion_queue_look(&entry->queue, &failed);

    if (completed > 0) {
        entry->count.completions += completed;
        interrupt_guest(entry);
    }
    if (failed) {
        entry->count.errors++;
        signal_eventfd(completions->broken_fd);
    }
    return completed;
}

/* The most completions that a queue had. An armed one says so itself where nothing else is to be relied on. */
static unsigned int look(struct completions *completions)
{
    const bool armed_too = completions->setup.mode != COMPLETIONS_INTERRUPTS;
    unsigned int most = 0;

    for (unsigned int i = 0; i < completions->setup.queues; i++) {
        struct entry *entry = &completions->entry[i];

        if (entry->added && (armed_too || !entry->queue.armed)) {
            unsigned int completed = serve(completions, entry);

            most = completed > most ? completed : most;
        }
    }
    return most;
}

struct arming {
    struct completion_queue *queue;
    void *page;
};

static void arm(void *argument)
{
    struct arming *arming = argument;

    completion_queue_arm(arming->queue, arming->page);
}

/* Arm the queues that are not. True: meanwhile one has completed something. */
static bool arm_all(struct completions *completions)
{
    bool found = false;

    for (unsigned int i = 0; i < completions->setup.queues; i++) {
        struct entry *entry = &completions->entry[i];
        struct arming arming = { &entry->queue, completions->setup.page };

        if (!entry->added || entry->queue.armed) {
            continue;
        }
        if (!guard_run(arm, &arming)) {
            signal_eventfd(completions->broken_fd);
        }
        found |= serve(completions, entry) > 0;
    }
    return found;
}

/* --- the thread --- */

static void drain(int fd)
{
    uint64_t ignored;

    while (read(fd, &ignored, sizeof(ignored)) < 0 && errno == EINTR) {
    }
}

/* Sleep until a call or, if `events`, the device has something, or the time is over; NULL: there is none. */
static void sleep_until(struct completions *completions, bool events, const struct timespec *longest)
{
    struct pollfd fds[] = {
        { .fd = completions->wake_fd, .events = POLLIN },
        { .fd = completions->setup.channel_fd, .events = POLLIN },
    };

    pthread_mutex_unlock(&completions->lock);
    ppoll(fds, events ? 2 : 1, longest, NULL);
    pthread_mutex_lock(&completions->lock);
    if (fds[0].revents != 0) {
        drain(completions->wake_fd);
    }
}

/* Take the events that there are: what raised one is armed no more. */
static void take_events(struct completions *completions)
{
    uint64_t cookie;
    ssize_t got;

    while ((got = read(completions->setup.channel_fd, &cookie, sizeof(cookie))) == sizeof(cookie)) {
        if (cookie < completions->setup.queues) {
            completions->entry[cookie].queue.armed = false;
        }
    }
    if (got >= 0 || (errno != EAGAIN && errno != EINTR)) {
        completions->channel_lost = true;
        signal_eventfd(completions->broken_fd);
    }
}

static void wait_for_event(struct completions *completions)
{
    sleep_until(completions, !completions->channel_lost, NULL);
    if (!completions->channel_lost) {
        take_events(completions);
    }
    completions->empty = 0;
    completions->nap_us = completions->setup.event_us;
}

/* Pause between two looks, of which the last found `most` completions of a queue. */
static void nap(struct completions *completions, unsigned int most)
{
    if (completions->setup.mode == COMPLETIONS_ADAPTIVE && most == 0) {
        completions->nap_us += completions->setup.event_us;
    } else if (completions->setup.mode == COMPLETIONS_ADAPTIVE) {
        completions->nap_us /= most;
    }
    if (completions->nap_us > LONGEST_NAP_US) {
        completions->nap_us = LONGEST_NAP_US;
    }
    if (completions->nap_us > 0) {
        const struct timespec time = { completions->nap_us / 1000000, completions->nap_us % 1000000 * 1000 };

        sleep_until(completions, false, &time);
    } else {
        pthread_mutex_unlock(&completions->lock);
        sched_yield();
        pthread_mutex_lock(&completions->lock);
    }
}

/* Whether there is traffic enough to look again after a pause. */
static bool goes_on(struct completions *completions, unsigned int most)
{
    completions->empty = most > 0 ? 0 : completions->empty + 1;
    return completions->setup.mode != COMPLETIONS_INTERRUPTS &&
           completions->empty <= completions->setup.no_traffic_time;
}

static void *completions_main(void *argument)
{
    struct completions *completions = argument;

    pthread_mutex_lock(&completions->lock);
    while (!completions->stop) {
        unsigned int most = look(completions);

        if (completions->added == 0) {
            sleep_until(completions, false, NULL);
        } else if (goes_on(completions, most)) {
            nap(completions, most);
        } else if (arm_all(completions)) {
            completions->empty = 0;
        } else {
            wait_for_event(completions);
        }
        let_callers_in(completions);
    }
    pthread_mutex_unlock(&completions->lock);
    return NULL;
}

/* --- calls --- */

static void release(struct completions *completions)
{
    if (completions->wake_fd >= 0) {
        close(completions->wake_fd);
    }
    if (completions->broken_fd >= 0) {
        close(completions->broken_fd);
    }
    pthread_cond_destroy(&completions->no_callers);
    pthread_mutex_destroy(&completions->lock);
    free(completions);
}

static int make_non_blocking(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    return flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? -errno : 0;
}

static void end_thread(struct completions *completions)
{
    enter(completions);
    completions->stop = true;
    signal_eventfd(completions->wake_fd);
    leave(completions);
    pthread_join(completions->thread, NULL);
}

static int pin_thread(struct completions *completions)
{
    cpu_set_t processor;
    int error;

    if (completions->setup.core < 0) {
        return 0;
    }
    if (completions->setup.core >= CPU_SETSIZE) {
        return -EINVAL;
    }
    CPU_ZERO(&processor);
    CPU_SET(completions->setup.core, &processor);
    error = pthread_setaffinity_np(completions->thread, sizeof(processor), &processor);
    return -error;
}

static int start(struct completions *completions)
{
    int error = 0;

    completions->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    completions->broken_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (completions->wake_fd < 0 || completions->broken_fd < 0) {
        error = -errno;
    }
    if (!error) {
        error = make_non_blocking(completions->setup.channel_fd);
    }
    if (!error) {
        error = guard_install();
    }
    if (!error) {
        error = thread_start(&completions->thread, "completions", completions_main, completions);
    }
    if (error) {
        return error;
    }
    error = pin_thread(completions);
    if (error) {
        end_thread(completions);
    }
    return error;
}

int completions_open(const struct completions_setup *setup, struct completions **opened)
{
    struct completions *completions;
    int error;

    if (setup->mode > COMPLETIONS_INTERRUPTS || setup->page == NULL) {
        return -EINVAL;
    }
    completions = calloc(1, sizeof(*completions) + setup->queues * sizeof(struct entry));
    if (completions == NULL) {
        return -ENOMEM;
    }
    completions->setup = *setup;
    completions->nap_us = setup->event_us;
    pthread_mutex_init(&completions->lock, NULL);
    pthread_cond_init(&completions->no_callers, NULL);
    error = start(completions);
    if (error) {
        release(completions);
        return error;
    }
    *opened = completions;
    return 0;
}

static int add(struct completions *completions, struct entry *entry, const struct completion_source *source,
               int call_fd)
{
    if (entry->added) {
        return -EBUSY;
    }
    if (!completion_queue_take(&entry->queue, source)) {
        return -EINVAL;
    }
    entry->added = true;
    entry->call_fd = call_fd;
    interrupt_guest(entry);
    completions->added++;
    completions->empty = 0;
    signal_eventfd(completions->wake_fd);
    return 0;
}

int completions_add(struct completions *completions, unsigned int index, const struct completion_source *source,
                    int call_fd)
{
    int error;

    if (index >= completions->setup.queues) {
        return -EINVAL;
    }
    enter(completions);
    error = add(completions, &completions->entry[index], source, call_fd);
    leave(completions);
    return error;
}

/* The queue of this number, NULL if there is none. */
static struct entry *find(struct completions *completions, unsigned int index)
{
    return index < completions->setup.queues && completions->entry[index].added ? &completions->entry[index] : NULL;
}

int completions_set_call(struct completions *completions, unsigned int index, int call_fd)
{
    struct entry *entry;

    enter(completions);
    entry = find(completions, index);
    if (entry != NULL) {
        entry->call_fd = call_fd;
        if (entry->owed) {
            interrupt_guest(entry);
        }
    }
    leave(completions);
    return entry != NULL ? 0 : -ENOENT;
}

void completions_remove(struct completions *completions, unsigned int index)
{
    struct entry *entry;

    enter(completions);
    entry = find(completions, index);
    if (entry != NULL) {
        if (serve(completions, entry) == 0) {
            interrupt_guest(entry);
        }
        entry->added = false;
        completions->added--;
    }
    leave(completions);
}

struct completions_counters completions_count(struct completions *completions, unsigned int index)
{
    struct completions_counters count = { 0 };

    if (index < completions->setup.queues) {
        enter(completions);
        count = completions->entry[index].count;
        leave(completions);
    }
    return count;
}

int completions_broken_fd(struct completions *completions)
{
    return completions->broken_fd;
}

void completions_close(struct completions *completions)
{
    end_thread(completions);
    release(completions);
}
