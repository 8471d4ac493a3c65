/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a test of the dirty log does too often for Python: frames whose every part tells when it was sent, the
 * search for those parts in guest memory, and a log that is taken and cleared while others set bits in it.
 *
 * A frame is an Ethernet header, two bytes, and cells of 16 bytes: a mark, the cell's number in the frame, the
 * frame's number and a checksum. Frame numbers never come again, so a cell in guest memory says that what it
 * lies in was written after the frame of that number had been sent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define PAGE 4096
#define BURST 32
#define MAX_FRAME 9216
#define ETHERNET_HEADER 14
#define CELLS_AT 16             /* in the frame */
#define NET_HEADER 12           /* before the frame, in the buffer (virtio 1.3 section 5.1.6) */

struct cell {
    uint32_t mark;
    uint16_t index;
    uint16_t number_high;
    uint32_t number_low;
    uint32_t check;
} __attribute__((packed));

static const uint32_t MARK = 0x6c6c6563;

static uint32_t checksum(const struct cell *cell)
{
    uint64_t word = (uint64_t)cell->index << 48 | (uint64_t)cell->number_high << 32 | cell->number_low;

    return (uint32_t)((word * 0x9e3779b97f4a7c15u) >> 32) ^ MARK;
}

static uint64_t number_of(const struct cell *cell)
{
    return (uint64_t)cell->number_high << 32 | cell->number_low;
}

static void fill(uint8_t *frame, size_t length, uint64_t number)
{
    for (size_t at = CELLS_AT; at + sizeof(struct cell) <= length; at += sizeof(struct cell)) {
        struct cell cell = {
            .mark = MARK,
            .index = (at - CELLS_AT) / sizeof(cell),
            .number_high = number >> 32,
            .number_low = number,
        };

        cell.check = checksum(&cell);
        memcpy(frame + at, &cell, sizeof(cell));
    }
}

/* How frames are sent; a thread of their own does, others look and stop it. */
struct traffic {
    int fd;
    uint16_t shortest, longest; /* bytes, of a frame; all lengths between come in turn, by 16 */
    uint32_t pause;             /* microseconds after each burst */
    uint8_t header[ETHERNET_HEADER];
    uint64_t next;              /* number of the next frame: all before it have been sent, or are being */
    uint64_t refused;           /* frames that the link did not take */
    uint32_t stop;
    uint32_t idle;              /* wanted: no frame for now; what is seen in `resting` */
    uint32_t resting;
};

static void wait_a_little(uint32_t microseconds)
{
    struct timespec time = { 0, microseconds * 1000L };

    nanosleep(&time, NULL);
}

static uint16_t length_of(const struct traffic *traffic, uint64_t number)
{
    unsigned int choices = (traffic->longest - traffic->shortest) / 16 + 1;

    return traffic->shortest + number % choices * 16;
}

/* Send until told to stop. 0, or what the link said. */
int traffic_run(struct traffic *traffic)
{
    static _Thread_local uint8_t frame[BURST][MAX_FRAME];
    struct iovec part[BURST];
    struct mmsghdr message[BURST];

    while (!__atomic_load_n(&traffic->stop, __ATOMIC_ACQUIRE)) {
        uint64_t first = traffic->next;
        int sent = 0;

        __atomic_store_n(&traffic->resting, traffic->idle, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&traffic->idle, __ATOMIC_SEQ_CST)) {
            wait_a_little(1000);
            continue;
        }
        /* Said before they are sent: a cell that is found later is of a number below `next`. */
        __atomic_store_n(&traffic->next, first + BURST, __ATOMIC_SEQ_CST);
        memset(message, 0, sizeof(message));
        for (unsigned int i = 0; i < BURST; i++) {
            part[i] = (struct iovec){ frame[i], length_of(traffic, first + i) };
            memcpy(frame[i], traffic->header, ETHERNET_HEADER);
            fill(frame[i], part[i].iov_len, first + i);
            message[i].msg_hdr.msg_iov = &part[i];
            message[i].msg_hdr.msg_iovlen = 1;
        }
        while (sent < BURST) {
            int now = sendmmsg(traffic->fd, message + sent, BURST - sent, 0);

            if (now < 0 && errno != ENOBUFS && errno != EAGAIN && errno != EINTR) {
                return errno;
            }
            traffic->refused += now < 0;
            sent += now < 0 ? 1 : now;
        }
        wait_a_little(traffic->pause);
    }
    return 0;
}

/* The next whole cell of a frame from `since` on, at `from` or later; NULL when there is none. */
static const uint8_t *next_cell(const uint8_t *from, const uint8_t *end, uint64_t since, struct cell *cell)
{
    while (from + sizeof(*cell) <= end) {
        from = memmem(from, end - from, &MARK, sizeof(MARK));
        if (from == NULL || from + sizeof(*cell) > end) {
            return NULL;
        }
        memcpy(cell, from, sizeof(*cell));
        if (cell->check == checksum(cell) && number_of(cell) >= since) {
            return from;
        }
        from++;
    }
    return NULL;
}

static void set(uint8_t *pages, size_t from, size_t length)
{
    for (size_t page = from / PAGE; page <= (from + length - 1) / PAGE; page++) {
        pages[page / 8] |= 1u << page % 8;
    }
}

/* Set the bits of pages that hold a part of a frame from `since` on, or its header. How many cells there are. */
uint64_t cells_find(const uint8_t *memory, size_t size, uint64_t since, uint8_t *pages)
{
    const uint8_t *at = memory, *end = memory + size;
    uint64_t count = 0;
    struct cell cell;

    while ((at = next_cell(at, end, since, &cell)) != NULL) {
        size_t before = cell.index == 0 ? CELLS_AT + NET_HEADER : 0, offset = at - memory;

        if (before <= offset) {
            set(pages, offset - before, before + sizeof(cell));
        }
        at += sizeof(cell);
        count++;
    }
    return count;
}

/*
 * Compare what frames have left in memory with a copy: cells, Ethernet headers, and with `headers` what stands
 * before those. How many cells differ, with what belongs to them; `first` is where.
 */
uint64_t cells_compare(const uint8_t *memory, const uint8_t *copy, size_t size, bool headers, uint64_t *first)
{
    const uint8_t *at = memory, *end = memory + size;
    uint64_t count = 0;
    struct cell cell;

    while ((at = next_cell(at, end, 0, &cell)) != NULL) {
        size_t before = cell.index > 0 ? 0 : headers ? CELLS_AT + NET_HEADER : CELLS_AT, offset = at - memory;

        if (before <= offset && memcmp(at - before, copy + offset - before, before + sizeof(cell)) != 0) {
            *first = count == 0 ? offset : *first;
            count++;
        }
        at += sizeof(cell);
    }
    return count;
}

/*
 * Take the bits of a log as QEMU does: those that are set are cleared at once, and only then the pages are read.
 * `words` of 64 bits; `taken` is what was set now, to `ever` it is added.
 */
uint64_t log_take(uint64_t *log, size_t words, uint64_t *taken, uint64_t *ever)
{
    uint64_t count = 0;

    for (size_t i = 0; i < words; i++) {
        taken[i] = 0;
        if (__atomic_load_n(&log[i], __ATOMIC_RELAXED) != 0) {
            taken[i] = __atomic_exchange_n(&log[i], 0, __ATOMIC_SEQ_CST);
            ever[i] |= taken[i];
            count += __builtin_popcountll(taken[i]);
        }
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return count;
}

/* Copy the pages from number `first` on whose bits are set in `taken`: bit n is page n. */
void pages_copy(const uint8_t *taken, uint64_t first, size_t size, const uint8_t *memory, uint8_t *copy)
{
    for (size_t offset = 0; offset < size; offset += PAGE) {
        uint64_t page = first + offset / PAGE;

        if (taken[page / 8] >> page % 8 & 1) {
            memcpy(copy + offset, memory + offset, PAGE);
        }
    }
}
