/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Survives memory that vanishes: a mapped file that somebody truncates raises SIGBUS in whoever touches
 * the lost part. Code that touches such memory runs under guard_run(); any other SIGBUS does what it
 * would have done without this.
 */
#ifndef LIBVIRT_VDPA_GUARD_H
#define LIBVIRT_VDPA_GUARD_H

#include <stdbool.h>

/* cffi: begin */
/* cffi: end */

/* Install the process-wide handler. Idempotent, from any thread. 0 or a negative errno. */
int guard_install(void);

/*
 * Run body(argument). False: it met SIGBUS and was left in the middle, with whatever it held still held;
 * so it must take no lock and allocate nothing. Does not nest. The calling thread must not block SIGBUS.
 */
bool guard_run(void (*body)(void *argument), void *argument);

#endif
