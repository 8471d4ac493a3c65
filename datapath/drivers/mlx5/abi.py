"""The part of the ABI of libibverbs and libmlx5 that a vDPA driver uses, for cffi's ABI mode (`abi_build`).

Structures and functions are those of rdma-core 44 to 64 (libibverbs/verbs.h, providers/mlx5/mlx5dv.h) on
64-bit Linux. Only what is read has its name; what lies between is padding. What those headers define
inline is in no library: `glue` has it again.
"""

import re

STRUCTURES = """
typedef struct {
    void *ops[2]; int node_type, transport_type;
    char name[64], dev_name[64], dev_path[256], ibdev_path[256];
} ibv_device;
typedef struct {
    ibv_device *device; void *ops[32]; int cmd_fd, async_fd, num_comp_vectors;
    uint64_t mutex[5]; uintptr_t abi_compat;
} ibv_context;
typedef struct { ibv_context *context; uint32_t handle; } ibv_pd;
typedef struct {
    ibv_context *context; ibv_pd *pd; void *addr; size_t length; uint32_t handle, lkey, rkey;
} ibv_mr;
typedef struct { uint32_t flags; uint64_t comp_mask; } mlx5dv_context_attr;
typedef struct { uint32_t pdn; uint64_t comp_mask; } mlx5dv_pd;
typedef struct { uint8_t others[96]; ibv_pd *pd_in; mlx5dv_pd *pd_out; } mlx5dv_obj;
typedef struct { uint32_t umem_id; } mlx5dv_devx_umem;
typedef struct {
    void *reg_addr, *base_addr; uint32_t page_id; int64_t mmap_off; uint64_t comp_mask;
} mlx5dv_devx_uar;
typedef struct { uint32_t page_id, length; int64_t mmap_off; uint64_t comp_mask; } mlx5dv_var;
typedef struct { int fd; } mlx5dv_devx_event_channel;
typedef struct { size_t match_sz; uint8_t match_buf[320]; } mlx5dv_flow_match_parameters;
typedef ibv_mr *alloc_null_mr(ibv_pd *pd);
"""

#: What `glue` opens in libibverbs.
VERBS = """
ibv_device **ibv_get_device_list(int *count);
int ibv_close_device(ibv_context *context);
ibv_pd *ibv_alloc_pd(ibv_context *context);
int ibv_dealloc_pd(ibv_pd *pd);
ibv_mr *ibv_reg_mr_iova2(ibv_pd *pd, void *address, size_t size, uint64_t iova, unsigned int access);
int ibv_dereg_mr(ibv_mr *mr);
"""

#: What `glue` opens in libmlx5.
MLX5 = """
ibv_context *mlx5dv_open_device(ibv_device *device, mlx5dv_context_attr *attributes);
int mlx5dv_init_obj(mlx5dv_obj *object, uint64_t type);
int mlx5dv_devx_general_cmd(
    ibv_context *context, const void *in, size_t in_size, void *out, size_t out_size);
void *mlx5dv_devx_obj_create(
    ibv_context *context, const void *in, size_t in_size, void *out, size_t out_size);
int mlx5dv_devx_obj_modify(void *object, const void *in, size_t in_size, void *out, size_t out_size);
int mlx5dv_devx_obj_query(void *object, const void *in, size_t in_size, void *out, size_t out_size);
int mlx5dv_devx_obj_destroy(void *object);
mlx5dv_devx_umem *mlx5dv_devx_umem_reg(ibv_context *context, void *address, size_t size, uint32_t access);
int mlx5dv_devx_umem_dereg(mlx5dv_devx_umem *umem);
mlx5dv_devx_uar *mlx5dv_devx_alloc_uar(ibv_context *context, uint32_t type);
void mlx5dv_devx_free_uar(mlx5dv_devx_uar *uar);
mlx5dv_var *mlx5dv_alloc_var(ibv_context *context, uint32_t flags);
void mlx5dv_free_var(mlx5dv_var *var);
int mlx5dv_devx_query_eqn(ibv_context *context, uint32_t vector, uint32_t *eqn);
mlx5dv_devx_event_channel *mlx5dv_devx_create_event_channel(ibv_context *context, int flags);
void mlx5dv_devx_destroy_event_channel(mlx5dv_devx_event_channel *channel);
int mlx5dv_devx_subscribe_devx_event(
    mlx5dv_devx_event_channel *channel, void *object, uint16_t size, uint16_t *events, uint64_t cookie);
ssize_t mlx5dv_devx_get_event(mlx5dv_devx_event_channel *channel, void *event, size_t size);
void *mlx5dv_dr_domain_create(ibv_context *context, int type);
int mlx5dv_dr_domain_destroy(void *domain);
void *mlx5dv_dr_table_create(void *domain, uint32_t level);
int mlx5dv_dr_table_destroy(void *table);
void *mlx5dv_dr_matcher_create(
    void *table, uint16_t priority, uint8_t criteria, mlx5dv_flow_match_parameters *mask);
int mlx5dv_dr_matcher_destroy(void *matcher);
void *mlx5dv_dr_action_create_dest_devx_tir(void *tir);
int mlx5dv_dr_action_destroy(void *action);
void *mlx5dv_dr_rule_create(
    void *matcher, mlx5dv_flow_match_parameters *value, size_t count, void **actions);
int mlx5dv_dr_rule_destroy(void *rule);
"""

#: IBV_ACCESS_LOCAL_WRITE; also the access of a UMEM that the device writes.
LOCAL_WRITE = 1
#: MLX5DV_CONTEXT_FLAGS_DEVX.
DEVX = 1
#: MLX5DV_OBJ_PD.
OBJ_PD = 0x40
#: MLX5_IB_UAPI_UAR_ALLOC_TYPE_NC: a page of doorbells that are not cached.
UAR_NOT_CACHED = 1
#: MLX5DV_DEVX_CREATE_EVENT_CHANNEL_FLAGS_OMIT_EV_DATA: an event is its cookie alone.
OMIT_EVENT_DATA = 1
#: MLX5DV_DR_DOMAIN_TYPE_NIC_RX.
DOMAIN_RECEIVE = 0
#: Before an ibv_context whose `abi_compat` is all ones lies what libibverbs has added over time
#: (verbs_context of verbs.h). Bytes back from the context: where its `alloc_null_mr` is, and its size.
ALLOC_NULL_MR_BACK = 304
SIZE_BACK = 8
#: Bytes of it that there must be for `alloc_null_mr` to be among them, with the 328 of the context.
LEAST_SIZE = 632


def functions(declarations: str) -> list[str]:
    """The names of the functions that are declared."""
    return re.findall(r"(\w+)\(", declarations)
