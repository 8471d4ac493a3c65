/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The C heap of a process that stays: what its start has needed, it need not keep. */
#ifndef LIBVIRT_VDPA_HEAP_H
#define LIBVIRT_VDPA_HEAP_H

/* cffi: begin */
/* Return to the kernel what has been freed (malloc_trim(3)). */
void heap_trim(void);
/* cffi: end */

#endif
