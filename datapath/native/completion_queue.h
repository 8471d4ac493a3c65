/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A ConnectX' completion queue that is collapsed: the device writes every entry in the place of the first, and how
 * many there were shows by the counter in it. They are of empty messages that a virtqueue sends, each of which says
 * that the virtqueue has completed something. Whoever uses it sees to it that one thread at a time does.
 *
 * Facts are those of DPDK's drivers/vdpa/mlx5/mlx5_vdpa_event.c and drivers/common/mlx5/mlx5_prm.h.
 */
#ifndef LIBVIRT_VDPA_COMPLETION_QUEUE_H
#define LIBVIRT_VDPA_COMPLETION_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

/* cffi: begin */
/* Where in a page of the device (UAR) completion queues are armed. */
#define COMPLETION_QUEUE_ARM 0x20

/* What a queue is made of, in memory of this process that the device shares. */
struct completion_source {
    const void *entry;      /* the 64 bytes of the only entry */
    void *cq_record;        /* the queue's doorbell record: consumer index, and how it is armed; both big-endian */
    void *qp_record;        /* the receiver's: how many receives are posted, big-endian */
    uint32_t number;        /* the firmware's number of the queue */
    uint32_t size;          /* receives that are posted at most, a power of two up to 32768 */
};
/* cffi: end */

struct completion_queue {
    const uint32_t *last_word;  /* of the entry: counter, signature, opcode with owner */
    uint32_t *cq_record;
    uint32_t *qp_record;
    uint32_t number;
    uint32_t size;
    uint32_t consumed;      /* completions over the queue's life, modulo 2^32: the consumer index */
    uint16_t received;      /* of them since the receiver was reset: what the next entry's counter is */
    bool armed;             /* it need not be armed: the device raises an event for the next completion */
    bool outstanding;       /* nothing has been completed since it was armed */
    uint8_t sequence;       /* of armings that something was completed for, modulo 4 */
};

/*
 * Go on where the records say that the queue stands, whoever has worked on it before. Thus one may be taken, let go
 * and taken again. False: the source cannot be.
 */
bool completion_queue_take(struct completion_queue *queue, const struct completion_source *source);

/*
 * How much has been completed since the last look; the receives are posted again. What the device had written before
 * is seen after it. *error is set when the last of them has failed, as all will that follow: the receiver has to be
 * reset.
 */
unsigned int completion_queue_look(struct completion_queue *queue, bool *error);

/*
 * Ask for an event when there are more completions than have been seen. Those that come before the device has heard
 * it count for it, since it is told how many have been seen; look again nevertheless, which is quicker.
 *
 * page: of the device. It raises SIGBUS when the device is gone.
 */
void completion_queue_arm(struct completion_queue *queue, void *page);

#endif
