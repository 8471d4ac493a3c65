"""dpdk-testpmd as a foreign vhost-user peer: DPDK's virtio-user drives our socket as a guest would.

Owns the process and DPDK's command line; needs no hugepages and leaves nothing in /run.
"""

import os
from pathlib import Path

from tests.harness.processes import Process

#: Megabytes of memory; packet buffers take some of it.
MEMORY = 256
BUFFERS = 8192


class Testpmd(Process):
    """A running testpmd with one virtio-user port, forwarding as `mode` says."""

    #: Not one of pytest's classes, whatever its name.
    __test__ = False

    def __init__(self, folder: Path, socket: Path, mode: str, *, queue_pairs: int = 1, queue_size: int = 256):
        """
        :param folder: where its log and DPDK's runtime files go.
        :param mode: testpmd's --forward-mode: `txonly` sends for ever, `macswap` sends back what comes.
        """
        device = f"net_virtio_user0,path={socket},queues={queue_pairs},queue_size={queue_size}"
        eal = ["--no-huge", "-m", str(MEMORY), "--no-pci", "--single-file-segments", "--lcores=0@0,1@1"]
        # Without an interval for statistics it would wait for the end of its standard input and quit.
        application = ["--auto-start", "--stats-period=60", f"--forward-mode={mode}"]
        buffers = [f"--total-num-mbufs={BUFFERS}", f"--rxq={queue_pairs}", f"--txq={queue_pairs}"]
        super().__init__(
            ["dpdk-testpmd", *eal, f"--vdev={device}", "--", *application, *buffers],
            folder / "testpmd.log",
            env={**os.environ, "RUNTIME_DIRECTORY": str(folder)},
        )
