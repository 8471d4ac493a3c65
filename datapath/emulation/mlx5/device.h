/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One emulated function: what it was made with, who has it open, and the objects that were made on it. Memory keys
 * are addresses of the process, so a function lives in its driver's process and there is one.
 *
 * Calls come from any thread. `lock` guards all that is here and hangs on it; command_begin() takes it, after the
 * time that firmware would need.
 */
#ifndef MLX5_EMULATION_DEVICE_H
#define MLX5_EMULATION_DEVICE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "abi.h"
#include "options.h"
#include "prm.h"

#define PAGE_SIZE 4096u
/* Pages of the device's memory: doorbells and UARs. */
#define DEVICE_PAGES 64

enum object_kind {
    KIND_PD,
    KIND_MR,
    KIND_UMEM,
    KIND_MKEY,
    KIND_TD,
    KIND_TIS,
    KIND_RQT,
    KIND_TIR,
    KIND_CQ,
    KIND_QP,
    KIND_COUNTERS,
    KIND_VIRTQ,
};

/* Where packets come from and go to. */
struct wire {
    unsigned int count;         /* descriptors, one a pair; 0: packets come back */
    int fd[OPTIONS_MAX_PAIRS];
    bool header;                /* see struct engine_uplink */
    bool tap;                   /* they are ours: queues of a TAP */
};

/* What all objects begin with; each is in a piece of memory of its own. */
struct object {
    struct object *next;
    enum object_kind kind;
    uint32_t id;                /* 24 bits, never 0, of no other object */
    unsigned int users;         /* objects that cannot be without it */
    unsigned int uses;
    struct object **used;       /* which it cannot be without */
};

struct device {
    pthread_mutex_t lock;
    struct options options;
    struct ibv_device ibv;

    struct verbs_context *context;      /* NULL: nobody has it open */
    int memory_fd;              /* DEVICE_PAGES to be mapped by whoever rings */
    uint8_t *memory;
    bool page_taken[DEVICE_PAGES];

    struct wire wire;           /* while it is open */
    int async_fd[2];            /* that its driver reads the kernel's events of it from, and the kernel's end */
    bool died;                  /* it does nothing any more */
    bool hangs;                 /* and answers no command */

    struct object *objects;
    uint32_t last_id;

    int64_t slot_until[OPTIONS_MAX_SLOTS];      /* when each slot has done what it has, by the monotonic clock; ns */
    unsigned int commands;      /* that were begun since the device was opened */

    struct subscription *subscriptions;     /* see channels.h */
    struct rule *rules;                     /* see steering.h */
    struct queues *queues;                  /* see queues.h; NULL while it is not open */
};

/* The function. */
struct device *device_get(void);

/* Make it what MLX5_EMULATION describes, unless it is open. False, with a line on standard error: that is none. */
bool device_describe(struct device *device);

static inline struct device *device_of(struct ibv_context *context)
{
    (void)context;
    return device_get();
}

/* Open and close; -errno. Closing gives back what was forgotten. */
int device_open(struct device *device);
void device_close(struct device *device);

/* The firmware dies: nothing moves, every command fails, or none is answered; the kernel tells. */
void device_die(struct device *device, bool hangs);

/*
 * Wait for one of the firmware's slots and for as long as a command takes, then hold the device until command_end().
 * A status: that with which the command fails for no fault of the driver (see struct options).
 */
uint8_t command_begin(struct device *device);
void command_end(struct device *device);

/* As what the kernel returns a status. */
int status_to_errno(uint8_t status);

/* A page of the device's memory; -1: there is none left. Number 0 is none: no UAR may have it. */
int device_take_page(struct device *device);
void device_free_page(struct device *device, unsigned int page);

/* A new object of `size` bytes, all 0 behind its head; NULL: no memory. */
void *object_new(struct device *device, enum object_kind kind, size_t size);

/* That `object` cannot be without `used`, which may be NULL; and that it now can. False: no memory. */
bool object_use(struct object *object, struct object *used);
void object_let_go(struct object *object, struct object *used);

/* Free one that nobody uses. PRM_STATUS_BAD_RESOURCE_STATE: somebody does. */
uint8_t object_free(struct device *device, struct object *object);

/* NULL: there is none. */
struct object *object_find(struct device *device, enum object_kind kind, uint32_t id);

#define container_of(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

#endif
