/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Virtqueues: VIRTIO_NET_Q objects with their states, and what moves their packets. Each pair has an engine
 * (datapath/native/engine.h) of its own, so that a broken ring stops one pair alone and no longer than until
 * the other queue of it has been started again. All with the device held.
 */
#ifndef MLX5_EMULATION_QUEUES_H
#define MLX5_EMULATION_QUEUES_H

#include "commands.h"
#include "engine.h"
#include "memory.h"

struct counters {
    struct object object;
    uint64_t received;
    uint64_t completed;
    uint32_t bad_descriptors;
};

struct virtq {
    struct object object;
    uint8_t body[PRM_VIRTIO_NET_Q_SIZE];    /* as the driver has set it, and queries it */
    unsigned int index;
    bool moves;                 /* the engine has it */
    struct mkey *mkey;          /* NULL: none yet */
    struct mkey *log_key;       /* of the dirty bitmap; NULL: none */
    struct object *event_qp;    /* NULL: it tells nobody */
    struct counters *counters;  /* NULL: not counted */
    uint64_t counted;           /* of what the engine's counters say */
};

struct pair {
    struct engine *engine;      /* NULL: it never had a queue */
    const struct mkey *reached;     /* whose memory the engine has */
    unsigned int moving;        /* queues that the engine has */
    uint64_t log_iova;          /* where it has the dirty bitmap */
    uint64_t log_size;          /* bytes of the dirty bitmap that it has; 0: none */
};

struct queues {
    struct pair pair[OPTIONS_MAX_PAIRS];
    struct virtq *virtq[2 * OPTIONS_MAX_PAIRS + 1];     /* by index; the last is of no pair, and never moves */
    int call_fd[2 * OPTIONS_MAX_PAIRS];     /* by which an engine tells that a queue has completed something */
    struct bell *bell;          /* see bell.h */
};

int queues_open(struct device *device);
void queues_close(struct device *device);

uint8_t queues_create_counters(struct command *command);
uint8_t queues_query_counters(struct command *command);
uint8_t queues_create(struct command *command);
uint8_t queues_modify(struct command *command);
uint8_t queues_query(struct command *command);

/* Stop all queues for good. */
void queues_halt(struct device *device);

/* Before a queue is freed: stop it. */
void queues_forget(struct device *device, struct virtq *virtq);

/* Steering has changed: a queue receives when some rule leads to it. */
void queues_steer(struct device *device);

/* An engine has met a ring, or memory, that is broken: that queue goes to ERROR, and says so. */
void queues_break(struct device *device, unsigned int pair);

#endif
