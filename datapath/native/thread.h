/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Threads that run C alone, within a program that has signal handlers of its own. */
#ifndef LIBVIRT_VDPA_THREAD_H
#define LIBVIRT_VDPA_THREAD_H

#include <pthread.h>

/* cffi: begin */
/* cffi: end */

/*
 * Start a thread, which does not run the program's signal handlers; faults of its own it takes.
 *
 * name: up to 15 characters. 0 or a negative errno.
 */
int thread_start(pthread_t *thread, const char *name, void *(*body)(void *argument), void *argument);

#endif
