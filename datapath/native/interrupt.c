/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "interrupt.h"

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#define BRIEFLY_NS 20000000
#define REPEAT_NS 1000000

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

static void do_nothing(int signal)
{
    (void)signal;
}

int interrupt_install(void)
{
    const struct sigaction interrupting = { .sa_handler = do_nothing };     /* no SA_RESTART */

    return sigaction(INTERRUPT_SIGNAL, &interrupting, NULL) < 0 ? -errno : 0;
}

int interrupt(int fd)
{
    const uint64_t one = 1;

    /* Any other error is as good as done: a full counter that does not block has yet to be looked at. */
    return write(fd, &one, sizeof(one)) < 0 && errno == EINTR ? -EINTR : 0;
}

int interrupt_briefly(int fd)
{
    const struct itimerspec when = { .it_value.tv_nsec = BRIEFLY_NS, .it_interval.tv_nsec = REPEAT_NS };
    struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = INTERRUPT_SIGNAL };
    timer_t timer;
    int result = interrupt_install();

    event.sigev_notify_thread_id = gettid();
    if (result < 0 || timer_create(CLOCK_MONOTONIC, &event, &timer) < 0) {
        return result < 0 ? result : -errno;
    }
    timer_settime(timer, 0, &when, NULL);
    result = interrupt(fd);
    timer_delete(timer);
    return result;
}

void interrupt_get_out(pthread_t thread)
{
    pthread_kill(thread, INTERRUPT_SIGNAL);
}
