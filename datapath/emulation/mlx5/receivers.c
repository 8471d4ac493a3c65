/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "receivers.h"

#include "queues.h"

static uint8_t no_memory(struct command *command)
{
    return command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
}

uint8_t receivers_create_td(struct command *command)
{
    command->object = object_new(command->device, KIND_TD, sizeof(*command->object));
    return command->object != NULL ? PRM_STATUS_OK : no_memory(command);
}

uint8_t receivers_create_tis(struct command *command)
{
    struct object *td = object_find(command->device, KIND_TD,
                                    prm_get(command->in, PRM_CREATE_TIS_IN_TRANSPORT_DOMAIN));

    if (td == NULL) {
        return command_refuse(command, PRM_STATUS_BAD_RESOURCE, SYNDROME_TD);
    }
    command->object = object_new(command->device, KIND_TIS, sizeof(*command->object));
    return command->object != NULL && object_use(command->object, td) ? PRM_STATUS_OK : no_memory(command);
}

/* See that a list has as many entries as it says and names queues alone. */
static uint8_t check_list(struct command *command, unsigned int room)
{
    const unsigned int count = (command->in_size - PRM_CREATE_RQT_IN_SIZE) / PRM_RQT_ENTRY_SIZE;

    if (prm_get(command->in, PRM_CREATE_RQT_IN_LIST_Q_TYPE) != PRM_RQT_VIRTIO_NET_Q || count == 0 || count > room ||
        prm_get(command->in, PRM_CREATE_RQT_IN_RQT_ACTUAL_SIZE) != count) {
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_RQT_LIST);
    }
    for (unsigned int i = 0; i < count; i++) {
        const uint8_t *entry = command->in + PRM_CREATE_RQT_IN_SIZE + i * PRM_RQT_ENTRY_SIZE;

        if (prm_reserved(&prm_rqt_entry, entry, PRM_RQT_ENTRY_SIZE)) {
            return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_RESERVED);
        }
        if (object_find(command->device, KIND_VIRTQ, prm_get(entry, PRM_RQT_ENTRY_QUEUE)) == NULL) {
            return command_refuse(command, PRM_STATUS_BAD_RESOURCE, SYNDROME_VIRTQ);
        }
    }
    return PRM_STATUS_OK;
}

/* Take a list that has been checked, instead of the one that is there. */
static uint8_t take_list(struct command *command, struct rqt *rqt)
{
    const unsigned int count = prm_get(command->in, PRM_CREATE_RQT_IN_RQT_ACTUAL_SIZE);

    for (unsigned int i = 0; i < rqt->count; i++) {
        object_let_go(&rqt->object, rqt->queue[i]);
    }
    for (rqt->count = 0; rqt->count < count; rqt->count++) {
        const uint8_t *entry = command->in + PRM_CREATE_RQT_IN_SIZE + rqt->count * PRM_RQT_ENTRY_SIZE;

        rqt->queue[rqt->count] = object_find(command->device, KIND_VIRTQ, prm_get(entry, PRM_RQT_ENTRY_QUEUE));
        if (!object_use(&rqt->object, rqt->queue[rqt->count])) {
            return no_memory(command);
        }
    }
    queues_steer(command->device);
    return PRM_STATUS_OK;
}

uint8_t receivers_create_rqt(struct command *command)
{
    const unsigned int room = prm_get(command->in, PRM_CREATE_RQT_IN_RQT_MAX_SIZE);
    uint8_t status = room <= RQT_MAX_SIZE ? check_list(command, room)
                                          : command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_RQT_LIST);
    struct rqt *rqt;

    if (status != PRM_STATUS_OK) {
        return status;
    }
    rqt = object_new(command->device, KIND_RQT, sizeof(*rqt));
    if (rqt == NULL) {
        return no_memory(command);
    }
    command->object = &rqt->object;
    rqt->room = room;
    return take_list(command, rqt);
}

uint8_t receivers_modify_rqt(struct command *command)
{
    struct rqt *rqt = (struct rqt *)command->object;
    uint8_t status;

    if (prm_get(command->in, PRM_MODIFY_RQT_IN_MODIFY_BITMASK) != PRM_MODIFY_RQT_LIST ||
        prm_get(command->in, PRM_MODIFY_RQT_IN_RQT_MAX_SIZE) != 0) {
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_MODIFY_SELECT);
    }
    status = check_list(command, rqt->room);
    return status == PRM_STATUS_OK ? take_list(command, rqt) : status;
}

uint8_t receivers_create_tir(struct command *command)
{
    struct object *td = object_find(command->device, KIND_TD,
                                    prm_get(command->in, PRM_CREATE_TIR_IN_TRANSPORT_DOMAIN));
    struct object *rqt = object_find(command->device, KIND_RQT,
                                     prm_get(command->in, PRM_CREATE_TIR_IN_INDIRECT_TABLE));
    struct tir *tir;

    if (prm_get(command->in, PRM_CREATE_TIR_IN_DISP_TYPE) != PRM_TIR_INDIRECT ||
        prm_get(command->in, PRM_CREATE_TIR_IN_RX_HASH_FN) != PRM_HASH_TOEPLITZ) {
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_HASH);
    }
    if (td == NULL || rqt == NULL) {
        return command_refuse(command, PRM_STATUS_BAD_RESOURCE, td == NULL ? SYNDROME_TD : SYNDROME_RQT);
    }
    tir = object_new(command->device, KIND_TIR, sizeof(*tir));
    if (tir == NULL) {
        return no_memory(command);
    }
    command->object = &tir->object;
    tir->rqt = (struct rqt *)rqt;
    return object_use(&tir->object, td) && object_use(&tir->object, rqt) ? PRM_STATUS_OK : no_memory(command);
}
