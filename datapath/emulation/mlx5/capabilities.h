/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the device says that it can. */
#ifndef MLX5_EMULATION_CAPABILITIES_H
#define MLX5_EMULATION_CAPABILITIES_H

#include "commands.h"

/* Bytes that a queue's UMEM of number 1 to 3 needs: A * size + B. */
#define UMEM_BYTES_PER_ENTRY 128u
#define UMEM_BYTES 4096u
/* Largest list of an RQT. */
#define LOG_MAX_RQT 9

uint8_t capabilities_query(struct command *command);

#endif
