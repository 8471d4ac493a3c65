/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "prm.h"

#include <string.h>

static bool any_set(const uint8_t *bytes, size_t from, size_t to)
{
    for (size_t i = from; i < to; i++) {
        if (bytes[i] != 0) {
            return true;
        }
    }
    return false;
}

/* Clear a field of any width. */
static void clear(uint8_t *bytes, const struct prm_field *field)
{
    for (unsigned int bit = field->offset; bit < (unsigned int)field->offset + field->width; bit++) {
        bytes[bit / 8] &= ~(0x80 >> bit % 8);
    }
}

bool prm_reserved(const struct prm_structure *structure, const void *mailbox, size_t end)
{
    uint8_t rest[PRM_QUERY_GENERAL_CAP_OUT_SIZE];

    memcpy(rest, mailbox, structure->size);
    for (unsigned int i = 0; i < structure->fields; i++) {
        clear(rest, &structure->field[i]);
    }
    return any_set(rest, 0, structure->size) || any_set(mailbox, structure->size, end);
}
