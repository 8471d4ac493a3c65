/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Gives queues to their engines, and takes them back. */
#ifndef MLX5_EMULATION_QUEUE_PATHS_H
#define MLX5_EMULATION_QUEUE_PATHS_H

#include "queues.h"

/* Let a queue move packets if it is READY and, to receive, steered to; else not. */
enum syndrome queue_paths_settle(struct device *device, struct virtq *virtq);

/* Take a queue back; its indices are final then. Harmless when it does not move. */
void queue_paths_stop(struct device *device, struct virtq *virtq);

/* Follow the queue's dirty bitmap. */
enum syndrome queue_paths_log(struct device *device, struct virtq *virtq);

/* Add what the queue has done since this was called last to its counters. */
void queue_paths_count(struct device *device, struct virtq *virtq);

#endif
