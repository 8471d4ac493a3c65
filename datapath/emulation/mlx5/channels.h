/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Event channels, and who has subscribed to what. */
#ifndef MLX5_EMULATION_CHANNELS_H
#define MLX5_EMULATION_CHANNELS_H

#include "device.h"

/* Tell whoever has subscribed to an object's event. */
void channels_raise(struct device *device, const struct object *object, uint16_t event);

/* The object goes away. */
void channels_forget(struct device *device, const struct object *object);

/* Forget subscriptions that were left. */
void channels_close(struct device *device);

#endif
