/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Two processes that wake up in turn, for ever: by that a guest keeps changing address spaces.
 *
 * QEMU's software emulation loses writes during a live migration while it does not. When QEMU takes the dirty
 * bits of memory whose pages are all still to be sent, it does not tell the emulated processor's TLB, so a
 * page that was written before is written on without a mark, until the TLB is flushed; and a guest of which
 * one process alone wakes up, from idle to idle, does not flush it. (cpu_physical_memory_sync_dirty_bitmap()
 * in include/exec/ram_addr.h of QEMU 7.2 to 9.2. With KVM there is nothing of it.)
 */
#include <unistd.h>

#define BEAT_US 4000

int main(void)
{
    fork();
    for (;;)
        usleep(BEAT_US);
}
