/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "capabilities.h"

#define BIT(number) (UINT64_C(1) << (number))

static void general(uint8_t *out)
{
    prm_set(out, PRM_QUERY_GENERAL_CAP_OUT_LOG_MAX_RQT_SIZE, LOG_MAX_RQT);
    prm_set(out, PRM_QUERY_GENERAL_CAP_OUT_GENERAL_OBJ_TYPES,
            BIT(PRM_OBJECT_VIRTIO_NET_Q) | BIT(PRM_OBJECT_VIRTIO_Q_COUNTERS));
}

static void vdpa(const struct options *options, uint8_t *out)
{
    static const struct prm_field ones[] = {
        PRM_QUERY_VDPA_CAP_OUT_ETH_FRAME_OFFLOAD_TYPE, PRM_QUERY_VDPA_CAP_OUT_VIRTIO_VERSION_1_0,
        PRM_QUERY_VDPA_CAP_OUT_TSO_IPV4, PRM_QUERY_VDPA_CAP_OUT_TSO_IPV6, PRM_QUERY_VDPA_CAP_OUT_TX_CSUM,
        PRM_QUERY_VDPA_CAP_OUT_RX_CSUM, PRM_QUERY_VDPA_CAP_OUT_VNET_MODIFY_EXT,
        PRM_QUERY_VDPA_CAP_OUT_VIRTIO_NET_Q_ADDR_MODIFY, PRM_QUERY_VDPA_CAP_OUT_VIRTIO_Q_INDEX_MODIFY,
    };
    static const struct prm_field umem[][2] = {
        { PRM_QUERY_VDPA_CAP_OUT_UMEM_1_BUFFER_PARAM_A, PRM_QUERY_VDPA_CAP_OUT_UMEM_1_BUFFER_PARAM_B },
        { PRM_QUERY_VDPA_CAP_OUT_UMEM_2_BUFFER_PARAM_A, PRM_QUERY_VDPA_CAP_OUT_UMEM_2_BUFFER_PARAM_B },
        { PRM_QUERY_VDPA_CAP_OUT_UMEM_3_BUFFER_PARAM_A, PRM_QUERY_VDPA_CAP_OUT_UMEM_3_BUFFER_PARAM_B },
    };

    for (size_t i = 0; i < sizeof(ones) / sizeof(*ones); i++) {
        prm_set(out, ones[i], 1);
    }
    for (size_t i = 0; i < sizeof(umem) / sizeof(*umem); i++) {
        prm_set(out, umem[i][0], UMEM_BYTES_PER_ENTRY);
        prm_set(out, umem[i][1], UMEM_BYTES);
    }
    prm_set(out, PRM_QUERY_VDPA_CAP_OUT_EVENT_MODE, BIT(PRM_EVENT_MODE_NONE) | BIT(PRM_EVENT_MODE_QP));
    prm_set(out, PRM_QUERY_VDPA_CAP_OUT_VIRTIO_QUEUE_TYPE, BIT(PRM_QUEUE_TYPE_SPLIT));
    prm_set(out, PRM_QUERY_VDPA_CAP_OUT_MAX_NUM_VIRTIO_QUEUES, 2 * options->pairs + 1);
    prm_set(out, PRM_QUERY_VDPA_CAP_OUT_FREEZE_TO_RDY_SUPPORTED, options->resumes);
}

uint8_t capabilities_query(struct command *command)
{
    const unsigned int op_mod = prm_get(command->in, PRM_QUERY_HCA_CAP_IN_OP_MOD);

    switch (op_mod >> 1) {      /* the lowest bit chooses between what is and what could be, which is the same */
    case PRM_PAGE_GENERAL:
        general(command->out);
        return PRM_STATUS_OK;
    case PRM_PAGE_VDPA_EMULATION:
        vdpa(&command->device->options, command->out);
        return PRM_STATUS_OK;
    default:
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_CAPABILITY_PAGE);
    }
}
