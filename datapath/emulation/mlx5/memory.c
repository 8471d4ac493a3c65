/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "memory.h"

#define KLM_SIZE PRM_KLM_SIZE

struct object *memory_pd(struct device *device, uint32_t id)
{
    return object_find(device, KIND_PD, id);
}

struct mkey *memory_mkey(struct device *device, uint32_t key)
{
    struct mkey *mkey = (struct mkey *)object_find(device, KIND_MKEY, key >> 8);

    return mkey != NULL && mkey->key == key ? mkey : NULL;
}

uint8_t *memory_at(const struct mkey *mkey, uint64_t address, uint64_t size)
{
    for (unsigned int i = 0; i < mkey->pieces; i++) {
        const struct piece *piece = &mkey->piece[i];
        uint64_t into = address - piece->iova;

        if (address >= piece->iova && into < piece->size) {
            return size <= piece->size - into ? piece->host + into : NULL;
        }
    }
    return NULL;
}

uint8_t *memory_umem(struct device *device, uint32_t id, uint64_t offset, uint64_t size, struct object **object)
{
    struct umem *umem = (struct umem *)object_find(device, KIND_UMEM, id);

    if (umem == NULL || offset > umem->size || size > umem->size - offset) {
        return NULL;
    }
    *object = &umem->object;
    return umem->address + offset;
}

/* Put a piece behind the others. */
static void add_piece(struct mkey *mkey, uint64_t iova, uint64_t size, uint8_t *host)
{
    struct piece *last = mkey->pieces > 0 ? &mkey->piece[mkey->pieces - 1] : NULL;

    if (last != NULL && last->iova + last->size == iova && last->host + last->size == host) {
        last->size += size;
    } else {
        mkey->piece[mkey->pieces++] = (struct piece){ iova, size, host };
    }
}

/* What an entry of a list leads to. NULL object: there is no such key. NULL host: nothing, as it is a null one. */
static struct object *follow(struct device *device, uint32_t key, uint64_t address, uint64_t size, uint8_t **host)
{
    struct mkey *direct = memory_mkey(device, key);
    struct mr *mr = (struct mr *)object_find(device, KIND_MR, key >> 8);

    *host = NULL;
    if (direct != NULL) {
        *host = memory_at(direct, address, size);
        return *host != NULL ? &direct->object : NULL;
    }
    if (mr == NULL || mr->abi.lkey != key) {
        return NULL;
    }
    if (mr->abi.addr != NULL) {
        uint64_t into = address - mr->iova;

        if (address < mr->iova || into > mr->abi.length || size > mr->abi.length - into) {
            return NULL;
        }
        *host = (uint8_t *)mr->abi.addr + into;
    }
    return &mr->object;
}

/* Take the list of an indirect key. `fixed`: bytes of each entry, or 0. */
static uint8_t take_list(struct command *command, struct mkey *mkey, unsigned int entries, uint64_t fixed)
{
    uint64_t iova = mkey->start;

    for (unsigned int i = 0; i < entries; i++) {
        const uint8_t *klm = command->in + PRM_CREATE_MKEY_IN_SIZE + i * KLM_SIZE;
        uint64_t size = fixed ? fixed : prm_get(klm, PRM_KLM_BYTE_COUNT);
        uint64_t left = mkey->start + mkey->length - iova;
        struct object *to;
        uint8_t *host;

        if (left == 0 || size == 0) {       /* padding */
            continue;
        }
        size = size < left ? size : left;
        to = follow(command->device, prm_get(klm, PRM_KLM_MKEY), prm_get(klm, PRM_KLM_ADDRESS), size, &host);
        if (to == NULL) {
            return command_refuse(command, PRM_STATUS_BAD_RESOURCE, SYNDROME_KEY);
        }
        if (!object_use(&mkey->object, to)) {
            return command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
        }
        if (host != NULL) {
            add_piece(mkey, iova, size, host);
        }
        iova += size;
    }
    if (iova != mkey->start + mkey->length) {
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_KEY_RANGE);
    }
    return PRM_STATUS_OK;
}

static uint8_t take_umem(struct command *command, struct mkey *mkey)
{
    struct object *umem;
    uint8_t *host = memory_umem(command->device, prm_get(command->in, PRM_CREATE_MKEY_IN_MKEY_UMEM_ID),
                                prm_get(command->in, PRM_CREATE_MKEY_IN_MKEY_UMEM_OFFSET), mkey->length, &umem);

    if (host == NULL) {
        return command_refuse(command, PRM_STATUS_BAD_RESOURCE, SYNDROME_UMEM);
    }
    if (!object_use(&mkey->object, umem)) {
        return command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
    }
    add_piece(mkey, mkey->start, mkey->length, host);
    return PRM_STATUS_OK;
}

static uint8_t fill(struct command *command, struct mkey *mkey, unsigned int entries)
{
    const unsigned int log_page = prm_get(command->in, PRM_CREATE_MKEY_IN_LOG_PAGE_SIZE);
    struct object *pd = memory_pd(command->device, prm_get(command->in, PRM_CREATE_MKEY_IN_PD));

    mkey->key = mkey->object.id << 8 | prm_get(command->in, PRM_CREATE_MKEY_IN_MKEY_7_0);
    mkey->start = prm_get(command->in, PRM_CREATE_MKEY_IN_START_ADDR);
    mkey->length = prm_get(command->in, PRM_CREATE_MKEY_IN_LEN);
    if (pd == NULL) {
        return command_refuse(command, PRM_STATUS_BAD_RESOURCE, SYNDROME_PD);
    }
    if (mkey->length == 0 || mkey->start + mkey->length < mkey->start) {
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_KEY_RANGE);
    }
    if (!object_use(&mkey->object, pd)) {
        return command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
    }
    switch (prm_get(command->in, PRM_CREATE_MKEY_IN_ACCESS_MODE)) {
    case PRM_ACCESS_MODE_MTT:
        return take_umem(command, mkey);
    case PRM_ACCESS_MODE_KLM:
        return take_list(command, mkey, entries, 0);
    case PRM_ACCESS_MODE_KLM_FIXED_SIZE:
        return take_list(command, mkey, entries, UINT64_C(1) << log_page);
    default:
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_ACCESS_MODE);
    }
}

uint8_t memory_create_mkey(struct command *command)
{
    const unsigned int entries = (command->in_size - PRM_CREATE_MKEY_IN_SIZE) / KLM_SIZE;
    const uint32_t actual = prm_get(command->in, PRM_CREATE_MKEY_IN_TRANSLATIONS_OCTWORD_ACTUAL_SIZE);
    const bool direct = prm_get(command->in, PRM_CREATE_MKEY_IN_ACCESS_MODE) == PRM_ACCESS_MODE_MTT;
    struct mkey *mkey;

    if (prm_get(command->in, PRM_CREATE_MKEY_IN_TRANSLATIONS_OCTWORD_SIZE) != actual ||
        (direct ? entries > 0 : entries != actual || entries % 4 != 0 || entries == 0)) {
        return command_refuse(command, PRM_STATUS_BAD_PARAMETER, SYNDROME_TRANSLATIONS);
    }
    mkey = object_new(command->device, KIND_MKEY, sizeof(*mkey) + (entries + 1) * sizeof(*mkey->piece));
    if (mkey == NULL) {
        return command_refuse(command, PRM_STATUS_NO_RESOURCES, SYNDROME_NO_MEMORY);
    }
    command->object = &mkey->object;
    return fill(command, mkey, entries);
}
