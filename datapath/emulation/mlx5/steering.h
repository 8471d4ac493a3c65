/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The root table of the receive side: matchers, and rules that lead what they match to a TIR. */
#ifndef MLX5_EMULATION_STEERING_H
#define MLX5_EMULATION_STEERING_H

#include "device.h"
#include "filter.h"

/* Whether some rule leads to a queue. */
bool steering_leads_to(const struct device *device, const struct object *queue);

/* What a queue gets of the frames that come: those to whom some rule that leads to it says. */
void steering_filter(const struct device *device, const struct object *queue, struct filter *filter);

/* Forget rules that were left. */
void steering_close(struct device *device);

#endif
