/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Executes mailboxes: which commands there are, what they are checked for in common, and how they fail. */
#ifndef MLX5_EMULATION_COMMANDS_H
#define MLX5_EMULATION_COMMANDS_H

#include "device.h"

/*
 * Why a command failed, in the mailbox' syndrome. A real device's numbers are its firmware's secret; these are
 * distinct ones of our own.
 */
enum syndrome {
    SYNDROME_NONE = 0,
    SYNDROME_INJECTED = 0xe0000001,     /* the options wanted it to fail */
    SYNDROME_OPCODE,                    /* no such command, or not by this call */
    SYNDROME_LENGTH,                    /* the mailbox is of another length */
    SYNDROME_RESERVED,                  /* a bit is set that means nothing */
    SYNDROME_NO_MEMORY,
    SYNDROME_CAPABILITY_PAGE,
    SYNDROME_PD,                        /* from here on: there is no such object */
    SYNDROME_UMEM,                      /* or it is too small */
    SYNDROME_KEY,
    SYNDROME_TD,
    SYNDROME_TIS,
    SYNDROME_RQT,
    SYNDROME_CQ,
    SYNDROME_QP,
    SYNDROME_COUNTERS,
    SYNDROME_VIRTQ,
    SYNDROME_UAR,
    SYNDROME_ACCESS_MODE,               /* from here on: a value that makes no sense */
    SYNDROME_TRANSLATIONS,
    SYNDROME_KEY_RANGE,                 /* the key does not reach as far as it says */
    SYNDROME_RQT_LIST,
    SYNDROME_HASH,
    SYNDROME_CQ_CONTEXT,
    SYNDROME_QP_CONTEXT,
    SYNDROME_QP_STATE,                  /* the move does not begin where the QP is */
    SYNDROME_QUEUE_INDEX,               /* none of the device, or taken */
    SYNDROME_QUEUE_SIZE,
    SYNDROME_QUEUE_TYPE,
    SYNDROME_EVENT_MODE,
    SYNDROME_FEATURES,
    SYNDROME_STATE,                     /* no way leads there from the queue's state */
    SYNDROME_MODIFY_SELECT,             /* nothing that can be modified, or not in this state */
    SYNDROME_ADDRESSES,                 /* no ring can be there */
    SYNDROME_DIRTY_BITMAP,
};

struct command {
    struct device *device;
    const uint8_t *in;
    size_t in_size;
    uint8_t *out;
    size_t out_size;
    struct object *object;      /* which it is about; of a command that creates one, the new one */
    enum syndrome syndrome;
};

/* Note why a command fails. Returns the status. */
static inline uint8_t command_refuse(struct command *command, uint8_t status, enum syndrome syndrome)
{
    command->syndrome = syndrome;
    return status;
}

/* By which call of libmlx5 a command comes. */
enum command_verb {
    VERB_GENERAL,
    VERB_CREATE,
    VERB_MODIFY,
    VERB_QUERY,
};

/* Execute a mailbox with the device held. Its answer is in `out`; returns 0 or what the kernel does, an errno. */
int command_execute(struct command *command, enum command_verb verb);

#endif
