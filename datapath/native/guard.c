/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "guard.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int install_result;
static struct sigaction previous;

/*
 * Where the thread's guarded body returns to, while it runs. The initial-exec model needs no call to reach
 * it, which a signal handler in a loaded module could not make safely.
 */
static _Thread_local sigjmp_buf *volatile way_out __attribute__((tls_model("initial-exec")));

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
    bool sent = info->si_code <= 0;     /* by kill() or the like: no access failed */

    if (way_out != NULL && !sent) {
        siglongjmp(*way_out, 1);
    }
    if ((previous.sa_flags & SA_SIGINFO) != 0 && !sent) {
        /* It may be the guard of another module in this process, which will want to be there again, as will this. */
        previous.sa_sigaction(signal, info, context);
        return;
    }
    /* Not ours. A failed access is tried again on return, a sent signal has to be sent again. */
    sigaction(SIGBUS, &previous, NULL);
    if (sent) {
        raise(signal);
    }
}

static void install(void)
{
    /*
     * SA_NODEFER: the handler is left by a jump that does not restore the signal mask, which saves
     * sigsetjmp() a system call each time.
     */
    struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK };

    sigemptyset(&action.sa_mask);
    install_result = sigaction(SIGBUS, &action, &previous) < 0 ? -errno : 0;
}

int guard_install(void)
{
    pthread_once(&once, install);
    return install_result;
}

bool guard_run(void (*body)(void *argument), void *argument)
{
    sigjmp_buf here;

    if (sigsetjmp(here, 0) != 0) {
        way_out = NULL;
        return false;
    }
    way_out = &here;
    body(argument);
    way_out = NULL;
    return true;
}
