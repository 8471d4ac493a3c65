/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "thread.h"

#include <signal.h>

int thread_start(pthread_t *thread, const char *name, void *(*body)(void *argument), void *argument)
{
    static const int faults[] = { SIGBUS, SIGFPE, SIGILL, SIGSEGV };
    sigset_t blocked, before;
    int error;

    sigfillset(&blocked);
    for (unsigned int i = 0; i < sizeof(faults) / sizeof(faults[0]); i++) {
        sigdelset(&blocked, faults[i]);
    }
    pthread_sigmask(SIG_BLOCK, &blocked, &before);
    error = pthread_create(thread, NULL, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error) {
        pthread_setname_np(*thread, name);
    }
    return -error;
}
