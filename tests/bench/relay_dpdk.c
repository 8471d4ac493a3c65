/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "relay_dpdk.h"

#include <linux/virtio_ring.h>
#include <pthread.h>
#include <string.h>

#include <rte_eal.h>
#include <rte_vdpa.h>
#include <rte_vhost.h>

#include "used_entries.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int device = -1;

static void set_device(int vid)
{
    pthread_mutex_lock(&lock);
    device = vid;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static int new_device(int vid)
{
    set_device(vid);
    return 0;
}

static void destroy_device(int vid)
{
    (void)vid;
    set_device(-1);
}

static const struct rte_vhost_device_ops operations = {
    .new_device = new_device,
    .destroy_device = destroy_device,
};

int dpdk_begin(char **words, int count)
{
    return rte_eal_init(count, words) < 0 ? -1 : 0;
}

int dpdk_serve(const char *path)
{
    if (rte_vhost_driver_register(path, 0) != 0) {
        return -1;
    }
    if (rte_vhost_driver_callback_register(path, &operations) != 0) {
        return -1;
    }
    return rte_vhost_driver_start(path);
}

int dpdk_end(const char *path)
{
    return rte_vhost_driver_unregister(path);
}

int dpdk_wait_device(int milliseconds)
{
    struct timespec end;
    int vid;

    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += milliseconds / 1000;
    end.tv_nsec += milliseconds % 1000 * 1000000L;
    if (end.tv_nsec >= 1000000000L) {
        end.tv_sec++;
        end.tv_nsec -= 1000000000L;
    }
    pthread_mutex_lock(&lock);
    while (device < 0 && pthread_cond_timedwait(&changed, &lock, &end) == 0) {
    }
    vid = device;
    pthread_mutex_unlock(&lock);
    return vid;
}

int dpdk_relay(int vid, uint16_t queue, void *ring, uint16_t size, uint32_t length, uint16_t batch,
               uint8_t *log, size_t log_size, double *times, int count)
{
    struct vring mediated;
    volatile uint16_t *index;

    vring_init(&mediated, size, ring, 4096);
    for (uint16_t n = 0; n < size; n++) {
        mediated.used->ring[n] = (struct vring_used_elem){.id = n, .len = length};
    }
    index = &mediated.used->idx;
    for (int n = 0; n < count; n++) {
        double begin;

        memset(log, 0, log_size);
        begin = nanoseconds();
        for (uint16_t done = 0; done < size; done += batch) {
            *index += batch;
            if (rte_vdpa_relay_vring_used(vid, queue, &mediated) != batch) {
                return -1;
            }
        }
        times[n] = (nanoseconds() - begin) / size;
    }
    return 0;
}
