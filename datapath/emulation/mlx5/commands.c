/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "commands.h"

#include <errno.h>
#include <string.h>

#include "capabilities.h"
#include "event_queues.h"
#include "memory.h"
#include "queues.h"
#include "receivers.h"

#define NO_TYPE 0xffff
#define NO_ID { 0, 0 }

/* A command, and what all of its kind are checked for. */
static const struct entry {
    uint16_t opcode;
    uint16_t type;              /* of a general object */
    enum command_verb verb;
    enum object_kind kind;      /* that is created, modified or queried */
    const struct prm_structure *in;
    uint16_t entry_size;        /* bytes of each entry of the list that follows; 0: none */
    uint16_t room;              /* bytes of zeroes that may follow */
    struct prm_field id;        /* that says which object, as the call does */
    uint16_t out_size;
    uint8_t (*execute)(struct command *command);
} entries[] = {
    { PRM_OP_QUERY_HCA_CAP, NO_TYPE, VERB_GENERAL, 0, &prm_query_hca_cap_in, 0, 0, NO_ID,
      PRM_QUERY_GENERAL_CAP_OUT_SIZE, capabilities_query },
    { PRM_OP_CREATE_MKEY, NO_TYPE, VERB_CREATE, KIND_MKEY, &prm_create_mkey_in, PRM_KLM_SIZE, 0, NO_ID,
      PRM_CREATED_OUT_SIZE, memory_create_mkey },
    { PRM_OP_ALLOC_TRANSPORT_DOMAIN, NO_TYPE, VERB_CREATE, KIND_TD, &prm_alloc_transport_domain_in, 0, 0, NO_ID,
      PRM_CREATED_OUT_SIZE, receivers_create_td },
    { PRM_OP_CREATE_TIS, NO_TYPE, VERB_CREATE, KIND_TIS, &prm_create_tis_in, 0, 0, NO_ID,
      PRM_CREATED_OUT_SIZE, receivers_create_tis },
    { PRM_OP_CREATE_RQT, NO_TYPE, VERB_CREATE, KIND_RQT, &prm_create_rqt_in, PRM_RQT_ENTRY_SIZE, 0, NO_ID,
      PRM_CREATED_OUT_SIZE, receivers_create_rqt },
    { PRM_OP_MODIFY_RQT, NO_TYPE, VERB_MODIFY, KIND_RQT, &prm_modify_rqt_in, PRM_RQT_ENTRY_SIZE, 0,
      PRM_MODIFY_RQT_IN_RQTN, PRM_COMMAND_OUT_SIZE, receivers_modify_rqt },
    { PRM_OP_CREATE_TIR, NO_TYPE, VERB_CREATE, KIND_TIR, &prm_create_tir_in, 0, 0, NO_ID,
      PRM_CREATED_OUT_SIZE, receivers_create_tir },
    { PRM_OP_CREATE_CQ, NO_TYPE, VERB_CREATE, KIND_CQ, &prm_create_cq_in, 0, 0, NO_ID,
      PRM_CREATED_OUT_SIZE, event_queues_create_cq },
    { PRM_OP_CREATE_QP, NO_TYPE, VERB_CREATE, KIND_QP, &prm_create_qp_in, 0, 0xc0, NO_ID,
      PRM_CREATED_OUT_SIZE, event_queues_create_qp },
    { PRM_OP_RST2INIT_QP, NO_TYPE, VERB_MODIFY, KIND_QP, &prm_rst2init_qp_in, 0, 0, PRM_TO_RST_QP_IN_QPN,
      PRM_COMMAND_OUT_SIZE, event_queues_move_qp },
    { PRM_OP_INIT2RTR_QP, NO_TYPE, VERB_MODIFY, KIND_QP, &prm_init2rtr_qp_in, 0, 0, PRM_TO_RST_QP_IN_QPN,
      PRM_COMMAND_OUT_SIZE, event_queues_move_qp },
    { PRM_OP_RTR2RTS_QP, NO_TYPE, VERB_MODIFY, KIND_QP, &prm_rtr2rts_qp_in, 0, 0, PRM_TO_RST_QP_IN_QPN,
      PRM_COMMAND_OUT_SIZE, event_queues_move_qp },
    { PRM_OP_TO_RST_QP, NO_TYPE, VERB_MODIFY, KIND_QP, &prm_to_rst_qp_in, 0, 0, PRM_TO_RST_QP_IN_QPN,
      PRM_COMMAND_OUT_SIZE, event_queues_move_qp },
    { PRM_OP_CREATE_GENERAL_OBJECT, PRM_OBJECT_VIRTIO_Q_COUNTERS, VERB_CREATE, KIND_COUNTERS,
      &prm_create_virtio_q_counters_in, 0, 0, NO_ID, PRM_OBJECT_OUT_SIZE, queues_create_counters },
    { PRM_OP_QUERY_GENERAL_OBJECT, PRM_OBJECT_VIRTIO_Q_COUNTERS, VERB_QUERY, KIND_COUNTERS,
      &prm_query_virtio_q_counters_in, 0, 0, PRM_OBJECT_IN_OBJ_ID, PRM_QUERY_VIRTIO_Q_COUNTERS_OUT_SIZE,
      queues_query_counters },
    { PRM_OP_CREATE_GENERAL_OBJECT, PRM_OBJECT_VIRTIO_NET_Q, VERB_CREATE, KIND_VIRTQ,
      &prm_create_virtio_net_q_in, 0, 0, NO_ID, PRM_OBJECT_OUT_SIZE, queues_create },
    { PRM_OP_MODIFY_GENERAL_OBJECT, PRM_OBJECT_VIRTIO_NET_Q, VERB_MODIFY, KIND_VIRTQ,
      &prm_modify_virtio_net_q_in, 0, 0, PRM_OBJECT_IN_OBJ_ID, PRM_OBJECT_OUT_SIZE, queues_modify },
    { PRM_OP_QUERY_GENERAL_OBJECT, PRM_OBJECT_VIRTIO_NET_Q, VERB_QUERY, KIND_VIRTQ,
      &prm_query_virtio_net_q_in, 0, 0, PRM_OBJECT_IN_OBJ_ID, PRM_QUERY_VIRTIO_NET_Q_OUT_SIZE, queues_query },
};

static const struct entry *find(const struct command *command, enum command_verb verb)
{
    const uint16_t opcode = prm_get(command->in, PRM_OBJECT_IN_OPCODE);
    const uint16_t type = prm_get(command->in, PRM_OBJECT_IN_OBJ_TYPE);

    for (size_t i = 0; i < sizeof(entries) / sizeof(*entries); i++) {
        const struct entry *entry = &entries[i];

        if (entry->opcode == opcode && entry->verb == verb && (entry->type == NO_TYPE || entry->type == type)) {
            return entry;
        }
    }
    return NULL;
}

static bool is_length(const struct entry *entry, size_t size)
{
    const size_t more = size - entry->in->size;

    return size >= entry->in->size &&
           (entry->entry_size > 0 ? more % entry->entry_size == 0 : more <= entry->room);
}

static uint8_t check_and_execute(struct command *command, enum command_verb verb)
{
    const struct entry *entry = find(command, verb);

    if (entry == NULL) {
        return command_refuse(command, PRM_STATUS_BAD_OPERATION, SYNDROME_OPCODE);
    }
    if (command->object != NULL &&
        (command->object->kind != entry->kind || prm_get(command->in, entry->id) != command->object->id)) {
        return command_refuse(command, PRM_STATUS_BAD_INDEX, SYNDROME_OPCODE);
    }
    if (!is_length(entry, command->in_size)) {
        return command_refuse(command, PRM_STATUS_BAD_INPUT_LENGTH, SYNDROME_LENGTH);
    }
    if (command->out_size < entry->out_size) {
        return command_refuse(command, PRM_STATUS_BAD_OUTPUT_LENGTH, SYNDROME_LENGTH);
    }
    if (prm_reserved(entry->in, command->in, entry->entry_size > 0 ? entry->in->size : command->in_size)) {
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_RESERVED);
    }
    return entry->execute(command);
}

int command_execute(struct command *command, enum command_verb verb)
{
    uint8_t status;

    if (command->in_size < PRM_COMMAND_IN_SIZE || command->out_size < PRM_COMMAND_OUT_SIZE) {
        return EINVAL;
    }
    memset(command->out, 0, command->out_size);
    status = check_and_execute(command, verb);
    prm_set(command->out, PRM_COMMAND_OUT_STATUS, status);
    prm_set(command->out, PRM_COMMAND_OUT_SYNDROME, command->syndrome);
    if (verb == VERB_CREATE && status != PRM_STATUS_OK && command->object != NULL) {
        object_free(command->device, command->object);
        command->object = NULL;
    }
    if (verb == VERB_CREATE && status == PRM_STATUS_OK) {
        prm_set(command->out, PRM_OBJECT_OUT_OBJ_ID, command->object->id);
    }
    return status_to_errno(status);
}
