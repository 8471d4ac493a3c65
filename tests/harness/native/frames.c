/* What a network interface receives of frames that a test sends, and what it asks its NIC for.
 *
 *     frames collect INTERFACE      prints "ready", then the text in each frame of EtherType 0x88b5, a line each
 *     frames join INTERFACE MAC     has the interface receive frames to an address, until it is killed
 *
 * Frames are seen as the driver gives them, before anything in the kernel has decided for whom they are; a VLAN tag
 * has been taken off by then.
 */

#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* IEEE 802: for local experiments. */
#define EXPERIMENT 0x88b5

static int open_socket(unsigned int interface)
{
    struct sockaddr_ll where = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(ETH_P_ALL),
        .sll_ifindex = (int)interface,
    };
    int fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));

    if (fd < 0 || bind(fd, (struct sockaddr *)&where, sizeof where) < 0) {
        perror("packet socket");
        exit(1);
    }
    return fd;
}

static int join(int fd, unsigned int interface, const char *mac)
{
    struct packet_mreq wish = {.mr_ifindex = (int)interface, .mr_type = PACKET_MR_MULTICAST, .mr_alen = ETH_ALEN};
    unsigned char *to = wish.mr_address;

    if (sscanf(mac, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", to, to + 1, to + 2, to + 3, to + 4, to + 5) != ETH_ALEN ||
        setsockopt(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &wish, sizeof wish) < 0) {
        perror(mac);
        return 1;
    }
    pause();
    return 0;
}

static _Noreturn void collect(int fd)
{
    unsigned char frame[2048];

    printf("ready\n");
    fflush(stdout);
    for (;;) {
        struct sockaddr_ll from;
        socklen_t size = sizeof from;
        ssize_t length = recvfrom(fd, frame, sizeof frame - 1, 0, (struct sockaddr *)&from, &size);

        if (length > ETH_HLEN && from.sll_pkttype != PACKET_OUTGOING && from.sll_protocol == htons(EXPERIMENT)) {
            frame[length] = 0;
            printf("%s\n", (char *)frame + ETH_HLEN);
            fflush(stdout);
        }
    }
}

int main(int argc, char **argv)
{
    unsigned int interface = argc > 2 ? if_nametoindex(argv[2]) : 0;

    if (interface != 0 && argc == 4 && strcmp(argv[1], "join") == 0) {
        return join(open_socket(interface), interface, argv[3]);
    }
    if (interface != 0 && argc == 3 && strcmp(argv[1], "collect") == 0) {
        collect(open_socket(interface));
    }
    fprintf(stderr, "usage: frames collect INTERFACE | join INTERFACE MAC\n");
    return 2;
}
