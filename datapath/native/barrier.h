/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Ordering between this processor and a device that reaches memory by DMA. C11's fences and ordered
 * accesses speak of threads. On arm64 they become barriers of the inner shareable domain (dmb ish), and a
 * device may be in the outer one: so "dmb osh", as the kernel's dma_rmb() and dma_wmb(). On x86-64 what
 * orders threads orders devices.
 */
#ifndef LIBVIRT_VDPA_BARRIER_H
#define LIBVIRT_VDPA_BARRIER_H

#include <stdint.h>

/* All loads and stores before come before all after it, a store before a load as well. */
static inline void device_fence(void)
{
#ifdef __aarch64__
    __asm__ volatile("dmb osh" : : : "memory");
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* Load an index; whatever the device had written when it moved the index there is seen by later loads. */
static inline uint16_t device_load_acquire(const uint16_t *from)
{
    uint16_t value = __atomic_load_n(from, __ATOMIC_ACQUIRE);

#ifdef __aarch64__
    __asm__ volatile("dmb oshld" : : : "memory");
#endif
    return value;
}

/* The same of a word. */
static inline uint32_t device_load_acquire_word(const uint32_t *from)
{
    uint32_t value = __atomic_load_n(from, __ATOMIC_ACQUIRE);

#ifdef __aarch64__
    __asm__ volatile("dmb oshld" : : : "memory");
#endif
    return value;
}

/*
 * Store an index; a device that sees it sees what was written before, here or by whom this thread has
 * heard of it (the guest's descriptors and data).
 */
static inline void device_store_release(uint16_t *to, uint16_t value)
{
#ifdef __aarch64__
    __asm__ volatile("dmb osh" : : : "memory");
#endif
    __atomic_store_n(to, value, __ATOMIC_RELEASE);
}

/* The same of a word. */
static inline void device_store_release_word(uint32_t *to, uint32_t value)
{
#ifdef __aarch64__
    __asm__ volatile("dmb osh" : : : "memory");
#endif
    __atomic_store_n(to, value, __ATOMIC_RELEASE);
}

#endif
