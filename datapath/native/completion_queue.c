/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "completion_queue.h"

#include <endian.h>
#include <stddef.h>

#include "barrier.h"

/* Of an entry, and of its last word. */
#define LAST_WORD 60
#define COUNTER_SHIFT 16
#define OPCODE_SHIFT 4
#define OPCODE_MASK 0xfu
#define OPCODE_REQUEST_FAILED 13
#define OPCODE_RESPONSE_FAILED 14
#define OPCODE_INVALID 15

/* Words of a queue's doorbell record. */
enum { CONSUMER_INDEX, HOW_ARMED };
#define SEQUENCE_SHIFT 28
#define SEQUENCE_MASK 3u
#define INDEX_MASK 0xffffffu

#define LARGEST 32768u

static bool is_aligned(const void *address, uintptr_t size)
{
    return address != NULL && (uintptr_t)address % size == 0;
}

bool completion_queue_take(struct completion_queue *queue, const struct completion_source *source)
{
    uint32_t armed;
    bool never;

    if (!is_aligned(source->entry, 64) || !is_aligned(source->cq_record, 8) || !is_aligned(source->qp_record, 8) ||
        source->size == 0 || source->size > LARGEST || (source->size & (source->size - 1)) != 0) {
        return false;
    }
    queue->last_word = (const uint32_t *)((const uint8_t *)source->entry + LAST_WORD);
    queue->cq_record = source->cq_record;
    queue->qp_record = source->qp_record;
    queue->number = source->number;
    queue->size = source->size;
    queue->consumed = be32toh(queue->cq_record[CONSUMER_INDEX]);
    queue->received = be32toh(*queue->qp_record) - source->size;
    armed = be32toh(queue->cq_record[HOW_ARMED]);
    never = armed == 0 && queue->consumed == 0;
    queue->armed = false;
    queue->outstanding = !never && ((queue->consumed ^ armed) & INDEX_MASK) == 0;
    queue->sequence = (armed >> SEQUENCE_SHIFT) + (!never && !queue->outstanding);
    return true;
}

unsigned int completion_queue_look(struct completion_queue *queue, bool *error)
{
    const uint32_t word = be32toh(device_load_acquire_word(queue->last_word));
    const unsigned int opcode = word >> OPCODE_SHIFT & OPCODE_MASK;
    const uint16_t completed = (word >> COUNTER_SHIFT) + 1 - queue->received;

    if (completed == 0 || opcode == OPCODE_INVALID) {
        return 0;
    }
    *error = opcode == OPCODE_REQUEST_FAILED || opcode == OPCODE_RESPONSE_FAILED;
    queue->sequence += queue->outstanding;
    queue->outstanding = false;
    queue->armed = false;
    queue->consumed += completed;
    queue->received += completed;
    /* The place of the entry is free before there can be another: first the queue's record. */
    device_store_release_word(&queue->cq_record[CONSUMER_INDEX], htobe32(queue->consumed));
    device_store_release_word(queue->qp_record, htobe32((uint16_t)(queue->received + queue->size)));
    return completed;
}

void completion_queue_arm(struct completion_queue *queue, void *page)
{
    uint64_t *doorbell = (uint64_t *)((uint8_t *)page + COMPLETION_QUEUE_ARM);
    /* A number for each event: to arm again what has raised none is to say the same again. */
    const uint32_t word = (queue->sequence & SEQUENCE_MASK) << SEQUENCE_SHIFT | (queue->consumed & INDEX_MASK);

    queue->armed = true;
    queue->outstanding = true;
    device_store_release_word(&queue->cq_record[HOW_ARMED], htobe32(word));
    /* The device must find the record when the doorbell sends it there. */
    device_fence();
    __atomic_store_n(doorbell, htobe64((uint64_t)word << 32 | queue->number), __ATOMIC_RELAXED);
    /* On its way before the entry is looked at once more. */
    device_fence();
}
