"""The command line of a port, `virt-vdpa-port`."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from datapath.announce import parse_mac
from datapath.uplink import UplinkSpec, UplinkSpecError
from datapath.vdpa import DeviceSpec, DeviceSpecError, LogMode
from datapath.virtio import Feature, bit

PROGRAM = "virt-vdpa-port"
ALL_FEATURES = (1 << 64) - 1


def _device_spec(text: str) -> DeviceSpec:
    try:
        return DeviceSpec.parse(text)
    except DeviceSpecError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _uplink_spec(text: str) -> UplinkSpec:
    try:
        return UplinkSpec.parse(text)
    except UplinkSpecError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _log_mode(text: str) -> LogMode:
    try:
        return LogMode(text)
    except ValueError as error:
        modes = ", ".join(mode.value for mode in LogMode)
        raise argparse.ArgumentTypeError(f"'{text}' is not one of: {modes}") from error


def _mac(text: str) -> bytes:
    try:
        return parse_mac(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _feature_mask(text: str) -> int:
    try:
        mask = int(text, 0)
    except ValueError:
        mask = -1
    if not 0 <= mask <= ALL_FEATURES:
        raise argparse.ArgumentTypeError(f"'{text}' is not a mask of 64 bits, such as 0x130000020")
    return mask


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds")
    return seconds


def _formatter(prog: str) -> argparse.HelpFormatter:
    """As argparse makes it, told the terminal's width: to find it, it would load shutil and much more."""
    try:
        width = os.get_terminal_size().columns or 80
    except OSError:
        width = 80
    return argparse.HelpFormatter(prog, width=width - 2)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        PROGRAM, description="A vhost-user back-end for one vDPA device.", formatter_class=_formatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket-path", type=Path, metavar="PATH", help="UNIX socket to listen on")
    where.add_argument("--fd", type=int, metavar="N", help="listening or connected socket to use")
    where.add_argument(
        "--probe", action="store_true", help="serve nobody: tell what the device can do, as JSON, and end"
    )
    parser.add_argument("--connect", action="store_true", help="connect to PATH instead of listening on it")
    parser.add_argument(
        "--connect-timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="for the first time: %(default)g s",
    )
    parser.add_argument(
        "--device",
        type=_device_spec,
        required=True,
        metavar="DRIVER,key=value…",
        help="such as ifcvf,pci=0000:06:00.3 or virtio,vfio-user=/run/nic/vf0.sock",
    )
    parser.add_argument("--control", type=Path, metavar="PATH", help="control socket (QMP) to serve")
    parser.add_argument("--name", metavar="LABEL", help="what log lines call this port")
    parser.add_argument(
        "--features",
        type=_feature_mask,
        default=ALL_FEATURES,
        metavar="MASK",
        help="offer no other virtio features than these",
    )
    parser.add_argument(
        "--negotiated",
        type=_feature_mask,
        metavar="MASK",
        help="what the guest accepted before it came here; for a front-end that has forgotten it",
    )
    parser.add_argument(
        "--log-mode",
        type=_log_mode,
        default=LogMode.AUTO,
        metavar="auto|hardware|software",
        help="who marks the pages that the device writes (default: the device, where it can)",
    )
    parser.add_argument(
        "--host-notifiers",
        choices=["on", "off", "auto"],
        default="off",
        help="whether the guest may write to the device's doorbells itself, for a guest with page_per_vq"
        " (auto: where the device can; default: %(default)s)",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="offer packed rings, and no dirty log: the guest cannot be migrated while it runs",
    )
    parser.add_argument(
        "--uplink",
        type=_uplink_spec,
        metavar="interface=NAME|nic=SOCKET,vf=N",
        help="where frames that announce the guest leave, and, of a NIC, whose filter the guest sets"
        " (default: nowhere, and none)",
    )
    parser.add_argument(
        "--silent", action="store_true", help="send nothing on the uplink: it is for its filter alone"
    )
    parser.add_argument(
        "--mac",
        type=_mac,
        metavar="ADDRESS",
        help="the guest's: no other is announced (default: any that the front-end names)",
    )
    parser.add_argument(
        "--print-capabilities", action="store_true", help="print what this program is, as JSON"
    )
    options = parser.parse_args(arguments)
    if options.connect and options.socket_path is None:
        parser.error("--connect needs --socket-path")
    # The relay, which logs, knows split rings only; and a log is promised before a guest can choose.
    options.features &= ~bit(Feature.VHOST_F_LOG_ALL if options.packed else Feature.F_RING_PACKED)
    return options
