"""DPDK's own mlx5 vDPA driver on the emulated ConnectX: a vhost-user back-end that we did not write.

`DpdkVdpa` runs this module as a program, with the emulation preloaded, for nothing but a library's caller is
missing: librte_vhost has it all. What the program tells stands in its log, in lines of JSON after a mark.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datapath.emulation.mlx5 import LIBRARY
from tests.harness.processes import Process

#: Address of the function that the driver probes, and the numbers that its bus tells.
ADDRESS = "0000:01:00.0"
SYSFS = {
    "vendor": "0x15b3",
    "device": "0x101e",
    "subsystem_vendor": "0x15b3",
    "subsystem_device": "0x0000",
    "class": "0x020000",
    "resource": "\n".join(["0x0 0x0 0x0"] * 7),
}
MARK = "@@"
DECLARATIONS = """
struct rte_vdpa_stat_name { char name[64]; };
struct rte_vdpa_stat { uint64_t id; uint64_t value; };
int rte_eal_init(int argc, char **argv);
int rte_eal_cleanup(void);
void *rte_vdpa_find_device_by_name(const char *name);
int rte_vdpa_get_queue_num(void *device, uint32_t *pairs);
int rte_vdpa_get_features(void *device, uint64_t *features);
int rte_vdpa_get_protocol_features(void *device, uint64_t *features);
int rte_vdpa_get_stats_names(void *device, struct rte_vdpa_stat_name *names, unsigned int size);
int rte_vdpa_get_stats(void *device, uint16_t queue, struct rte_vdpa_stat *stats, unsigned int size);
int rte_vhost_driver_register(const char *path, uint64_t flags);
int rte_vhost_driver_unregister(const char *path);
int rte_vhost_driver_attach_vdpa_device(const char *path, void *device);
int rte_vhost_driver_callback_register(const char *path, void *operations);
int rte_vhost_driver_start(const char *path);
unsigned int mlx5_emulation_commands(void);
int tgkill(int process, int thread, int signal);
"""
#: Seconds in which a device is probed, its commands at their usual pace, or a question answered.
PATIENCE = 30.0


class DpdkVdpa(Process):
    """A running back-end with one device."""

    def __init__(
        self,
        folder: Path,
        *,
        arguments: str = "",
        options: Mapping[str, int | str] | None = None,
        cable: int | None = None,
    ) -> None:
        """
        :param folder: for its log, its socket and what stands for sysfs; made where there is none.
        :param arguments: more of the driver's, such as `event_mode=2`.
        :param options: the emulation's, see datapath/emulation/mlx5/options.h.
        :param cable: the uplink of its only pair of queues, a descriptor; without it frames come back.
        """
        chosen = dict(options or {}) | ({} if cable is None else {"pairs": 1, "uplink": cable})
        self.socket = folder / "vdpa.sock"
        device = folder / "devices" / ADDRESS
        device.mkdir(parents=True)
        for name, text in SYSFS.items():
            (device / name).write_text(text + "\n")
        (device / "driver").symlink_to("/nonexistent/mlx5_core")
        # Any numbers: with them the driver does not look for the RDMA device in sysfs.
        allowed = f"{ADDRESS},class=vdpa,cmd_fd=900,pd_handle=1" + (f",{arguments}" if arguments else "")
        super().__init__(
            [sys.executable, "-m", __name__, self.socket, allowed],
            folder / "dpdk_vdpa.log",
            stdin=subprocess.PIPE,
            pass_fds=() if cable is None else (cable,),
            env={
                **os.environ,
                # Behind what must be the first, as a sanitizer's library.
                "LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {LIBRARY}".strip(),
                "MLX5_EMULATION": ",".join(f"{name}={value}" for name, value in chosen.items()),
                "RUNTIME_DIRECTORY": str(folder),
                "SYSFS_PCI_DEVICES": str(device.parent),
            },
        )

    def answers(self) -> list[dict[str, Any]]:
        """What the program has told so far."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line.partition(MARK)[2]) for line in lines if MARK in line]

    def answer(self, number: int) -> dict[str, Any]:
        """What it tells as its answer of this number, from 0; the first is what the device can.

        :raise HarnessError: when it ends before, or takes too long.
        """
        self.wait_for(f"answer {number}", lambda: len(self.answers()) > number, PATIENCE)
        return self.answers()[number]

    def counters(self, queue: int) -> dict[str, int]:
        """The driver's counters of a queue."""
        return self._ask(str(queue))

    def commands(self) -> int:
        """How many commands its device has been given; when it has ended in order, how many those were."""
        answer = self._ask("commands") if self.running else self.answers()[-1]
        number: int = answer["commands"]
        return number

    def _ask(self, question: str) -> dict[str, Any]:
        number = len(self.answers())
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{question}\n".encode())
        self.popen.stdin.flush()
        return self.answer(number)

    def finish(self) -> int:
        """Let it take the device down in order; returns the exit code."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        return self.popen.wait(PATIENCE)


def tell(what: Mapping[str, object]) -> None:
    # In one piece, for the library writes to the same file.
    os.write(1, f"\n{MARK}{json.dumps(what)}\n".encode())


def check(result: int, what: str) -> None:
    if result < 0:
        raise SystemExit(f"{what} failed: {result}")


def serve(ffi: Any, vhost: Any, device: Any, path: bytes) -> Iterator[None]:
    """Serve the socket while the caller goes on."""
    operations = ffi.new("void *[32]")  # the library does without callbacks, but not without their table
    check(vhost.rte_vhost_driver_register(path, 0), "registering the socket")
    check(vhost.rte_vhost_driver_attach_vdpa_device(path, device), "attaching the device")
    check(vhost.rte_vhost_driver_callback_register(path, operations), "registering callbacks")
    check(vhost.rte_vhost_driver_start(path), "starting")
    yield
    check(vhost.rte_vhost_driver_unregister(path), "unregistering")


def abilities(ffi: Any, vhost: Any, device: Any) -> dict[str, int]:
    pairs, features = ffi.new("uint32_t *"), ffi.new("uint64_t *")
    protocol = ffi.new("uint64_t *")
    check(vhost.rte_vdpa_get_queue_num(device, pairs), "reading the number of pairs")
    check(vhost.rte_vdpa_get_features(device, features), "reading features")
    check(vhost.rte_vdpa_get_protocol_features(device, protocol), "reading protocol features")
    return {"pairs": pairs[0], "features": features[0], "protocol_features": protocol[0]}


def read_counters(ffi: Any, vhost: Any, device: Any, queue: int) -> dict[str, int]:
    size = vhost.rte_vdpa_get_stats_names(device, ffi.NULL, 0)
    check(size, "reading the number of counters")
    names = ffi.new("struct rte_vdpa_stat_name[]", size)
    values = ffi.new("struct rte_vdpa_stat[]", size)
    check(vhost.rte_vdpa_get_stats_names(device, names, size), "reading the names of counters")
    read = vhost.rte_vdpa_get_stats(device, queue, values, size)
    if read < 0:
        return {"error": read}
    return {ffi.string(names[values[i].id].name).decode(): values[i].value for i in range(read)}


def hasten(ffi: Any) -> None:
    """Let DPDK's thread for sockets look at them again: it has begun without ours, and would in a second."""
    for thread in Path("/proc/self/task").iterdir():
        if (thread / "comm").read_text() == "vhost-events\n":
            ffi.dlopen(None).tgkill(os.getpid(), int(thread.name), signal.SIGUSR1)


def main() -> None:
    # Here and not above: only the program needs them.
    from cffi import FFI

    signal.signal(signal.SIGUSR1, lambda *_: None)
    path, allowed = sys.argv[1:]
    ffi = FFI()
    ffi.cdef(DECLARATIONS)
    eal: Any = ffi.dlopen("librte_eal.so.23")
    vhost: Any = ffi.dlopen("librte_vhost.so.23")
    emulation: Any = ffi.dlopen(str(LIBRARY))
    words = ["dpdk_vdpa", "--no-huge", "-m", "128", "--no-telemetry", "--no-shconf", "-l", "0", "-a", allowed]
    kept = [ffi.new("char[]", word.encode()) for word in words]
    check(eal.rte_eal_init(len(kept), ffi.new("char *[]", kept)), "initialising EAL")
    device = vhost.rte_vdpa_find_device_by_name(ADDRESS.encode())
    if device == ffi.NULL:
        raise SystemExit(f"no driver took {ADDRESS}")
    for _ in serve(ffi, vhost, device, path.encode()):
        hasten(ffi)
        tell(abilities(ffi, vhost, device))
        for line in sys.stdin:
            if line == "commands\n":
                tell({"commands": emulation.mlx5_emulation_commands()})
            else:
                tell(read_counters(ffi, vhost, device, int(line)))
    check(eal.rte_eal_cleanup(), "cleaning up")
    tell({"commands": emulation.mlx5_emulation_commands()})


if __name__ == "__main__":
    main()
