/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE
#include "steering.h"

#include <errno.h>
#include <linux/capability.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "queues.h"
#include "receivers.h"

/* What can be matched: nothing, or the outer headers. */
#define MOST_CRITERIA 1
#define LOWEST_PRIORITY 15
/* Of a destination: all 48 bits, and the first on the wire, by which groups are told. */
#define EVERY_BIT ((UINT64_C(1) << 48) - 1)
#define GROUP_BIT (UINT64_C(1) << 40)

struct mlx5dv_dr_domain {
    unsigned int users;
};

struct mlx5dv_dr_table {
    struct mlx5dv_dr_domain *domain;
    unsigned int users;
};

struct mlx5dv_dr_matcher {
    struct mlx5dv_dr_table *table;
    unsigned int users;
    uint16_t priority;
    uint8_t mask[PRM_FLOW_MATCH_SIZE];
};

struct mlx5dv_dr_action {
    struct tir *tir;
    unsigned int users;
};

struct rule {
    struct rule *next;
    struct mlx5dv_dr_matcher *matcher;
    struct mlx5dv_dr_action *action;
    uint8_t value[PRM_FLOW_MATCH_SIZE];
};

static bool lists(const struct rule *rule, const struct object *queue)
{
    const struct rqt *rqt = rule->action->tir->rqt;

    for (unsigned int i = 0; i < rqt->count; i++) {
        if (rqt->queue[i] == queue) {
            return true;
        }
    }
    return false;
}

bool steering_leads_to(const struct device *device, const struct object *queue)
{
    for (const struct rule *rule = device->rules; rule != NULL; rule = rule->next) {
        if (lists(rule, queue)) {
            return true;
        }
    }
    return false;
}

static uint64_t destination(const uint8_t *match)
{
    return prm_get(match, PRM_FLOW_MATCH_DMAC_47_16) << 16 | prm_get(match, PRM_FLOW_MATCH_DMAC_15_0);
}

static void admit(struct filter *filter, const uint8_t *mask, const uint8_t *value)
{
    const uint64_t to = destination(value);

    if (destination(mask) == 0) {
        filter->promiscuous = true;
    } else if (destination(mask) == GROUP_BIT) {
        filter->multicast = FILTER_ALL;
        filter->broadcast = true;
    } else if (filter->macs < FILTER_MAX_MACS) {
        for (unsigned int i = 0; i < FILTER_MAC_SIZE; i++) {
            filter->mac[filter->macs][i] = to >> 8 * (FILTER_MAC_SIZE - 1 - i);
        }
        filter->macs++;
    }
}

/*
 * By destination alone: of the rules for one protocol each driver makes another for all protocols, with the same
 * table behind it.
 */
void steering_filter(const struct device *device, const struct object *queue, struct filter *filter)
{
    *filter = (struct filter){ .on = true, .unicast = FILTER_LISTED, .vlan = FILTER_ALL };
    for (const struct rule *rule = device->rules; rule != NULL; rule = rule->next) {
        if (lists(rule, queue)) {
            admit(filter, rule->matcher->mask, rule->value);
        }
    }
}

void steering_close(struct device *device)
{
    while (device->rules != NULL) {
        struct rule *rule = device->rules;

        device->rules = rule->next;
        rule->matcher->users--;
        rule->action->users--;
        free(rule);
    }
}

/* Count a user of what is made, or free what was not. */
static void *made(void *object, unsigned int *users)
{
    if (object != NULL && users != NULL) {
        (*users)++;
    }
    return object;
}

/* Free what nobody uses; EBUSY else. `of`: what it used. */
static int unmade(void *object, unsigned int users, unsigned int *of)
{
    if (users > 0) {
        return EBUSY;
    }
    if (of != NULL) {
        (*of)--;
    }
    free(object);
    return 0;
}

static void *refused(int error)
{
    errno = error;
    return NULL;
}

EXPORT struct mlx5dv_dr_domain *mlx5dv_dr_domain_create(struct ibv_context *context, int type)
{
    (void)context;
    if (type != MLX5DV_DR_DOMAIN_TYPE_NIC_RX) {
        return refused(EOPNOTSUPP);
    }
    return calloc(1, sizeof(struct mlx5dv_dr_domain));
}

EXPORT int mlx5dv_dr_domain_destroy(struct mlx5dv_dr_domain *domain)
{
    return unmade(domain, domain->users, NULL);
}

EXPORT struct mlx5dv_dr_table *mlx5dv_dr_table_create(struct mlx5dv_dr_domain *domain, uint32_t level)
{
    struct mlx5dv_dr_table *table;

    if (level != 0) {
        return refused(EOPNOTSUPP);
    }
    table = made(calloc(1, sizeof(*table)), &domain->users);
    if (table != NULL) {
        table->domain = domain;
    }
    return table;
}

EXPORT int mlx5dv_dr_table_destroy(struct mlx5dv_dr_table *table)
{
    return unmade(table, table->users, &table->domain->users);
}

/* A match is that of FLOW_MATCH and of nothing else. */
static bool is_match(const struct mlx5dv_flow_match_parameters *match)
{
    return match != NULL && match->match_sz >= PRM_FLOW_MATCH_SIZE &&
           !prm_reserved(&prm_flow_match, match->match_buf, match->match_sz);
}

static bool is_empty(const uint8_t *match)
{
    static const uint8_t nothing[PRM_FLOW_MATCH_SIZE];

    return memcmp(match, nothing, sizeof(nothing)) == 0;
}

/* Of destinations: all, one, or groups; by protocols besides, and by nothing else. */
static bool is_emulated(const uint8_t *mask)
{
    static const struct prm_field others[] = {
        PRM_FLOW_MATCH_SMAC_47_16, PRM_FLOW_MATCH_SMAC_15_0, PRM_FLOW_MATCH_ETHERTYPE, PRM_FLOW_MATCH_FIRST_VID,
        PRM_FLOW_MATCH_CVLAN_TAG,
    };

    for (size_t i = 0; i < sizeof(others) / sizeof(*others); i++) {
        if (prm_get(mask, others[i]) != 0) {
            return false;
        }
    }
    return destination(mask) == 0 || destination(mask) == EVERY_BIT || destination(mask) == GROUP_BIT;
}

EXPORT struct mlx5dv_dr_matcher *mlx5dv_dr_matcher_create(struct mlx5dv_dr_table *table, uint16_t priority,
                                                          uint8_t criteria, struct mlx5dv_flow_match_parameters *mask)
{
    struct mlx5dv_dr_matcher *matcher;

    if (!is_match(mask) || criteria > MOST_CRITERIA || priority > LOWEST_PRIORITY ||
        (criteria == 0) != is_empty((const uint8_t *)mask->match_buf)) {
        return refused(EINVAL);
    }
    if (!is_emulated((const uint8_t *)mask->match_buf)) {
        return refused(EOPNOTSUPP);
    }
    matcher = made(calloc(1, sizeof(*matcher)), &table->users);
    if (matcher != NULL) {
        matcher->table = table;
        matcher->priority = priority;
        memcpy(matcher->mask, mask->match_buf, sizeof(matcher->mask));
    }
    return matcher;
}

EXPORT int mlx5dv_dr_matcher_destroy(struct mlx5dv_dr_matcher *matcher)
{
    return unmade(matcher, matcher->users, &matcher->table->users);
}

EXPORT struct mlx5dv_dr_action *mlx5dv_dr_action_create_dest_devx_tir(struct mlx5dv_devx_obj *object)
{
    struct tir *tir = (struct tir *)object;
    struct mlx5dv_dr_action *action;

    if (object == NULL || tir->object.kind != KIND_TIR) {
        return refused(EINVAL);
    }
    action = made(calloc(1, sizeof(*action)), &tir->object.users);
    if (action != NULL) {
        action->tir = tir;
    }
    return action;
}

EXPORT int mlx5dv_dr_action_destroy(struct mlx5dv_dr_action *action)
{
    struct device *device = device_get();
    int result;

    pthread_mutex_lock(&device->lock);
    result = unmade(action, action->users, &action->tir->object.users);
    pthread_mutex_unlock(&device->lock);
    return result;
}

/* As the kernel wants it of who makes a flow. */
static bool may_make_rules(void)
{
    struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = { { 0 } };

    return syscall(SYS_capget, &header, data) == 0 && (data[0].effective & 1u << CAP_NET_RAW) != 0;
}

/* Whether a value asks for nothing that its matcher does not look at. */
static bool is_covered(const uint8_t *value, const uint8_t *mask)
{
    for (unsigned int i = 0; i < PRM_FLOW_MATCH_SIZE; i++) {
        if ((value[i] & ~mask[i]) != 0) {
            return false;
        }
    }
    return true;
}

static bool is_known(const struct device *device, const struct mlx5dv_dr_matcher *matcher, const uint8_t *value)
{
    for (const struct rule *rule = device->rules; rule != NULL; rule = rule->next) {
        if (rule->matcher == matcher && memcmp(rule->value, value, sizeof(rule->value)) == 0) {
            return true;
        }
    }
    return false;
}

static struct rule *add_rule(struct device *device, struct mlx5dv_dr_matcher *matcher, const uint8_t *value,
                             struct mlx5dv_dr_action *action)
{
    struct rule *rule;

    if (is_known(device, matcher, value)) {
        return refused(EEXIST);
    }
    rule = calloc(1, sizeof(*rule));
    if (rule == NULL) {
        return NULL;
    }
    *rule = (struct rule){ .next = device->rules, .matcher = matcher, .action = action };
    memcpy(rule->value, value, sizeof(rule->value));
    matcher->users++;
    action->users++;
    device->rules = rule;
    queues_steer(device);
    return rule;
}

EXPORT struct mlx5dv_dr_rule *mlx5dv_dr_rule_create(struct mlx5dv_dr_matcher *matcher,
                                                    struct mlx5dv_flow_match_parameters *value, size_t actions,
                                                    struct mlx5dv_dr_action *action[])
{
    struct device *device = device_get();
    struct rule *rule;
    uint8_t status;

    if (!is_match(value) || actions != 1 || !is_covered((const uint8_t *)value->match_buf, matcher->mask)) {
        return refused(EINVAL);
    }
    if (!may_make_rules()) {
        return refused(EPERM);
    }
    status = command_begin(device);
    rule = status == PRM_STATUS_OK ? add_rule(device, matcher, (const uint8_t *)value->match_buf, action[0])
                                   : refused(status_to_errno(status));
    command_end(device);
    return (struct mlx5dv_dr_rule *)rule;
}

EXPORT int mlx5dv_dr_rule_destroy(struct mlx5dv_dr_rule *abi)
{
    struct device *device = device_get();
    struct rule *rule = (struct rule *)abi, **at = &device->rules;
    int result = status_to_errno(command_begin(device));

    if (result == 0) {
        while (*at != rule) {
            at = &(*at)->next;
        }
        *at = rule->next;
        rule->matcher->users--;
        rule->action->users--;
        free(rule);
        queues_steer(device);
    }
    command_end(device);
    return result;
}
