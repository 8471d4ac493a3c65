/* The number of queue pairs of a network interface, as `ethtool -l` and `ethtool -L … combined` have it.
 *
 *     channels INTERFACE        prints "CURRENT of MAX"
 *     channels INTERFACE N      uses N of them
 */

#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

int main(int argc, char **argv)
{
    struct ethtool_channels channels = {.cmd = ETHTOOL_GCHANNELS};
    struct ifreq request = {.ifr_data = (char *)&channels};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);

    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: channels INTERFACE [N]\n");
        return 2;
    }
    strncpy(request.ifr_name, argv[1], sizeof request.ifr_name - 1);
    if (fd < 0 || ioctl(fd, SIOCETHTOOL, &request) < 0) {
        perror(argv[1]);
        return 1;
    }
    if (argc == 2) {
        printf("%u of %u\n", channels.combined_count, channels.max_combined);
        return 0;
    }
    channels.cmd = ETHTOOL_SCHANNELS;
    channels.combined_count = (unsigned)strtoul(argv[2], NULL, 10);
    if (ioctl(fd, SIOCETHTOOL, &request) < 0) {
        perror(argv[1]);
        return 1;
    }
    return 0;
}
