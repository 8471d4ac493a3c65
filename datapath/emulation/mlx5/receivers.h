/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What stands between the wire and queues: transport domains, TIS, TIRs, and the tables that these lead to. */
#ifndef MLX5_EMULATION_RECEIVERS_H
#define MLX5_EMULATION_RECEIVERS_H

#include "capabilities.h"
#include "commands.h"

#define RQT_MAX_SIZE (1u << LOG_MAX_RQT)

struct rqt {
    struct object object;
    unsigned int room;
    unsigned int count;
    struct object *queue[RQT_MAX_SIZE];
};

struct tir {
    struct object object;
    struct rqt *rqt;
};

uint8_t receivers_create_td(struct command *command);
uint8_t receivers_create_tis(struct command *command);
uint8_t receivers_create_rqt(struct command *command);
uint8_t receivers_modify_rqt(struct command *command);
uint8_t receivers_create_tir(struct command *command);

#endif
