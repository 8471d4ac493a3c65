/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What an emulated function is made with: the environment variable MLX5_EMULATION, as name=value,name=value… */
#ifndef MLX5_EMULATION_OPTIONS_H
#define MLX5_EMULATION_OPTIONS_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#define OPTIONS_VARIABLE "MLX5_EMULATION"
#define OPTIONS_MAX_PAIRS 64

struct options {
    char name[64];              /* name: of the RDMA device */
    char ibdev_path[256];       /* ibdev: its folder, in which device/uevent names the PCI function */
    unsigned int latency_us;    /* latency_us: of a command */
    unsigned int slots;         /* slots: commands that firmware works on at a time */
    unsigned int pairs;         /* pairs: of queues */
    unsigned int fail;          /* fail: number of the command, from 1, that fails; 0 none */
    unsigned int dead;          /* dead: number of the command from which on all do; 0 none */
    bool resumes;               /* resumes: a suspended queue can be made ready again, 0 or 1 */
    unsigned int uplinks;
    int uplink[OPTIONS_MAX_PAIRS];      /* uplink: descriptors, one a pair, as 5:6:7; without it frames come back */
    bool header;                /* header: frames on the uplink have a virtio_net_hdr_v1 before them, 0 or 1 */
};

/* Read them. False, with a line on standard error: what is there makes no sense. */
bool options_read(struct options *options);

#endif
