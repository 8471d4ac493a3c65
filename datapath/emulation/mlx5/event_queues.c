/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "event_queues.h"

#include <endian.h>

#include "channels.h"
#include "memory.h"

/* Bytes of a CQ's doorbell record, and of a QP's. */
#define RECORD_SIZE 8
/* Bytes of a posted receive. */
#define RECEIVE_SIZE 16
#define LARGEST_LOG_CQ 22
/* Where in a UAR's page a CQ is armed. */
#define UAR_CQ_ARM 0x20
#define NEVER_ARMED UINT64_MAX
#define INDEX_MASK 0xffffffu

static uint8_t no_memory(struct command *command)
{
    return command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
}

static bool is_uar(const struct device *device, unsigned int page)
{
    return page > 0 && page < DEVICE_PAGES && device->page_taken[page];
}

/* Bytes of a UMEM that a new object is to have. */
static uint8_t *take(struct command *command, uint32_t id, uint64_t offset, uint64_t size)
{
    struct object *umem;
    uint8_t *bytes = memory_umem(command->device, id, offset, size, &umem);

    return bytes != NULL && object_use(command->object, umem) ? bytes : NULL;
}

static uint8_t check_cq(struct command *command)
{
    const uint8_t *in = command->in;

    if (!is_uar(command->device, prm_get(in, PRM_CREATE_CQ_IN_UAR_PAGE))) {
        return command_refuse(command, PRM_STATUS_BAD_RESOURCE, SYNDROME_UAR);
    }
    if (prm_get(in, PRM_CREATE_CQ_IN_LOG_CQ_SIZE) > LARGEST_LOG_CQ || prm_get(in, PRM_CREATE_CQ_IN_CQE_SZ) > 1 ||
        prm_get(in, PRM_CREATE_CQ_IN_CQ_UMEM_VALID) == 0 || prm_get(in, PRM_CREATE_CQ_IN_DBR_UMEM_VALID) == 0 ||
        prm_get(in, PRM_CREATE_CQ_IN_DBR_ADDR) % RECORD_SIZE != 0) {
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_CQ_CONTEXT);
    }
    return PRM_STATUS_OK;
}

uint8_t event_queues_create_cq(struct command *command)
{
    const uint8_t *in = command->in;
    uint8_t status = check_cq(command);
    struct cq *cq;

    if (status != PRM_STATUS_OK) {
        return status;
    }
    cq = object_new(command->device, KIND_CQ, sizeof(*cq));
    if (cq == NULL) {
        return no_memory(command);
    }
    command->object = &cq->object;
    cq->log_size = prm_get(in, PRM_CREATE_CQ_IN_LOG_CQ_SIZE);
    cq->entry_size = (size_t)PRM_CQE_SIZE << prm_get(in, PRM_CREATE_CQ_IN_CQE_SZ);
    cq->collapsed = prm_get(in, PRM_CREATE_CQ_IN_CC);
    cq->uar_page = prm_get(in, PRM_CREATE_CQ_IN_UAR_PAGE);
    cq->armed = NEVER_ARMED;
    cq->entries = take(command, prm_get(in, PRM_CREATE_CQ_IN_CQ_UMEM_ID), prm_get(in, PRM_CREATE_CQ_IN_CQ_UMEM_OFFSET),
                       cq->entry_size << cq->log_size);
    cq->record = (uint32_t *)take(command, prm_get(in, PRM_CREATE_CQ_IN_DBR_UMEM_ID),
                                  prm_get(in, PRM_CREATE_CQ_IN_DBR_ADDR), RECORD_SIZE);
    if (cq->entries == NULL || cq->record == NULL) {
        return command_refuse(command, PRM_STATUS_BAD_RESOURCE, SYNDROME_UMEM);
    }
    return PRM_STATUS_OK;
}

/* The driver's side, which receives. */
static uint8_t fill_receiver(struct command *command, struct qp *qp)
{
    const uint8_t *in = command->in;
    const uint64_t receives = UINT64_C(1) << prm_get(in, PRM_CREATE_QP_IN_LOG_RQ_SIZE);
    struct object *cq = object_find(command->device, KIND_CQ, prm_get(in, PRM_CREATE_QP_IN_CQN_RCV));

    if (!is_uar(command->device, prm_get(in, PRM_CREATE_QP_IN_UAR_PAGE))) {
        return command_refuse(command, PRM_STATUS_BAD_RESOURCE, SYNDROME_UAR);
    }
    if (cq == NULL) {
        return command_refuse(command, PRM_STATUS_BAD_RESOURCE, SYNDROME_CQ);
    }
    if (prm_get(in, PRM_CREATE_QP_IN_WQ_UMEM_VALID) == 0 || prm_get(in, PRM_CREATE_QP_IN_DBR_UMEM_VALID) == 0 ||
        prm_get(in, PRM_CREATE_QP_IN_DBR_ADDR) % RECORD_SIZE != 0) {
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_QP_CONTEXT);
    }
    qp->cq = (struct cq *)cq;
    qp->record = (const uint32_t *)take(command, prm_get(in, PRM_CREATE_QP_IN_DBR_UMEM_ID),
                                        prm_get(in, PRM_CREATE_QP_IN_DBR_ADDR), RECORD_SIZE);
    if (qp->record == NULL || take(command, prm_get(in, PRM_CREATE_QP_IN_WQ_UMEM_ID),
                                   prm_get(in, PRM_CREATE_QP_IN_WQ_UMEM_OFFSET), receives * RECEIVE_SIZE) == NULL) {
        return command_refuse(command, PRM_STATUS_BAD_RESOURCE, SYNDROME_UMEM);
    }
    return object_use(&qp->object, cq) ? PRM_STATUS_OK : no_memory(command);
}

uint8_t event_queues_create_qp(struct command *command)
{
    const unsigned int type = prm_get(command->in, PRM_CREATE_QP_IN_RQ_TYPE);
    struct object *pd = memory_pd(command->device, prm_get(command->in, PRM_CREATE_QP_IN_PD));
    struct qp *qp;

    if (pd == NULL) {
        return command_refuse(command, PRM_STATUS_BAD_RESOURCE, SYNDROME_PD);
    }
    if (prm_get(command->in, PRM_CREATE_QP_IN_NO_SQ) == 0 || prm_get(command->in, PRM_CREATE_QP_IN_ST) != 0 ||
        (type != PRM_RECEIVE_QUEUE && type != PRM_RECEIVE_NOTHING)) {
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_QP_CONTEXT);
    }
    qp = object_new(command->device, KIND_QP, sizeof(*qp));
    if (qp == NULL) {
        return no_memory(command);
    }
    command->object = &qp->object;
    if (!object_use(&qp->object, pd)) {
        return no_memory(command);
    }
    return type == PRM_RECEIVE_QUEUE ? fill_receiver(command, qp) : PRM_STATUS_OK;
}

uint8_t event_queues_move_qp(struct command *command)
{
    struct qp *qp = (struct qp *)command->object;
    const uint16_t opcode = prm_get(command->in, PRM_COMMAND_IN_OPCODE);
    static const struct {
        uint16_t opcode;
        enum qp_state from, to;
    } moves[] = {
        { PRM_OP_RST2INIT_QP, QP_RESET, QP_INIT },
        { PRM_OP_INIT2RTR_QP, QP_INIT, QP_READY_TO_RECEIVE },
        { PRM_OP_RTR2RTS_QP, QP_READY_TO_RECEIVE, QP_READY_TO_SEND },
    };

    if (opcode == PRM_OP_TO_RST_QP) {
        qp->state = QP_RESET;
        qp->counter = 0;
        qp->remote = 0;
        return PRM_STATUS_OK;
    }
    for (size_t i = 0; i < sizeof(moves) / sizeof(*moves); i++) {
        if (moves[i].opcode == opcode && moves[i].from != qp->state) {
            return command_refuse(command, PRM_STATUS_BAD_QP_STATE, SYNDROME_QP_STATE);
        }
        if (moves[i].opcode == opcode) {
            qp->state = moves[i].to;
        }
    }
    if (opcode == PRM_OP_INIT2RTR_QP) {
        qp->remote = prm_get(command->in, PRM_INIT2RTR_QP_IN_REMOTE_QPN);
    }
    return PRM_STATUS_OK;
}

bool event_queues_can_send(const struct object *object)
{
    const struct qp *qp = (const struct qp *)object;

    return qp->state == QP_READY_TO_SEND && qp->cq == NULL;
}

/* Write an entry: the last of its dwords, in one store, which the driver polls. */
static void complete(struct cq *cq, uint16_t counter)
{
    const uint32_t place = cq->collapsed ? 0 : cq->produced & ((1u << cq->log_size) - 1);
    uint8_t entry[PRM_CQE_SIZE] = { 0 };
    uint8_t *end = cq->entries + (place + 1) * cq->entry_size - sizeof(uint32_t);

    prm_set(entry, PRM_CQE_WQE_COUNTER, counter);
    prm_set(entry, PRM_CQE_OPCODE, PRM_CQE_RECEIVED_SEND);
    prm_set(entry, PRM_CQE_OWNER, cq->collapsed ? 0 : cq->produced >> cq->log_size & 1);
    __atomic_store_n((uint32_t *)end, *(uint32_t *)(entry + sizeof(entry) - sizeof(uint32_t)), __ATOMIC_RELEASE);
    cq->produced++;
}

bool event_queues_send(struct device *device, const struct object *object)
{
    const struct qp *from = (const struct qp *)object;
    struct qp *to = (struct qp *)object_find(device, KIND_QP, from->remote);

    if (!event_queues_can_send(object) || to == NULL || to->cq == NULL || to->state < QP_READY_TO_RECEIVE ||
        to->remote != object->id ||
        (uint16_t)be32toh(__atomic_load_n(to->record, __ATOMIC_ACQUIRE)) == to->counter) {
        return false;
    }
    complete(to->cq, to->counter++);
    return true;
}

/* Raise an event when the driver has armed the CQ anew and there are entries that it had not seen then. */
static void look_at(struct device *device, struct cq *cq)
{
    const uint32_t armed = __atomic_load_n(&cq->record[1], __ATOMIC_ACQUIRE);
    const uint32_t seen = prm_get(&armed, PRM_CQ_ARM_CONSUMER_INDEX);

    if (cq->rung && armed != cq->armed && (cq->produced & INDEX_MASK) != seen) {
        cq->armed = armed;
        cq->rung = false;
        channels_raise(device, &cq->object, PRM_EVENT_COMPLETION);
    }
}

/* One store for all CQs of a page: a later one may hide an earlier, so each of them may have been armed. */
static bool was_rung(struct device *device, unsigned int page)
{
    uint64_t *doorbell = (uint64_t *)(device->memory + page * PAGE_SIZE + UAR_CQ_ARM);

    return __atomic_load_n(doorbell, __ATOMIC_RELAXED) != 0 && __atomic_exchange_n(doorbell, 0, __ATOMIC_ACQ_REL) != 0;
}

void event_queues_look(struct device *device)
{
    bool rung[DEVICE_PAGES];

    for (unsigned int i = 0; i < DEVICE_PAGES; i++) {
        rung[i] = device->page_taken[i] && was_rung(device, i);
    }
    for (struct object *object = device->objects; object != NULL; object = object->next) {
        if (object->kind == KIND_CQ) {
            struct cq *cq = (struct cq *)object;

            cq->rung |= rung[cq->uar_page];
            look_at(device, cq);
        }
    }
}
