"""virt-vdpa-port with a device that takes its time to map memory, as kernel VFIO does to pin a large guest's.

The device string is `ifcvf,pieces=N,seconds=S`: each region takes N pieces of S seconds.
"""

import time
from collections.abc import Callable
from unittest import mock

from datapath import port
from datapath.vdpa import DeviceSpec, LogMode, MemoryRegion
from tests.harness.recording_device import RecordingDevice


class PinningDevice(RecordingDevice):
    """Maps in pieces, each of which takes a while and is told."""

    pieces: int
    seconds: float
    meanwhile: Callable[[], None]

    def map_memory(self, region: MemoryRegion) -> None:
        for _ in range(self.pieces):
            time.sleep(self.seconds)
            self.meanwhile()
        super().map_memory(region)

    def call_meanwhile(self, callback: Callable[[], None]) -> None:
        self.meanwhile = callback


def open_device(spec: DeviceSpec, log_mode: LogMode, mac: bytes | None) -> PinningDevice:
    device = PinningDevice()
    device.pieces, device.seconds = int(spec.options["pieces"]), float(spec.options["seconds"])
    return device


def main() -> int:
    """Run the port's own program."""
    with mock.patch.object(port, "open_device", open_device):
        return port.main()
