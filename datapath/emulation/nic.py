"""`virt-vdpa-nic`: a NIC in software whose VFs are IFCVF functions behind vfio-user sockets.

Owns the command line, the loop, and a control socket that tells about the VFs and pulls their cables. One
process serves several VFs; their packets move in a thread for each.
"""

import argparse
import contextlib
import hashlib
import re
import selectors
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from datapath.control import Arguments, CommandError, ControlServer
from datapath.emulation.engine import MAX_PAIRS
from datapath.emulation.tap import TapError
from datapath.emulation.vf import MTU, Vf, VfSpec
from datapath.emulation.virtio_net import FEATURES, consistent
from datapath.loop import dispatch, ended_by_signals
from datapath.rx_filter import RxFilter
from datapath.virtio import Feature, bit

PROGRAM = "virt-vdpa-nic"
MAX_VFS = 64
#: The smallest that a device may advise (virtio 1.3 section 5.1.4.1), and that of jumbo frames.
MTU_RANGE = range(68, 9000 + 1)
#: What a NIC may be without, by the specification's names less their prefixes; never VERSION_1.
FEATURE_NAMES = {
    feature.name.removeprefix("NET_").removeprefix("F_").lower(): feature
    for feature in Feature
    if FEATURES & bit(feature) and feature is not Feature.F_VERSION_1
}


def log(text: str) -> None:
    """One line on standard error."""
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


def _log_vf(index: int, text: str) -> None:
    log(f"vf{index}: {text}")


class Nic:
    """All VFs and the control socket."""

    def __init__(self, specs: Sequence[VfSpec], control: Path, selector: selectors.BaseSelector) -> None:
        """Make all of it, the control socket last: when that answers, every VF does.

        :raise TapError: when a TAP cannot be had.
        :raise OSError: when a socket cannot be had.
        """
        self._selector = selector
        self._quit = False
        with contextlib.ExitStack() as undo:
            self._vfs = []
            for index, spec in enumerate(specs):
                self._vfs.append(Vf(spec, selector, partial(_log_vf, index)))
                undo.callback(self._vfs[-1].close)
            commands = {
                "query-devices": self._query_devices,
                "vf-stop": lambda arguments: self._set_link(arguments, False),
                "vf-start": lambda arguments: self._set_link(arguments, True),
                "vf-rx-filter": self._filter,
                "vf-send": self._send,
                "quit": self.quit,
            }
            undo.callback(ControlServer(selector, control, commands).close)
            self._resources = undo.pop_all()

    def run(self) -> None:
        """Serve until told to quit."""
        while not self._quit:
            dispatch(self._selector)

    def close(self) -> None:
        """Disconnect everybody, remove all sockets and TAPs."""
        self._resources.close()

    def quit(self, _arguments: Arguments | None = None) -> object:
        """End the process, in good order."""
        self._quit = True
        return {}

    def _query_devices(self, _arguments: Arguments) -> object:
        return {"vfs": [{"index": index, **vf.describe()} for index, vf in enumerate(self._vfs)]}

    def _set_link(self, arguments: Arguments, up: bool) -> object:
        self._named(arguments).set_link(up)
        return {}

    def _filter(self, arguments: Arguments) -> object:
        """Set the receive filter of a VF, as a PF may; null: none."""
        vf, given = self._named(arguments), arguments.get("filter")
        try:
            vf.set_rx_filter(None if given is None else RxFilter.parse(given))
        except ValueError as error:
            raise CommandError(f"filter: {error}") from error
        return {}

    def _send(self, arguments: Arguments) -> object:
        """Transmit a frame on behalf of whoever owns the VF, as a NIC's firmware could."""
        vf, text = self._named(arguments), arguments.get("frame")
        if not isinstance(text, str):
            raise CommandError(f"frame: {text!r} is not a text of hexadecimal digits")
        try:
            vf.send(bytes.fromhex(text))
        except ValueError as error:
            raise CommandError(f"frame: {error}") from error
        except OSError as error:
            raise CommandError(f"frame: it cannot be sent: {error.strerror}") from error
        return {}

    def _named(self, arguments: Arguments) -> Vf:
        number = arguments.get("vf")
        if type(number) is not int or not 0 <= number < len(self._vfs):
            raise CommandError(f"vf: {number!r} is not a VF number from 0 to {len(self._vfs) - 1}")
        return self._vfs[number]


def _mac(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a MAC address like 02:00:00:00:00:01")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1:
        raise argparse.ArgumentTypeError(f"'{text}' is a multicast address")
    return mac


def _number(allowed: range, what: str = "number") -> Callable[[str], int]:
    """What takes a number within limits from the command line."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) not in allowed:
            raise argparse.ArgumentTypeError(f"'{text}' is not a {what} from {allowed[0]} to {allowed[-1]}")
        return int(text)

    return parse


def _features(text: str) -> int:
    names = text.split(",")
    for name in names:
        if name not in FEATURE_NAMES:
            raise argparse.ArgumentTypeError(
                f"'{name}' is no feature that can be withheld; those are {', '.join(FEATURE_NAMES)}"
            )
    return sum(bit(FEATURE_NAMES[name]) for name in set(names))


def _fill(given: list[str], pattern: str, count: int) -> list[str]:
    """Names for `count` VFs: those given, a single pattern with %d expanded, then the default pattern."""
    if len(given) == 1 and "%d" in given[0]:
        given, pattern = [], given[0]
    return given + [pattern.replace("%d", str(index)) for index in range(len(given), count)]


def _add_count(parser: argparse.ArgumentParser, name: str, most: int, what: str) -> None:
    parser.add_argument(
        name, type=_number(range(1, most + 1)), default=1, metavar="N", help=f"{what} (default: %(default)s)"
    )


def _add_vf_options(parser: argparse.ArgumentParser) -> None:
    """What each VF is to be like."""
    parser.add_argument(
        "--doorbell",
        choices=["eventfd", "mapped"],
        default="eventfd",
        help="how clients may notify besides by message (default: eventfd)",
    )
    parser.add_argument(
        "--prefetch",
        type=int,
        default=0,
        metavar="N",
        help="receive descriptors to fetch ahead of use, as hardware may (default: 0)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="leave frames in the TAP while nobody receives; without it they are lost, as on most NICs",
    )
    _add_count(parser, "--queue-pairs", MAX_PAIRS, "queue pairs of each VF, and queues of its TAP")
    parser.add_argument(
        "--echo",
        action="store_true",
        help="no TAPs: what is sent comes back with its addresses exchanged, for measurements",
    )
    parser.add_argument(
        "--mtu",
        type=_number(MTU_RANGE, "number of bytes"),
        default=MTU,
        metavar="BYTES",
        help=f"largest packet that passes, and that the VFs advise guests of (default: {MTU})",
    )
    parser.add_argument(
        "--without",
        type=_features,
        default=0,
        metavar="NAME[,NAME...]",
        help="features not to offer, such as csum,guest_tso4; those that need them are not offered either",
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(PROGRAM, description="A NIC in software with IFCVF virtual functions.")
    parser.add_argument(
        "--folder", type=Path, required=True, metavar="DIR", help="where vf0.sock, vf1.sock … appear"
    )
    _add_count(parser, "--vfs", MAX_VFS, "number of VFs")
    parser.add_argument(
        "--mac", type=_mac, action="append", default=[], help="of the next VF (default: derived from DIR)"
    )
    parser.add_argument(
        "--tap",
        action="append",
        default=[],
        metavar="NAME",
        help="TAP of the next VF, or one pattern such as demo%%d (default: vdpa%%d)",
    )
    parser.add_argument("--bridge", metavar="NAME", help="bridge to put the TAPs into")
    _add_vf_options(parser)
    parser.add_argument("--control", type=Path, metavar="PATH", help="control socket (default: DIR/control)")
    options = parser.parse_args(arguments)
    for name, given in (("--mac", options.mac), ("--tap", options.tap)):
        if len(given) > options.vfs:
            parser.error(f"{name} is given {len(given)} times for {options.vfs} VFs")
    if not 0 <= options.prefetch <= 0xFFFF:
        parser.error(f"--prefetch: {options.prefetch} is not a number from 0 to 65535")
    options.tap = _fill(options.tap, "vdpa%d", options.vfs)
    options.mac += [_derived_mac(options.folder, n) for n in range(len(options.mac), options.vfs)]
    options.control = options.control or options.folder / "control"
    return options


def _spec(options: argparse.Namespace, index: int) -> VfSpec:
    """What the command line says of one VF."""
    return VfSpec(
        socket=options.folder / f"vf{index}.sock",
        mac=options.mac[index],
        tap=options.tap[index],
        bridge=options.bridge,
        mapped_doorbells=options.doorbell == "mapped",
        prefetch=options.prefetch,
        keep=options.keep,
        echo=options.echo,
        mtu=options.mtu,
        queue_pairs=options.queue_pairs,
        features=consistent(FEATURES & ~options.without),
    )


def _derived_mac(folder: Path, index: int) -> bytes:
    """A locally administered address that is the same whenever the NIC of this folder starts."""
    digest = hashlib.sha256(str(folder.absolute()).encode()).digest()
    return b"\x02" + digest[:4] + bytes([index])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    options = parse_arguments(arguments)
    try:
        with contextlib.ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            specs = [_spec(options, index) for index in range(options.vfs)]
            nic = Nic(specs, options.control, selector)
            stack.callback(nic.close)
            stack.enter_context(ended_by_signals(selector, nic.quit))
            uplinks = "echoing" if options.echo else f"TAPs {', '.join(options.tap)}"
            log(f"{options.vfs} VFs in {options.folder}, {uplinks}")
            nic.run()
    except TapError as error:
        log(str(error))
        return 1
    except OSError as error:
        log(f"{error.filename or options.folder}: {error.strerror or error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
