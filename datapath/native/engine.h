/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The packet engine of one emulated network VF: one thread that moves packets between packet descriptors (the
 * queues of a TAP, or datagram sockets) and as many pairs of a receive and a transmit virtqueue. The thread
 * sleeps while there is nothing to do and polls for a short time after there was.
 *
 * As a device it trusts nothing that the driver wrote. A bad ring, or memory that is no longer there,
 * stops all queues until engine_reset() and is reported through engine_fault_fd().
 *
 * Any thread may call. When a call returns, the engine's thread has seen it: it no longer uses the
 * memory, queue or descriptor that was taken away. Functions that return int give 0 or a negative errno.
 */
#ifndef LIBVIRT_VDPA_ENGINE_H
#define LIBVIRT_VDPA_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "filter.h"
#include "ring.h"

/* cffi: begin */
/* Queues are numbered as in section 5.1.2: that of a pair which receives is even, the other the next one. */
#define ENGINE_RX 0
#define ENGINE_TX 1
#define ENGINE_MAX_PAIRS 8
/* A doorbell cell that nobody has rung; section 4.1.5.2: a driver stores its queue's number. */
#define ENGINE_NOT_RUNG 0xffff

struct engine;

struct engine_counters {
    uint64_t packets;
    uint64_t bytes;
    uint64_t dropped;
    uint64_t filtered;          /* not for the driver, see engine_set_filter() */
    uint64_t kicks;             /* wake-ups by the driver */
    uint64_t interrupts;
};

/* Where packets come from and go to. */
struct engine_uplink {
    unsigned int pairs;
    int packet_fd[ENGINE_MAX_PAIRS];    /* non-blocking; the caller keeps them open until engine_close().
                                   -1 for all: what the driver sends comes back, its addresses exchanged */
    bool header;                /* each frame has a struct virtio_net_hdr_v1 before it, as on a TAP with
                                   IFF_VNET_HDR; else it is alone, and nothing can be left to the other side */
    uint16_t mtu;               /* largest packet on the wire, without its Ethernet header; 0: no limit */
};

int engine_open(const struct engine_uplink *uplink, struct engine **engine);
void engine_close(struct engine *engine);

/*
 * Make new doorbells; those that were there ring no more. They are shared with a client, who may spoil them,
 * so each client needs its own. doorbell_fd: a memfd with a page per queue whose first 16 bits are the
 * queue's doorbell, to be polled; or -1. The caller may close it afterwards. An error leaves none.
 */
int engine_open_doorbells(struct engine *engine, int doorbell_fd);
void engine_close_doorbells(struct engine *engine);

/*
 * The socket of the client that has the device, which stays the caller's until it is called for another one,
 * or for -1. When the client hangs up, the device stops before it is told to: what a process had mapped is
 * taken from a real VF before others can see that the process has died.
 */
int engine_set_client(struct engine *engine, int client_fd);

/* While the device does not run, leave what comes on the uplink; without this it is lost, as on most NICs. */
void engine_keep_packets(struct engine *engine, bool keep);

/* Eventfd that notifies a queue, owned by the engine, -1 without doorbells; and one for faults. */
int engine_kick_fd(struct engine *engine, unsigned int queue);
int engine_fault_fd(struct engine *engine);

/* See dma_add() and dma_remove(). */
int engine_map(struct engine *engine, uint64_t iova, uint64_t size, int fd, uint64_t offset, bool writable);
int engine_unmap(struct engine *engine, uint64_t iova, uint64_t size);
void engine_unmap_all(struct engine *engine);

/*
 * Program a queue. It is looked at when it is notified, or a packet comes for it. -EBUSY: it is programmed.
 * -EINVAL: see ring_start().
 */
int engine_start_queue(struct engine *engine, unsigned int queue, const struct ring_setup *setup);

/*
 * Take a queue out; harmless if there is none. The state is that of the last programming. Packets for a receive
 * queue that is out wait on the uplink while the device runs, as in the packet buffer of a NIC.
 */
struct ring_state engine_stop_queue(struct engine *engine, unsigned int queue);

/* Notify a queue. Unlike a write to its eventfd, this no client can hinder. */
void engine_kick(struct engine *engine, unsigned int queue);

/*
 * Interrupt by this eventfd from now on, -1 for none. It stays the caller's, and should not block: one that
 * does is a fault.
 */
void engine_set_call(struct engine *engine, unsigned int queue, int call_fd);

/*
 * Whether programmed queues move packets. While they do not, notifications wait, and packets that come are
 * lost.
 */
void engine_run(struct engine *engine, bool on);

/* How many pairs receive, from the first on. What has been read for others is lost. */
void engine_use_pairs(struct engine *engine, unsigned int pairs);

/*
 * The features of virtio that the driver has accepted, of which those count that let packets be left without
 * checksum, or unsegmented. What the driver sends against them is dropped, and so is what it could not take.
 */
void engine_set_features(struct engine *engine, uint64_t features);

/*
 * Which of the packets that come are for the driver; NULL: all. It is no part of what the driver sets, and stays
 * after a reset. An echo has none.
 */
void engine_set_filter(struct engine *engine, const struct filter *filter);

/* Set bits for pages that packets are written to; the rings themselves are not logged. */
void engine_set_log(struct engine *engine, bool on, uint64_t base, uint64_t end);

/* Take out all queues, forget a fault and features, log no more, do not run. Mappings and call descriptors stay. */
void engine_reset(struct engine *engine);

/* What was wrong and in which queue; NULL if nothing was. */
const char *engine_fault(struct engine *engine, unsigned int *queue);

struct engine_counters engine_count(struct engine *engine, unsigned int queue);
/* cffi: end */

/* See dma_borrow(): for a device that lives in its driver's process. */
int engine_borrow(struct engine *engine, uint64_t iova, uint64_t size, void *host);

#endif
