/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Interrupts to a driver: writes to an eventfd that the client gave. The client shares its flags, so it can
 * take O_NONBLOCK away, fill the counter, and make the writer wait for ever. Here the writer gets out.
 */
#ifndef LIBVIRT_VDPA_INTERRUPT_H
#define LIBVIRT_VDPA_INTERRUPT_H

#include <pthread.h>

/* cffi: begin */
/* Interrupt, or give up after some milliseconds: -EINTR. For what happens seldom. */
int interrupt_briefly(int fd);
/* cffi: end */

/* Gets a writer out, by a handler that does nothing. Threads that interrupt must not block it. */
#define INTERRUPT_SIGNAL SIGURG

/* Install that handler. Idempotent. 0 or a negative errno. */
int interrupt_install(void);

/* Interrupt. -EINTR: the eventfd blocks, and another thread has called interrupt_get_out(). */
int interrupt(int fd);

/* Get a thread out of interrupt(), should it be stuck there. It may come a moment too early: repeat. */
void interrupt_get_out(pthread_t thread);

#endif
