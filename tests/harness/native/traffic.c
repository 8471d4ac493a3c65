/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Traffic between a guest and a peer of which every byte is accounted for, whatever happens to the guest
 * meanwhile. The same program runs on both sides:
 *
 *     traffic serve PORT                                          in the guest; one peer after another
 *     traffic drive ADDRESS PORT DATAGRAMS/S BYTES/S              at the peer, until SIGTERM or SIGINT
 *
 * Both ways there is a TCP stream whose byte at each position is known to both, and numbered datagrams whose
 * length and content follow from their number, with a hash over all of it. A second TCP connection is for
 * control: the peer's "start" with the rates, its "stop", and the guest's report.
 *
 * The peer prints a line of JSON ten times a second, {"progress": ...}, and one at the end, {"summary": ...}
 * (print_progress, print_summary). Times are seconds since the epoch by the peer's clock: the guest's stands
 * still while the guest is paused. A datagram that the system would not take is none that was sent.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NS 1000000000ull
#define MS 1000000ull
/* How often owed bytes and datagrams are sent. */
#define TICK_MS 4
/* For the guest to serve. */
#define CONNECT_TRIES 100
#define CONNECT_MS 100
/* A sender that was held up makes up for this much of it. */
#define CATCH_UP_NS (50 * MS)
#define PROGRESS_NS (100 * MS)
/* Both streams have ended and nothing has come for this long: nothing will. */
#define QUIET_NS (300 * MS)
/* For an end, with a guest that goes on after a pause in which TCP's timers grew. */
#define END_SECONDS 120
/* Pauses between datagrams that are worth telling, and how many are told of anything. */
#define GAP_NS (20 * MS)
#define MOST_TOLD 2000
#define MOST_DATAGRAMS (16u << 20)
#define RECEIVE_BUFFER (4 << 20)
#define CHUNK 16384
#define PAYLOAD_LEAST 32
#define PAYLOAD_SPAN 1300

struct datagram {
    uint64_t session;
    uint64_t number;
    /* The highest number that its sender has received, plus 1. */
    uint64_t heard;
    uint64_t hash;
    uint8_t payload[PAYLOAD_LEAST + PAYLOAD_SPAN];
};
#define HEADER offsetof(struct datagram, payload)

/* One direction of the stream, as its sender or its receiver counts it. */
struct stream_count {
    uint64_t sent, received, altered, first_altered;
};

/* What is known of a datagram by its number: when it was sent or came, 0 for neither, and how often it came. */
struct fate {
    uint64_t sent_at, came_at;
    uint32_t times;
};

struct session {
    int control, data, datagrams;
    struct sockaddr_in peer;
    uint64_t id, key_out, key_in;
    uint64_t datagram_rate, byte_rate;
    uint64_t stream_since, datagrams_since;   /* from when on bytes and datagrams are owed */
    struct stream_count stream;
    bool sending, stream_ended;
    uint64_t datagrams_sent, datagrams_received, datagrams_doubled, datagrams_altered;
    uint64_t highest, heard;                  /* each plus 1 */
    uint64_t last_came;                       /* anything */
    struct fate *fates;
    size_t fates_size;
    bool is_peer;
};

/* What the guest says of itself at the end. */
struct report {
    struct stream_count stream;
    uint64_t sent, received, doubled, altered;
};

static volatile sig_atomic_t stop_wanted;

static void on_signal(int number)
{
    (void)number;
    stop_wanted = 1;
}

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fputs("traffic: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static uint64_t now(clockid_t clock)
{
    struct timespec time;

    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * NS + (uint64_t)time.tv_nsec;
}

/* A bijection without structure: the finaliser of splitmix64. */
static uint64_t mix(uint64_t word)
{
    word += 0x9e3779b97f4a7c15ull;
    word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ word >> 27) * 0x94d049bb133111ebull;
    return word ^ word >> 31;
}

/* Fill in what stands at a position of the sequence that belongs to a key. */
static void fill(uint64_t key, uint64_t position, uint8_t *bytes, size_t length)
{
    uint64_t word = mix(key ^ mix(position / 8));

    for (size_t i = 0; i < length; i++, position++) {
        if (position % 8 == 0)
            word = mix(key ^ mix(position / 8));
        bytes[i] = (uint8_t)(word >> 8 * (position % 8));
    }
}

static uint64_t hash(const struct datagram *datagram, size_t payload)
{
    uint64_t sum = mix(datagram->session) ^ mix(~datagram->number) ^ mix(datagram->heard + payload);

    for (size_t i = 0; i < payload; i++)
        sum = (sum ^ datagram->payload[i]) * 0x100000001b3ull;
    return mix(sum);
}

static size_t payload_of(uint64_t number)
{
    return PAYLOAD_LEAST + mix(number) % PAYLOAD_SPAN;
}

static struct fate *fate_of(struct session *s, uint64_t number)
{
    if (number >= s->fates_size) {
        size_t size = s->fates_size ? s->fates_size : 4096;

        while (size <= number)
            size *= 2;
        if (number >= MOST_DATAGRAMS || !(s->fates = realloc(s->fates, size * sizeof *s->fates)))
            fail("no memory for the fate of datagram %" PRIu64, number);
        memset(s->fates + s->fates_size, 0, (size - s->fates_size) * sizeof *s->fates);
        s->fates_size = size;
    }
    return &s->fates[number];
}

/* How much more of a rate is owed; what is owed for longer than CATCH_UP_NS is forgiven. */
static uint64_t owed(uint64_t rate, uint64_t done, uint64_t *since, uint64_t time)
{
    uint64_t due = (uint64_t)((unsigned __int128)(time - *since) * rate / NS);
    uint64_t most = rate * CATCH_UP_NS / NS + 1;

    if (due <= done)
        return 0;
    if (due - done > most) {
        *since += (uint64_t)((unsigned __int128)(due - done - most) * NS / rate);
        return most;
    }
    return due - done;
}

static void send_stream(struct session *s, uint64_t time)
{
    uint64_t left = owed(s->byte_rate, s->stream.sent, &s->stream_since, time);
    uint8_t bytes[CHUNK];

    while (left) {
        size_t length = left < CHUNK ? left : CHUNK;
        ssize_t sent;

        fill(s->key_out, s->stream.sent, bytes, length);
        sent = send(s->data, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent <= 0) {
            if (sent < 0 && errno != EAGAIN && errno != EINTR)
                fail("the stream broke while sending: %s", strerror(errno));
            return;
        }
        s->stream.sent += (uint64_t)sent;
        left -= (uint64_t)sent;
    }
}

static void receive_stream(struct session *s)
{
    uint8_t bytes[CHUNK], expected[CHUNK];
    ssize_t length;

    while ((length = recv(s->data, bytes, sizeof bytes, MSG_DONTWAIT)) > 0) {
        fill(s->key_in, s->stream.received, expected, (size_t)length);
        for (ssize_t i = 0; i < length; i++)
            if (bytes[i] != expected[i] && !s->stream.altered++)
                s->stream.first_altered = s->stream.received + (uint64_t)i;
        s->stream.received += (uint64_t)length;
        s->last_came = now(CLOCK_MONOTONIC);
    }
    if (length == 0)
        s->stream_ended = true;
    else if (errno != EAGAIN && errno != EINTR)
        fail("the stream broke while receiving: %s", strerror(errno));
}

static void send_datagrams(struct session *s, uint64_t time)
{
    uint64_t left = owed(s->datagram_rate, s->datagrams_sent, &s->datagrams_since, time);

    while (left--) {
        struct datagram datagram = {.session = s->id, .number = s->datagrams_sent, .heard = s->highest};
        size_t payload = payload_of(datagram.number);
        uint64_t sent_at = now(CLOCK_REALTIME);

        fill(s->key_out, datagram.number << 16, datagram.payload, payload);
        datagram.hash = hash(&datagram, payload);
        if (sendto(s->datagrams, &datagram, HEADER + payload, MSG_DONTWAIT, (struct sockaddr *)&s->peer,
                   sizeof s->peer) < 0)
            return;
        fate_of(s, s->datagrams_sent++)->sent_at = sent_at;
    }
}

static bool is_as_sent(struct session *s, const struct datagram *datagram, size_t length)
{
    uint8_t expected[PAYLOAD_LEAST + PAYLOAD_SPAN];
    size_t payload = payload_of(datagram->number);

    if (length != HEADER + payload || datagram->hash != hash(datagram, payload))
        return false;
    fill(s->key_in, datagram->number << 16, expected, payload);
    return !memcmp(datagram->payload, expected, payload);
}

static void receive_datagrams(struct session *s)
{
    struct datagram datagram;
    ssize_t length;

    while ((length = recv(s->datagrams, &datagram, sizeof datagram, MSG_DONTWAIT | MSG_TRUNC)) >= 0) {
        struct fate *fate;

        if (length >= (ssize_t)HEADER && datagram.session != s->id)
            continue; /* of a session that ended */
        s->last_came = now(CLOCK_MONOTONIC);
        if (length < (ssize_t)HEADER || !is_as_sent(s, &datagram, (size_t)length)) {
            s->datagrams_altered++;
            continue;
        }
        fate = fate_of(s, datagram.number);
        if (fate->times++) {
            s->datagrams_doubled++;
            continue;
        }
        fate->came_at = now(CLOCK_REALTIME);
        s->datagrams_received++;
        if (datagram.number >= s->highest)
            s->highest = datagram.number + 1;
        if (datagram.heard > s->heard)
            s->heard = datagram.heard;
    }
}

static void print_progress(const struct session *s)
{
    printf("{\"progress\": {\"at\": %.6f, \"datagrams_sent\": %" PRIu64 ", \"datagrams_heard\": %" PRIu64
           ", \"datagrams_received\": %" PRIu64 ", \"bytes_sent\": %" PRIu64 ", \"bytes_received\": %" PRIu64
           ", \"altered\": %" PRIu64 "}}\n",
           (double)now(CLOCK_REALTIME) / NS, s->datagrams_sent, s->heard, s->datagrams_received,
           s->stream.sent, s->stream.received, s->stream.altered + s->datagrams_altered);
    fflush(stdout);
}

static void stop_sending(struct session *s)
{
    if (s->sending && shutdown(s->data, SHUT_WR))
        fail("the stream broke at its end: %s", strerror(errno));
    s->sending = false;
}

/* Whether the peer on the control connection has said "stop", or is gone. */
static bool told_to_stop(struct session *s)
{
    char words[16];

    return recv(s->control, words, sizeof words, MSG_DONTWAIT) >= 0;
}

static void wait_for_input(struct session *s)
{
    struct pollfd fds[] = {
        {.fd = s->stream_ended ? -1 : s->data, .events = POLLIN},
        {.fd = s->datagrams, .events = POLLIN},
    };

    if (poll(fds, 2, TICK_MS) < 0)
        return;
    if (fds[0].revents)
        receive_stream(s);
    if (fds[1].revents)
        receive_datagrams(s);
}

/* Send and receive until both streams have ended. */
static void run(struct session *s)
{
    uint64_t time = now(CLOCK_MONOTONIC), next_progress = time, stopped = 0;

    s->sending = true;
    s->stream_since = s->datagrams_since = time;
    while (s->sending || !s->stream_ended || time - s->last_came < QUIET_NS) {
        wait_for_input(s);
        time = now(CLOCK_MONOTONIC);
        if (s->sending && (s->is_peer ? stop_wanted : told_to_stop(s))) {
            if (s->is_peer && send(s->control, "stop\n", 5, MSG_NOSIGNAL) != 5)
                fail("the control connection broke: %s", strerror(errno));
            stop_sending(s);
            stopped = time;
        }
        if (s->sending && s->stream_ended)
            fail("the stream ended before its time");
        if (s->sending) {
            send_stream(s, time);
            send_datagrams(s, time);
        } else if (time - stopped > END_SECONDS * NS) {
            fail("the other side did not end its stream within %d s", END_SECONDS);
        }
        if (s->is_peer && time >= next_progress) {
            print_progress(s);
            next_progress = time + PROGRESS_NS;
        }
    }
}

/* The guest */

static void write_report(struct session *s)
{
    FILE *out = fdopen(dup(s->control), "w");

    fprintf(out, "%" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n",
            s->stream.sent, s->stream.received, s->stream.altered, s->stream.first_altered, s->datagrams_sent,
            s->datagrams_received, s->datagrams_doubled, s->datagrams_altered);
    /* Which of the peer's datagrams came, as ranges: first and one past the last. */
    for (uint64_t number = 0; number < s->highest; number++) {
        uint64_t first = number;

        while (number < s->highest && fate_of(s, number)->times)
            number++;
        if (number > first)
            fprintf(out, "%" PRIu64 " %" PRIu64 "\n", first, number);
    }
    fclose(out);
}

static int open_socket(int type, uint16_t port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0), on = 1, size = RECEIVE_BUFFER;

    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on))
        fail("socket: %s", strerror(errno));
    if (type == SOCK_DGRAM && setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size))
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (bind(fd, (struct sockaddr *)&address, sizeof address))
        fail("port %u: %s", port, strerror(errno));
    return fd;
}

/* Read a line from a connection, byte by byte so that nothing after it is taken. */
static bool read_line(int fd, char *line, size_t size)
{
    size_t length = 0;

    while (length + 1 < size && recv(fd, line + length, 1, 0) == 1 && line[length] != '\n')
        length++;
    line[length] = 0;
    return length > 0;
}

/* One peer, from its "start" to our report. */
static void serve_peer(int listener, int datagrams, int control)
{
    struct session s = {.control = control, .datagrams = datagrams, .last_came = now(CLOCK_MONOTONIC)};
    socklen_t length = sizeof s.peer;
    unsigned port;
    char line[128];

    if (!read_line(control, line, sizeof line) ||
        sscanf(line, "start %" SCNu64 " %" SCNu64 " %" SCNu64 " %u", &s.id, &s.datagram_rate, &s.byte_rate, &port) != 4)
        return;
    s.key_out = mix(s.id + 1);
    s.key_in = mix(s.id + 2);
    if (getpeername(control, (struct sockaddr *)&s.peer, &length) || send(control, "go\n", 3, MSG_NOSIGNAL) != 3)
        return;
    s.peer.sin_port = htons((uint16_t)port);
    if ((s.data = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) < 0)
        return;
    run(&s);
    write_report(&s);
    free(s.fates);
}

static int serve(uint16_t port)
{
    int listener = open_socket(SOCK_STREAM, port), datagrams = open_socket(SOCK_DGRAM, port);

    if (listen(listener, 2))
        fail("listen: %s", strerror(errno));
    for (;;) {
        int control = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

        /* Each peer has a process: what fails with one, and its descriptors and memory, end with it. But one at
         * a time, for the datagrams' socket is the same. */
        if (control >= 0 && fork() == 0) {
            serve_peer(listener, datagrams, control);
            exit(0);
        }
        close(control);
        while (waitpid(-1, NULL, 0) < 0 && errno == EINTR)
            ;
    }
}

/* The peer */

static int connect_to(const struct sockaddr_in *address)
{
    for (unsigned tries = 0;; tries++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

        if (fd >= 0 && !connect(fd, (const struct sockaddr *)address, sizeof *address))
            return fd;
        /* The guest answers ping before it serves. */
        if (errno != ECONNREFUSED || tries == CONNECT_TRIES)
            fail("%s: %s", inet_ntoa(address->sin_addr), strerror(errno));
        close(fd);
        usleep(CONNECT_MS * 1000);
    }
}

static void start_session(struct session *s)
{
    struct sockaddr_in own;
    socklen_t length = sizeof own;
    char line[128];

    s->datagrams = open_socket(SOCK_DGRAM, 0);
    if (getsockname(s->datagrams, (struct sockaddr *)&own, &length))
        fail("getsockname: %s", strerror(errno));
    s->id = now(CLOCK_REALTIME) ^ (uint64_t)getpid() << 48;
    s->key_in = mix(s->id + 1);
    s->key_out = mix(s->id + 2);
    s->control = connect_to(&s->peer);
    dprintf(s->control, "start %" PRIu64 " %" PRIu64 " %" PRIu64 " %u\n", s->id, s->datagram_rate, s->byte_rate,
            ntohs(own.sin_port));
    if (!read_line(s->control, line, sizeof line) || strcmp(line, "go"))
        fail("the guest does not serve: it said '%s'", line);
    s->data = connect_to(&s->peer);
    s->last_came = now(CLOCK_MONOTONIC);
}

/* The guest's report; which of our datagrams came goes into their fates. */
static struct report read_report(struct session *s)
{
    struct timeval limit = {.tv_sec = END_SECONDS};
    struct report r;
    uint64_t first, end;
    FILE *in;

    setsockopt(s->control, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    in = fdopen(s->control, "r");
    for (uint64_t number = 0; number < s->datagrams_sent; number++)
        fate_of(s, number)->times &= 0xffff;
    if (fscanf(in, "%" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64,
               &r.stream.sent, &r.stream.received, &r.stream.altered, &r.stream.first_altered, &r.sent, &r.received,
               &r.doubled, &r.altered) != 8)
        fail("no report from the guest");
    while (fscanf(in, "%" SCNu64 " %" SCNu64, &first, &end) == 2)
        for (; first < end && first < s->datagrams_sent; first++)
            s->fates[first].times |= 0x10000; /* beside how often the guest's of that number came */
    return r;
}

static void print_stream(const char *name, uint64_t sent, const struct stream_count *at)
{
    printf("\"%s\": {\"sent\": %" PRIu64 ", \"received\": %" PRIu64 ", \"altered\": %" PRIu64
           ", \"first_altered\": %" PRIu64 "}",
           name, sent, at->received, at->altered, at->first_altered);
}

/* Our datagrams that did not come, by number and time of sending. */
static void print_lost_to_guest(struct session *s)
{
    unsigned told = 0;

    for (uint64_t number = 0; number < s->datagrams_sent && told < MOST_TOLD; number++) {
        const struct fate *fate = fate_of(s, number);

        if (!(fate->times & 0x10000))
            printf("%s{\"number\": %" PRIu64 ", \"sent\": %.6f}", told++ ? ", " : "", number,
                   (double)fate->sent_at / NS);
    }
}

/* The guest's that did not come, by number and the times at which the next before and after it came. */
static void print_lost_from_guest(struct session *s, uint64_t sent)
{
    uint64_t before = 0;
    unsigned told = 0;

    for (uint64_t number = 0; number < sent && told < MOST_TOLD; number++) {
        uint64_t next = number;

        if (fate_of(s, number)->came_at) {
            before = fate_of(s, number)->came_at;
            continue;
        }
        while (next < sent && !fate_of(s, next)->came_at)
            next++;
        printf("%s{\"number\": %" PRIu64 ", \"after\": %.6f, \"before\": %.6f}", told++ ? ", " : "", number,
               (double)before / NS, next < sent ? (double)fate_of(s, next)->came_at / NS : 0.0);
    }
}

/* The times in which nothing came from the guest. */
static void print_gaps(struct session *s)
{
    uint64_t last = 0;
    unsigned told = 0;

    for (uint64_t number = 0; number < s->highest && told < MOST_TOLD; number++) {
        uint64_t came = fate_of(s, number)->came_at;

        if (came && last && came > last + GAP_NS)
            printf("%s{\"begin\": %.6f, \"ms\": %.1f}", told++ ? ", " : "", (double)last / NS,
                   (double)(came - last) / MS);
        if (came > last)
            last = came;
    }
}

static void print_summary(struct session *s, const struct report *guest)
{
    printf("{\"summary\": {\"stream\": {");
    print_stream("to_guest", s->stream.sent, &guest->stream);
    printf(", ");
    print_stream("from_guest", guest->stream.sent, &s->stream);
    printf("}, \"datagrams\": {\"to_guest\": {\"sent\": %" PRIu64 ", \"received\": %" PRIu64 ", \"doubled\": %" PRIu64
           ", \"altered\": %" PRIu64 ", \"lost\": [",
           s->datagrams_sent, guest->received, guest->doubled, guest->altered);
    print_lost_to_guest(s);
    printf("]}, \"from_guest\": {\"sent\": %" PRIu64 ", \"received\": %" PRIu64 ", \"doubled\": %" PRIu64
           ", \"altered\": %" PRIu64 ", \"lost\": [",
           guest->sent, s->datagrams_received, s->datagrams_doubled, s->datagrams_altered);
    print_lost_from_guest(s, guest->sent);
    printf("]}}, \"gaps\": [");
    print_gaps(s);
    printf("]}}\n");
}

static int drive(const char *address, uint16_t port, uint64_t datagram_rate, uint64_t byte_rate)
{
    struct session s = {.is_peer = true, .datagram_rate = datagram_rate, .byte_rate = byte_rate};
    struct sigaction action = {.sa_handler = on_signal};
    struct report guest;

    s.peer = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, address, &s.peer.sin_addr) != 1)
        fail("'%s' is no IPv4 address", address);
    start_session(&s);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    run(&s);
    print_progress(&s);
    guest = read_report(&s);
    print_summary(&s, &guest);
    free(s.fates);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "serve"))
        return serve((uint16_t)atoi(argv[2]));
    if (argc == 6 && !strcmp(argv[1], "drive"))
        return drive(argv[2], (uint16_t)atoi(argv[3]), strtoull(argv[4], NULL, 10), strtoull(argv[5], NULL, 10));
    fail("usage: traffic serve PORT | traffic drive ADDRESS PORT DATAGRAMS/S BYTES/S");
}
