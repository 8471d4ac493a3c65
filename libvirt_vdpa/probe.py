"""What a free VF can do, found out by opening it: `virt-vdpa-port --probe`, in a process with a deadline.

A VF's features are the device's own answer, so somebody must ask it, and only a port process opens VFs. One
that hangs is killed through its pidfd, and has let go of the VF when `probe` returns. Also owns the
comparison of what a VF can do with what a guest needs of it, in words for libvirt's user.
"""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from datapath.vdpa import LogMode
from datapath.virtio import Feature, bit, feature_names
from libvirt_vdpa.process import ProgramError, find_program
from libvirt_vdpa.state import NOT_THE_GUESTS

PROGRAM = "virt-vdpa-port"


class ProbeError(Exception):
    """A VF that cannot be opened now; the text gives the reason."""


#: Who is to mark a VF's writes -> what one says that cannot have it so.
UNABLE = {
    LogMode.HARDWARE.value: "cannot log what it writes by itself",
    LogMode.SOFTWARE.value: "cannot have what it writes logged by the relay",
}


@dataclass(frozen=True)
class Ability:
    """What a VF can do."""

    #: Virtio feature word that its port would offer.
    features: int
    queue_pairs: int
    #: Descriptors of its largest ring.
    max_queue_size: int
    #: Bytes of its largest packet; None when it does not say.
    max_mtu: int | None
    #: Who can mark its writes: values of LogMode.
    log_modes: frozenset[str]
    #: Whether it serves guests without VERSION_1, those of virtio 0.95.
    serves_legacy: bool = False


@dataclass(frozen=True)
class Need:
    """What a guest needs of the VF that is to carry an interface of its."""

    #: Virtio feature word, and whether the guest's driver has acknowledged it or was only offered it.
    features: int = 0
    negotiated: bool = False
    #: What the guest uses; 0 when that is not known.
    queue_pairs: int = 0
    ring_size: int = 0
    #: What the domain's XML asks for; 0 where it does not say.
    queues_attribute: int = 0
    ring_attribute: int = 0
    mtu: int = 0
    migration: str = LogMode.AUTO.value


def misfits(need: Need, able: Ability) -> list[str]:
    """Why a VF cannot carry an interface, most serious first; none when it can."""
    found = []
    if missing := need.features & ~able.features & ~NOT_THE_GUESTS:
        whose = "which the guest has negotiated" if need.negotiated else "which the source's VF has offered"
        found.append(f"lacks {', '.join(feature_names(missing))}, {whose}")
    if need.negotiated and not need.features & bit(Feature.F_VERSION_1) and not able.serves_legacy:
        found.append("needs VERSION_1, which the guest, one of virtio 0.95, has not negotiated")
    if need.queue_pairs > able.queue_pairs:
        found.append(f"has {_count(able.queue_pairs)}, the guest uses {need.queue_pairs}")
    elif need.queues_attribute > able.queue_pairs:
        found.append(
            f"has {_count(able.queue_pairs)}, <driver queues='{need.queues_attribute}'> asks for more"
        )
    if need.ring_size > able.max_queue_size:
        found.append(
            f"has rings of at most {able.max_queue_size} descriptors, the guest's have {need.ring_size}"
        )
    elif need.ring_attribute > able.max_queue_size:
        found.append(
            f"has rings of at most {able.max_queue_size} descriptors, <driver> asks for {need.ring_attribute}"
        )
    if able.max_mtu is not None and need.mtu > able.max_mtu:
        found.append(f"carries packets of at most {able.max_mtu} bytes, <mtu> says {need.mtu}")
    if need.migration in UNABLE and need.migration not in able.log_modes:
        found.append(f"{UNABLE[need.migration]}, as migration='{need.migration}' asks")
    return found


def _count(queue_pairs: int) -> str:
    return f"{queue_pairs} queue pair{'s' if queue_pairs != 1 else ''}"


async def probe(device: str, limit: float) -> Ability:
    """Open a VF that nobody uses, ask it, and let go of it.

    :param device: device string.
    :param limit: seconds that it may take.
    :raise ProbeError: when it cannot be opened, or not in time.
    """
    try:
        command = [find_program(PROGRAM), "--probe", f"--device={device}"]
        code, output, said = await _run(command, limit)
    except TimeoutError:
        raise ProbeError(f"it could not be asked within {limit:.1f} s") from None
    except (ProgramError, OSError) as error:
        raise ProbeError(str(error)) from None
    if code != 0:
        words = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
        last = words[-1].removeprefix(f"{PROGRAM}: ") if words else f"{PROGRAM} ended with exit code {code}"
        raise ProbeError(last.removeprefix(f"{device.partition(',')[2]}: "))
    return _ability(output)


def _ability(output: bytes) -> Ability:
    try:
        answer = json.loads(output)
        mtu = answer["max_mtu"]
        return Ability(
            features=int(answer["features"]),
            queue_pairs=int(answer["queue_pairs"]),
            max_queue_size=int(answer["max_queue_size"]),
            max_mtu=None if mtu is None else int(mtu),
            log_modes=frozenset(map(str, answer["log_modes"])),
            serves_legacy=answer["serves_legacy"] is True,
        )
    except (ValueError, TypeError, KeyError):
        raise ProbeError(f"{PROGRAM} --probe gave no answer that makes sense") from None


async def _run(command: Sequence[str], limit: float) -> tuple[int, bytes, bytes]:
    """Run a program to its end, which is now when the time is over or nobody waits any more.

    :raise TimeoutError: when it took longer.
    """
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd="/",
        start_new_session=True,
    )
    pidfd = -1
    try:
        with contextlib.suppress(ProcessLookupError):  # reaped already: nothing is left to be killed
            pidfd = os.pidfd_open(child.pid)
        async with asyncio.timeout(limit):
            output, said = await child.communicate()
    finally:
        if child.returncode is None and pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            # The VF is free for others only when the process is no more.
            await child.wait()
        if pidfd >= 0:
            os.close(pidfd)
    assert child.returncode is not None
    return child.returncode, output, said
