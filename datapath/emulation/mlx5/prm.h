/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Fields of mailboxes: datapath/mlx5_prm.py says which there are, prm_table.h is made of it. */
#ifndef MLX5_EMULATION_PRM_H
#define MLX5_EMULATION_PRM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* In bits; bit 0 is the most significant one of the first byte. */
struct prm_field {
    uint16_t offset;
    uint16_t width;
};

struct prm_structure {
    const char *name;
    uint16_t size;              /* of its fixed part, in bytes */
    uint16_t fields;
    const struct prm_field *field;
};

#include "prm_table.h"

/* The value of a field of up to 64 bits, which then begins and ends with a byte. */
static inline uint64_t prm_get(const void *mailbox, struct prm_field field)
{
    const uint8_t *bytes = mailbox;
    const unsigned int end = field.offset + field.width;
    uint64_t value = 0;

    for (unsigned int at = field.offset / 8; at <= (end - 1) / 8; at++) {
        value = value << 8 | bytes[at];
    }
    value >>= (8 - end % 8) % 8;
    return field.width == 64 ? value : value & ((UINT64_C(1) << field.width) - 1);
}

/* Set a field of that kind. What does not fit is cut off. */
static inline void prm_set(void *mailbox, struct prm_field field, uint64_t value)
{
    uint8_t *bytes = mailbox;

    for (unsigned int i = 0; i < field.width; i++) {
        const unsigned int bit = field.offset + field.width - 1 - i;
        const uint8_t mask = 0x80 >> bit % 8;

        bytes[bit / 8] = (value >> i & 1) ? bytes[bit / 8] | mask : bytes[bit / 8] & ~mask;
    }
}

/* Whether a bit is set that belongs to no field, within the structure or in what follows up to `end` bytes. */
bool prm_reserved(const struct prm_structure *structure, const void *mailbox, size_t end);

#endif
