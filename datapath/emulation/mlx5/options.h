/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What an emulated function is made with, as name=value,name=value…: the environment variable MLX5_EMULATION, or
 * where that is not set the file OPTIONS_FILE in the folder by which the library was opened. A link to the library
 * with such a file beside it thus is a function of its own.
 */
#ifndef MLX5_EMULATION_OPTIONS_H
#define MLX5_EMULATION_OPTIONS_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#define OPTIONS_VARIABLE "MLX5_EMULATION"
#define OPTIONS_FILE "mlx5_emulated.options"
#define OPTIONS_MAX_PAIRS 64
#define OPTIONS_MAX_SLOTS 1024
#define INTERFACE_NAME_SIZE 16   /* IFNAMSIZ */

struct options {
    char name[64];              /* name: of the RDMA device */
    char ibdev_path[256];       /* ibdev: its folder, in which device/uevent names the PCI function */
    unsigned int latency_us;    /* latency_us: of a command */
    unsigned int slots;         /* slots: commands that firmware works on at a time */
    unsigned int pairs;         /* pairs: of queues */
    unsigned int fail;          /* fail: number of the command, from 1, that fails; 0 none */
    unsigned int dead;          /* dead: number of the command from which on all do, and nothing moves; 0 none */
    unsigned int hang;          /* hang: number of the command from which on none is answered, likewise; 0 none */
    bool resumes;               /* resumes: a suspended queue can be made ready again, 0 or 1 */
    unsigned int uplinks;
    int uplink[OPTIONS_MAX_PAIRS];      /* uplink: descriptors, one a pair, as 5:6:7; without it frames come back */
    char tap[INTERFACE_NAME_SIZE];      /* tap: name of a TAP interface to be made for the uplink, instead of descriptors */
    char bridge[INTERFACE_NAME_SIZE];   /* bridge: that the TAP joins */
    unsigned int mtu;           /* mtu: of the function and its TAP, in bytes */
    bool header;                /* header: frames on the uplink have a virtio_net_hdr_v1 before them, 0 or 1 */
};

/* Read them. False, with a line on standard error: what is there makes no sense. */
bool options_read(struct options *options);

#endif
