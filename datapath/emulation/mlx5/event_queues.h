/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How a virtqueue tells of what it has completed: it sends an empty message by a QP of the device to one of the
 * driver, whose CQ thus gets an entry; and an armed CQ raises an event.
 */
#ifndef MLX5_EMULATION_EVENT_QUEUES_H
#define MLX5_EMULATION_EVENT_QUEUES_H

#include "commands.h"

struct cq {
    struct object object;
    uint8_t *entries;           /* size << log_size entries, or one */
    uint32_t *record;           /* the driver's doorbells: consumer index, and how it is armed */
    unsigned int log_size;
    size_t entry_size;
    bool collapsed;             /* all entries are put in the place of the first */
    unsigned int uar_page;
    uint32_t produced;
    bool rung;                  /* the UAR's page has been written since the last event */
    uint64_t armed;             /* how it was armed when it raised that; more than 32 bits: never */
};

enum qp_state { QP_RESET, QP_INIT, QP_READY_TO_RECEIVE, QP_READY_TO_SEND };

struct qp {
    struct object object;
    enum qp_state state;
    struct cq *cq;              /* NULL: of the device's side, it sends */
    const uint32_t *record;     /* the driver's doorbell: how many receives it has posted */
    uint32_t remote;
    uint16_t counter;           /* of receives completed since it was reset */
};

uint8_t event_queues_create_cq(struct command *command);
uint8_t event_queues_create_qp(struct command *command);
uint8_t event_queues_move_qp(struct command *command);

/* Whether a virtqueue could tell by this QP. */
bool event_queues_can_send(const struct object *qp);

/* Send a message. False: not now, for no receive is posted, or the pair is not connected. */
bool event_queues_send(struct device *device, const struct object *qp);

/* See which CQs have been armed, and raise what events are due. */
void event_queues_look(struct device *device);

#endif
