/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which memory a device has written when it gives a chain of descriptors back, for the dirty log.
 */
#ifndef LIBVIRT_VDPA_WRITTEN_H
#define LIBVIRT_VDPA_WRITTEN_H

#include <stdint.h>

#include "dma.h"
#include "log.h"
#include "split.h"

/* cffi: begin */
/* cffi: end */

/*
 * Mark the first `length` bytes of what the device may write of a chain, in the ring's own table of `size`
 * descriptors or an indirect one. What a guest has spoilt since the device took the chain ends the walk
 * without an error: it is the guest's own memory that is moved incompletely.
 */
void written_mark(struct dirty_log *log, struct dma_table *table, const struct ring_descriptor *descriptors,
                  uint16_t size, uint16_t head, uint32_t length);

#endif
