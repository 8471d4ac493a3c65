/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * As much traffic as goes between a guest and a peer, and what of it arrives. The same program on both sides:
 *
 *     load serve PORT                                  in the guest; one peer after another
 *     load drive ADDRESS PORT WHAT SIZE MS RATE        at the peer
 *
 * WHAT: stream-in, stream-out (a TCP stream to the guest and from it, SIZE bytes a call), datagrams-in,
 * datagrams-out (UDP, SIZE bytes each), echo (UDP there and back, one at a time). It goes on for MS
 * milliseconds. RATE limits what a peer sends: datagrams a second, 0 for no limit.
 *
 * The peer asks by a TCP connection, which for streams carries them, too. It prints what the receiver counted
 * between the first and the last that came, as JSON: {"count", "bytes", "seconds"} (a count of datagrams; of
 * echoes, those that came back) and for echoes their times, {"median_us", "most_us"}, with the 99th percentile
 * for the most.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NS 1000000000ull
#define MS 1000000ull
#define LARGEST 65536
/* Nothing has come for this long: nothing will. */
#define QUIET_MS 100
/* A sender with a rate sleeps so long between bursts. */
#define BURST_NS 200000
/* So long at the most is one echo waited for, and so long beyond the end for the first that comes at all. */
#define ECHO_MS 500
#define FIRST_ECHO_NS (5 * NS)
/* For the guest to serve, and for it to answer. */
#define CONNECT_TRIES 100
#define CONNECT_NS (100 * MS)
#define ANSWER_SECONDS 20
#define RECEIVE_BUFFER (1 << 20)
#define MOST_ECHOES (1u << 20)

enum what { STREAM_IN, STREAM_OUT, DATAGRAMS_IN, DATAGRAMS_OUT, ECHO, KINDS };

static const char *const kinds[KINDS] = { "stream-in", "stream-out", "datagrams-in", "datagrams-out", "echo" };

struct request {
    uint32_t what, size, ms;
    uint16_t port;              /* the peer's for datagrams, in network order */
};

struct count {
    uint64_t count, bytes, first, last;
};

static uint8_t buffer[LARGEST];

static void __attribute__((noreturn)) fail(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, errno ? strerror(errno) : "the other side has ended it");
    exit(1);
}

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * NS + time.tv_nsec;
}

static void limit_receive(int fd, unsigned int ms)
{
    struct timeval limit = { ms / 1000, ms % 1000 * 1000 };

    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
}

static bool read_all(int fd, void *to, size_t size)
{
    errno = 0;
    return recv(fd, to, size, MSG_WAITALL) == (ssize_t)size;
}

static void add(struct count *count, size_t bytes)
{
    count->last = now();
    if (count->count++ == 0) {
        count->first = count->last;
    }
    count->bytes += bytes;
}

static int datagram_socket(uint16_t port)
{
    struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = port };
    int fd = socket(AF_INET, SOCK_DGRAM, 0), size = RECEIVE_BUFFER;

    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
    if (fd < 0 || bind(fd, (struct sockaddr *)&here, sizeof(here)) < 0) {
        fail("a socket for datagrams");
    }
    limit_receive(fd, QUIET_MS);
    return fd;
}

/* Whether the other side has said by `control` that it is done, or has gone. */
static bool is_over(int control)
{
    char byte;

    return recv(control, &byte, 1, MSG_DONTWAIT | MSG_PEEK) >= 0 || (errno != EAGAIN && errno != EINTR);
}

static struct count receive_stream(int fd)
{
    struct count count = { 0 };
    ssize_t got;

    while ((got = recv(fd, buffer, sizeof(buffer), 0)) > 0) {
        add(&count, got);
    }
    if (got < 0) {
        fail("receiving the stream");
    }
    return count;
}

/* Once at least, as all that send: on a busy machine all the time may be over before the first. */
static void send_stream(int fd, size_t size, uint64_t end)
{
    do {
        if (send(fd, buffer, size, MSG_NOSIGNAL) < 0) {
            fail("sending the stream");
        }
    } while (now() < end);
    shutdown(fd, SHUT_WR);
}

/* Until the sender is done and no more comes. */
static struct count receive_datagrams(int fd, int control)
{
    struct count count = { 0 };

    for (;;) {
        ssize_t got = recv(fd, buffer, sizeof(buffer), 0);

        if (got >= 0) {
            add(&count, got);
        } else if (is_over(control)) {
            return count;
        }
    }
}

static void send_datagrams(int fd, size_t size, uint64_t end, unsigned int rate)
{
    uint64_t begin = now(), sent = 0;

    for (uint64_t time = begin; time < end || sent == 0; time = now()) {
        if (rate && sent > (time - begin) / 1000 * rate / 1000000) {
            nanosleep(&(struct timespec){ 0, BURST_NS }, NULL);
        } else if (send(fd, buffer, size, 0) >= 0 || errno == ENOBUFS) {
            sent++;
        } else if (errno != ECONNREFUSED) {
            fail("sending datagrams");
        }
    }
}

static void reflect(int fd, int control)
{
    for (;;) {
        struct sockaddr_in from;
        socklen_t length = sizeof(from);
        ssize_t got = recvfrom(fd, buffer, sizeof(buffer), 0, (struct sockaddr *)&from, &length);

        if (got >= 0) {
            sendto(fd, buffer, got, 0, (struct sockaddr *)&from, length);
        } else if (is_over(control)) {
            return;
        }
    }
}

static int compare(const void *left, const void *right)
{
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;

    return (a > b) - (a < b);
}

/* Datagrams there and back until `end`, or until one has come back; nanoseconds of each into `times`. */
static struct count play(int fd, size_t size, uint64_t end, uint32_t *times)
{
    struct count count = { 0 };
    uint64_t number = 0, back, begin;

    limit_receive(fd, ECHO_MS);
    while ((begin = now()) < (count.count ? end : end + FIRST_ECHO_NS) && count.count < MOST_ECHOES) {
        number++;
        memcpy(buffer, &number, sizeof(number));
        if (send(fd, buffer, size, 0) < 0) {
            continue;
        }
        do {
            ssize_t got = recv(fd, buffer, sizeof(buffer), 0);

            back = 0;
            if (got < (ssize_t)sizeof(back)) {
                break;
            }
            memcpy(&back, buffer, sizeof(back));
        } while (back != number);
        if (back == number) {
            add(&count, size);
            times[count.count - 1] = count.last - begin;
        }
    }
    return count;
}

/* One peer's request. */
static void serve_one(int control, uint16_t port)
{
    struct sockaddr_in peer;
    socklen_t length = sizeof(peer);
    struct count count = { 0 };
    struct request request;
    int fd = -1;

    if (!read_all(control, &request, sizeof(request)) || request.what >= KINDS || request.size > LARGEST) {
        return;
    }
    if (request.what >= DATAGRAMS_IN) {
        fd = datagram_socket(port);
        getpeername(control, (struct sockaddr *)&peer, &length);
        peer.sin_port = request.port;
        if (request.what == DATAGRAMS_OUT && connect(fd, (struct sockaddr *)&peer, sizeof(peer)) < 0) {
            fail("the peer's datagrams");
        }
    }
    if (send(control, "", 1, MSG_NOSIGNAL) == 1) {      /* ready */
        uint64_t end = now() + request.ms * MS;

        switch (request.what) {
        case STREAM_IN:
            count = receive_stream(control);
            break;
        case STREAM_OUT:
            send_stream(control, request.size, end);
            break;
        case DATAGRAMS_IN:
            count = receive_datagrams(fd, control);
            break;
        case DATAGRAMS_OUT:
            send_datagrams(fd, request.size, end, 0);
            break;
        case ECHO:
            reflect(fd, control);
            break;
        }
        if (request.what != STREAM_OUT) {
            send(control, &count, sizeof(count), MSG_NOSIGNAL);
        }
    }
    if (fd >= 0) {
        close(fd);
    }
}

static void serve(uint16_t port)
{
    struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(port) };
    int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;

    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    if (bind(listener, (struct sockaddr *)&here, sizeof(here)) < 0 || listen(listener, 4) < 0) {
        fail("listening");
    }
    for (;;) {
        int control = accept(listener, NULL, NULL);
        pid_t child;

        if (control < 0) {
            continue;
        }
        child = fork();                 /* what goes wrong ends a peer's service alone */
        if (child == 0) {
            serve_one(control, htons(port));
            exit(0);
        }
        close(control);
    }
}

static int dial(const struct sockaddr_in *there)
{
    for (unsigned int tries = 0; tries < CONNECT_TRIES; tries++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);

        if (connect(fd, (const struct sockaddr *)there, sizeof(*there)) == 0) {
            return fd;
        }
        close(fd);
        nanosleep(&(struct timespec){ 0, CONNECT_NS }, NULL);
    }
    fail("connecting");
}

/* What the guest has counted. */
static struct count told(int control)
{
    struct count count;

    shutdown(control, SHUT_WR);
    limit_receive(control, ANSWER_SECONDS * 1000);
    if (!read_all(control, &count, sizeof(count))) {
        fail("the guest's count");
    }
    return count;
}

static void print_echoes(const struct count *count, uint32_t *times)
{
    if (count->count == 0) {
        errno = ETIMEDOUT;
        fail("echoes");
    }
    qsort(times, count->count, sizeof(*times), compare);
    printf("\"median_us\": %.3f, \"most_us\": %.3f, ", times[count->count / 2] / 1e3,
           times[(count->count * 99 + 99) / 100 - 1] / 1e3);
}

static void drive(struct sockaddr_in there, struct request request, unsigned int rate)
{
    int control = dial(&there), fd = datagram_socket(0);
    struct sockaddr_in here;
    socklen_t length = sizeof(here);
    uint32_t *times = calloc(MOST_ECHOES, sizeof(*times));
    struct count count = { 0 };
    uint64_t end;
    char ready;

    if (times == NULL || connect(fd, (struct sockaddr *)&there, sizeof(there)) < 0) {
        fail("datagrams");
    }
    getsockname(fd, (struct sockaddr *)&here, &length);
    request.port = here.sin_port;
    limit_receive(control, ANSWER_SECONDS * 1000);
    if (send(control, &request, sizeof(request), MSG_NOSIGNAL) < 0 || !read_all(control, &ready, 1)) {
        fail("asking the guest");
    }
    end = now() + request.ms * MS;
    printf("{");
    switch (request.what) {
    case STREAM_IN:
        send_stream(control, request.size, end);
        count = told(control);
        break;
    case STREAM_OUT:
        count = receive_stream(control);
        break;
    case DATAGRAMS_IN:
        send_datagrams(fd, request.size, end, rate);
        count = told(control);
        break;
    case DATAGRAMS_OUT:
        count = receive_datagrams(fd, control);
        break;
    case ECHO:
        count = play(fd, request.size, end, times);
        told(control);
        print_echoes(&count, times);
        break;
    }
    printf("\"count\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"seconds\": %.6f}\n", count.count, count.bytes,
           (count.last - count.first) / 1e9);
}

static unsigned int number(const char *text, unsigned int most)
{
    char *end;
    unsigned long value = strtoul(text, &end, 10);

    if (*end != '\0' || value > most) {
        fprintf(stderr, "load: '%s' is not a number up to %u\n", text, most);
        exit(2);
    }
    return value;
}

int main(int argc, char **argv)
{
    struct sockaddr_in there = { .sin_family = AF_INET };
    struct request request = { 0 };

    signal(SIGCHLD, SIG_IGN);
    if (argc == 3 && strcmp(argv[1], "serve") == 0) {
        serve(number(argv[2], UINT16_MAX));
    }
    if (argc != 8 || strcmp(argv[1], "drive") || inet_pton(AF_INET, argv[2], &there.sin_addr) != 1) {
        fputs("load: serve PORT, or drive ADDRESS PORT WHAT SIZE MS RATE\n", stderr);
        return 2;
    }
    there.sin_port = htons(number(argv[3], UINT16_MAX));
    while (request.what < KINDS && strcmp(argv[4], kinds[request.what])) {
        request.what++;
    }
    if (request.what == KINDS) {
        fprintf(stderr, "load: '%s' is nothing that it does\n", argv[4]);
        return 2;
    }
    request.size = number(argv[5], LARGEST);
    request.ms = number(argv[6], 60000);
    drive(there, request, number(argv[7], 100000000));
    return 0;
}
