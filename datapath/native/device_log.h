/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A dirty log (log.h) that a device keeps by itself, setting bits by DMA: what it does not mark is marked here,
 * and what it does is counted. Any thread may call. -EFAULT: the bitmap has vanished, for its file has shrunk.
 */
#ifndef LIBVIRT_VDPA_DEVICE_LOG_H
#define LIBVIRT_VDPA_DEVICE_LOG_H

#include <stdint.h>

/* cffi: begin */
/* Mark `length` bytes at a guest physical address at once. Returns how many pages lie beyond the bitmap. */
int64_t device_log_mark(void *bitmap, uint64_t bytes, uint64_t address, uint64_t length);

/*
 * Count the bits that are set and were not at the last look, of which `before` has a copy as long. Both begin
 * at a multiple of 8 bytes.
 */
int64_t device_log_look(const void *bitmap, void *before, uint64_t bytes);
/* cffi: end */

#endif
