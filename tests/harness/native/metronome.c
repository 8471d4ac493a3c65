/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Two processes that wake up in turn, for ever: by that a guest keeps changing address spaces.
 *
 * Under QEMU 7.2's software emulation a guest may lose writes during a live migration, whatever its NIC: one
 * with a plain TAP panicked on a stale kernel stack, or its streams came altered. The likely cause, not proved:
 * dirty bits are taken without the emulated processor's TLB hearing of it, so that a page is written on
 * without a mark until the TLB is flushed; and a guest of which one process alone wakes up, from idle to
 * idle, does not flush it.
 */
#include <unistd.h>

#define BEAT_US 4000

int main(void)
{
    fork();
    for (;;)
        usleep(BEAT_US);
}
