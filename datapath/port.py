"""The port process, `virt-vdpa-port`: one socket, one driver, one VF, one guest.

It composes what the other modules of datapath own: an endpoint gives a connection, the connection's
back-end drives the vDPA device, and a control socket tells about both. It is a back-end program as QEMU
docs/interop/vhost-user.rst, "Backend program conventions", describes them and can be run by hand.

It imports no asyncio, lxml, qemu.qmp or libvirt: there is one process for every guest interface.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import selectors
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from datapath import virtio
from datapath.announce import Announcer, parse_mac
from datapath.control import Arguments, CommandError, ControlServer
from datapath.endpoint import Connector, Endpoint, EndpointError, Listener, NoMoreFrontEndsError, from_fd
from datapath.features import BACKEND_TYPE
from datapath.loop import dispatch, ended_by_signals
from datapath.native._native import lib
from datapath.port_filter import PortFilter
from datapath.port_options import PROGRAM, parse_arguments
from datapath.rx_filter import RxFilter
from datapath.uplink import Uplink, UplinkError, open_uplink
from datapath.vdpa import (
    DeviceError,
    DeviceEvent,
    DeviceLostError,
    DeviceSpecError,
    VdpaDevice,
    open_device,
)
from datapath.vhost_user.backend import Backend
from datapath.vhost_user.connection import Connection, DisconnectedError
from datapath.vhost_user.marking import LogStatus
from datapath.vhost_user.messages import ProtocolError
from datapath.vhost_user.timing import Timing

#: Seconds between looks at a link that is down while no ring runs: a VF does not interrupt then.
LINK_INTERVAL = 0.5

#: What `--print-capabilities` prints (QEMU docs/interop/vhost-user.json, VHostUserBackendCapabilities).
CAPABILITIES = {"type": BACKEND_TYPE}


class Port:
    """One port: serves one front-end at a time until it is told to quit or its VF is lost."""

    def __init__(
        self,
        device: VdpaDevice,
        options: argparse.Namespace,
        selector: selectors.BaseSelector,
        uplink: Uplink | None = None,
    ) -> None:
        """Serve a device; it and the uplink are the caller's to close."""
        self._device = device
        self._endpoint: Endpoint | None = None
        self._options = options
        self._selector = selector
        self._connection: Connection | None = None
        self._control: ControlServer | None = None
        #: What the guest accepted before it came here, as long as a front-end may need to be told.
        self._negotiated: int | None = options.negotiated
        self._host_notifiers = may_offer_notifiers(device, options.host_notifiers)
        self._state = "waiting"
        self._last_error: str | None = None
        #: Why the last connection ended.
        self._last_end: str | None = None
        self._connections = 0
        self._quit = False
        self._failure: str | None = None
        #: "up" or "down"; None when the VF does not say.
        self._link: str | None = None
        #: When to look at it by ourselves, by the monotonic clock.
        self._look_at_link_at: float | None = None
        self._uplink = uplink
        self._filter = PortFilter(uplink, self._log)
        self._announces = uplink is not None and not options.silent
        self._announcer = Announcer(uplink if self._announces else None, self._announced, options.mac)
        self._timing = Timing()
        self._log_status = LogStatus()
        selector.register(device.event_fd, selectors.EVENT_READ, self._device_event)
        if options.control is not None:
            commands = {
                "query-status": self._query_status,
                "query-stats": self._query_stats,
                "announce": self._announce,
                "disconnect": self._let_come_anew,
                "set-rx-filter": self._set_rx_filter,
                "quit": self.quit,
            }
            self._control = ControlServer(selector, options.control, commands)
            # Whoever watches the port is not to believe it stuck while a large guest's memory is pinned.
            device.call_meanwhile(self._control.serve_waiting)
        self._look_at_link()

    def run(self, endpoint: Endpoint) -> int:
        """Serve the front-ends that an endpoint brings, until the end; the exit code."""
        self._endpoint = endpoint
        if (listener := endpoint.fileno()) is not None:
            self._selector.register(listener, selectors.EVENT_READ, self._poll_endpoint)
        while not self._quit and self._failure is None:
            polled = endpoint.deadline(self._connection is not None)
            dispatch(self._selector, self._time_left(polled))
            if polled is not None:
                self._poll_endpoint(0)
            if self._uplink is not None:
                self._uplink.poll()
            if self._look_at_link_at is not None and time.monotonic() >= self._look_at_link_at:
                self._look_at_link()
            if self._connection is not None and self._connection.backend.exchange.deadline is not None:
                self._attempt(self._connection.backend.exchange.check)
            self._check_notifiers()
        return 0 if self._failure is None else 1

    def _time_left(self, polled: float | None) -> float | None:
        """Seconds that the loop may wait; None for as long as nothing happens.

        :param polled: when the endpoint wants its turn.
        """
        times = [polled, self._look_at_link_at]
        if self._connection is not None:
            times.append(self._connection.backend.exchange.deadline)
            times.append(self._connection.backend.notifiers.deadline)
        if self._uplink is not None:
            times.append(self._uplink.deadline())
        deadlines = [deadline for deadline in times if deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _check_notifiers(self) -> None:
        if self._connection is not None:
            notifiers = self._connection.backend.notifiers
            if notifiers.deadline is not None and time.monotonic() >= notifiers.deadline:
                notifiers.check()

    def quit(self, _arguments: Arguments | None = None) -> dict[str, object]:
        """End the process, in good order."""
        self._quit = True
        return {}

    def close(self) -> None:
        """End the connection and remove the control socket; the device and endpoint are the caller's."""
        self._disconnect("the port ends")
        if self._control is not None:
            self._control.close()

    # The front-end

    def _poll_endpoint(self, _mask: int) -> None:
        assert self._endpoint is not None
        try:
            sock = self._endpoint.poll(self._connection is not None)
        except NoMoreFrontEndsError:
            self._quit = True
            return
        except EndpointError as error:
            self._fail(str(error))
            return
        if sock is None:
            return
        if self._connection is not None:
            if not self._connection.gone:
                self._log("a second front-end was turned away: one is connected")
                sock.close()
                return
            self._disconnect("the front-end disconnected")
        backend = Backend(
            self._device,
            self._options.features,
            self._log,
            announce=self._announce_guest,
            negotiated=self._negotiated,
            timing=self._timing,
            host_notifiers=self._host_notifiers,
        )
        self._connection = Connection(sock, backend)
        self._connections += 1
        self._selector.register(sock, selectors.EVENT_READ, self._receive)
        self._enter("connected")

    def _receive(self, _mask: int) -> None:
        assert self._connection is not None
        self._attempt(self._connection.receive)
        if self._connection is not None and self._connection.backend.running:
            self._announcer.rings_run()

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do something for the front-end, which may end the connection."""
        assert self._connection is not None
        try:
            action()
            self._enter("running" if self._connection.backend.running else "connected")
            self._tell_log()
        except DisconnectedError as error:
            self._disconnect(str(error))
        except (ProtocolError, DeviceError) as error:
            self._end_by(error)

    def _end_by(self, error: ProtocolError | DeviceError) -> None:
        """End the connection for what has failed, and the port if its device has gone."""
        if isinstance(error, DeviceLostError):
            self._fail(str(error))
        elif isinstance(error, DeviceError):
            self._reject(f"device failed: {error}")
        else:
            self._reject(f"front-end broke the protocol: {error}")

    def _reject(self, reason: str) -> None:
        self._last_error = reason
        self._disconnect(reason)

    def _disconnect(self, reason: str) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._selector.unregister(connection.socket)
        # QEMU comes back every second to be refused for the same reason: once is enough until rings run.
        if self._state == "running" or reason != self._last_end or reason != self._last_error:
            self._log(reason)
        self._last_end = reason
        connection.close()
        self._negotiated = connection.backend.former
        # One that has refused is not to be asked again, see `host_notifiers`; it is the same, most likely.
        self._host_notifiers &= connection.backend.notifiers.refusal is None
        self._tell_log()
        self._enter("waiting", reason)
        untold = connection.backend.exchange.failure
        if isinstance(untold, DeviceLostError):  # it left before it was told
            self._fail(str(untold))

    def _let_come_anew(self, _arguments: Arguments) -> dict[str, object]:
        """End the connection. QEMU then plugs its NIC's link out, and in when it has come back."""
        self._disconnect("the front-end is to come anew")
        return {}

    # The device

    def _device_event(self, _mask: int) -> None:
        event = self._device.take_event()
        if event is DeviceEvent.LOST:
            self._suffer(DeviceLostError(f"{self._device.name}: the device is gone"))
        elif event is DeviceEvent.NEEDS_RESET:
            reason = self._device.fault or "it met a ring or buffer that it cannot use"
            if self._connection is not None:
                self._connection.backend.signal_error()
            self._suffer(DeviceError(f"{self._device.name} needs a reset: {reason}"))
        elif event is DeviceEvent.CONFIG_CHANGED:
            # QEMU's virtio-net takes no configuration changes from a back-end (it masks CONFIG).
            self._look_at_link()

    def _look_at_link(self) -> None:
        """See whether the VF has a link, and tell when that has changed."""
        self._look_at_link_at = None
        try:
            up = self._device.link_up()
        except DeviceError:
            return  # one that is lost tells by its event, or at its next use
        link = None if up is None else "up" if up else "down"
        if link != self._link:
            self._link = link
            if self._control is not None:
                self._control.event("PORT_LINK", {"link": link})
        if link == "down" and self._state != "running":
            self._look_at_link_at = time.monotonic() + LINK_INTERVAL

    def _suffer(self, error: DeviceError) -> None:
        """The device has failed by itself; a front-end that begins or ends to log is told afterwards."""
        if self._connection is not None:
            self._receive(0)  # it may just have begun
        if self._connection is not None and self._connection.backend.exchange.defer(error):
            self._tell_log()
        elif self._failure is None:
            self._end_by(error)

    def _fail(self, reason: str) -> None:
        self._last_error = reason
        if self._connection is None:
            self._log(reason)
        self._disconnect(reason)
        self._enter("failed", reason)
        self._failure = reason

    def _log(self, text: str) -> None:
        log(self._options.name, text)

    # Announcements

    def _announce_guest(self, mac: bytes) -> None:
        self._announcer.announce(mac, self._connection is not None and self._connection.backend.running)

    def _announce(self, arguments: Arguments) -> dict[str, object]:
        try:
            mac = parse_mac(arguments.get("mac"))
        except ValueError as error:
            raise CommandError(f"mac: {error}") from error
        if not self._announces:
            raise CommandError("the port has no uplink to announce a guest on")
        self._announce_guest(mac)
        return {}

    def _announced(self, result: dict[str, object]) -> None:
        if result["problem"] is not None:
            self._log(f"{result['mac']} is not announced: {result['problem']}")
        if self._control is not None:
            self._control.event("PORT_ANNOUNCE", result)

    # The receive filter

    def _set_rx_filter(self, arguments: Arguments) -> dict[str, object]:
        given = arguments.get("filter")
        if self._state != "running":
            raise CommandError("filter: no guest's rings run; it would be for the one before")
        try:
            self._filter.set(None if given is None else RxFilter.parse(given))
        except ValueError as error:
            raise CommandError(f"filter: {error}") from error
        return {}

    # What the control socket tells

    def _tell_log(self) -> None:
        """See how writes are logged now, and tell when that has changed."""
        status = self._connection.backend.log_status if self._connection is not None else LogStatus()
        if status == self._log_status:
            return
        self._log_status = status
        if self._control is not None:
            self._control.event("PORT_LOG", dataclasses.asdict(status))

    def _enter(self, state: str, reason: str | None = None) -> None:
        if state == self._state:
            return
        before, self._state = self._state, state
        if self._control is not None:
            self._control.event("PORT_STATE", {"state": state, "reason": reason})
        if before == "running":
            self._filter.forget()
        if "running" in (before, state):
            self._look_at_link()

    def _query_status(self, _arguments: Arguments) -> dict[str, object]:
        backend = self._connection.backend if self._connection is not None else None
        acked = (backend.acked or 0) if backend is not None else 0
        return {
            "name": self._options.name,
            "device": str(self._options.device),
            "driver": self._options.device.driver,
            "pid": os.getpid(),
            "role": self._endpoint.role if self._endpoint is not None else None,
            "socket": str(self._options.socket_path) if self._options.socket_path else None,
            "state": self._state,
            "front_end": backend is not None,
            "features_offered": self._device.features & self._options.features,
            "features_acked": acked,
            "features_former": self._negotiated if backend is None else backend.former,
            "feature_names": virtio.feature_names(acked),
            "link": self._link,
            "queue_pairs": self._device.queue_pairs,
            "max_queue_size": self._device.max_queue_size,
            "max_mtu": self._device.max_mtu,
            "shadowed": self._device.shadowed,
            "rings": list(self._rings(backend)) if backend is not None else [],
            "last_error": self._last_error,
            "connections": self._connections,
            "log": self._describe_log(),
            "announce": {
                "uplink": str(self._options.uplink) if self._announces else None,
                **self._announcer.describe(),
            },
            "rx_filter": self._filter.describe(),
            "timing": self._timing.describe(),
            "pauses": self._timing.pauses(),
        }

    def _describe_log(self) -> dict[str, object]:
        self._tell_log()  # pages may have been missed since
        statistics = self._device.statistics()
        return {
            **dataclasses.asdict(self._log_status),
            "pages": statistics.get("logged_pages", 0),
            "missed": statistics.get("log_missed", 0),
        }

    def _rings(self, backend: Backend) -> Iterator[dict[str, object]]:
        for ring in backend.rings:
            progress = None
            with contextlib.suppress(ProtocolError):  # guest memory that has gone; its own turn will tell
                progress = ring.progress(backend.memory)
            avail, used = progress or (None, ring.base)
            yield {
                "index": ring.index,
                "size": ring.size,
                "enabled": ring.enabled,
                "running": ring.running,
                "logged": ring.logged,
                "host_notifier": ring.index in backend.notifiers.confirmed,
                "avail": avail,
                "used": used,
            }

    def _query_stats(self, _arguments: Arguments) -> dict[str, int]:
        return self._device.statistics()


def may_offer_notifiers(device: VdpaDevice, wanted: str) -> bool:
    """Whether the guest may be offered the device's doorbells.

    :param wanted: "on", "off" or "auto".
    :raise DeviceError: when it is to be, and the device has none that can be mapped.
    """
    if wanted == "off":
        return False
    able = all(device.notifier(index) is not None for index in range(2 * device.queue_pairs))
    if wanted == "on" and not able:
        raise DeviceError(
            f"{device.name}: its doorbells have no mappable pages of their own for --host-notifiers=on;"
            " use auto or off"
        )
    return able


def check_packed(device: VdpaDevice, wanted: bool) -> None:
    """See that there are packed rings where they are to be offered in place of a dirty log.

    :raise DeviceError: when the device has none, or its driver carries none.
    """
    if wanted and not device.features & virtio.bit(virtio.Feature.F_RING_PACKED):
        raise DeviceError(f"{device.name}: has no packed rings: leave --packed out")


def log(name: str | None, text: str) -> None:
    """One line on standard error, with the port that it speaks of."""
    print(f"{PROGRAM}: {name}: {text}" if name else f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


def serve(options: argparse.Namespace) -> int:
    """Open the VF, offer it, serve.

    :raise DeviceError: when the VF cannot be had.
    :raise UplinkError: when the uplink cannot be had.
    :raise EndpointError: when the socket cannot be had.
    :raise OSError: when the control socket cannot be had.
    """
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        endpoint: Endpoint | None = None
        if options.fd is not None:
            endpoint = from_fd(options.fd)
        elif options.connect:
            endpoint = Connector(options.socket_path, options.connect_timeout)
        device = open_device(options.device, options.log_mode, options.mac)
        stack.callback(device.close)
        check_packed(device, options.packed)
        uplink: Uplink | None = None
        if options.uplink is not None:
            uplink = open_uplink(options.uplink, selector)
            stack.callback(uplink.close)
        port = Port(device, options, selector, uplink)
        stack.callback(port.close)
        stack.enter_context(ended_by_signals(selector, port.quit))
        if endpoint is None:  # last: whoever finds the socket finds a port that answers
            endpoint = Listener.bind(options.socket_path)
        stack.callback(endpoint.close)
        lib.heap_trim()  # imports have needed a megabyte more than what stays
        log(options.name, f"{device.name} serves {options.socket_path or f'descriptor {options.fd}'}")
        return port.run(endpoint)


def probe(options: argparse.Namespace) -> None:
    """Print what the device can do, as JSON.

    :raise DeviceError: when the VF cannot be had.
    """
    with contextlib.closing(open_device(options.device, options.log_mode)) as device:
        check_packed(device, options.packed)
        able = {
            "features": device.features & options.features,
            "queue_pairs": device.queue_pairs,
            "max_queue_size": device.max_queue_size,
            "max_mtu": device.max_mtu,
            "log_modes": sorted(mode.value for mode in device.log_modes),
            "serves_legacy": device.serves_legacy,
        }
    print(json.dumps(able))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if "--print-capabilities" in given:  # the rest of the command line does not matter then
        print(json.dumps(CAPABILITIES))
        return 0
    options = parse_arguments(given)
    try:
        if options.probe:
            probe(options)
            return 0
        return serve(options)
    except (DeviceError, DeviceSpecError, EndpointError, UplinkError) as error:
        log(options.name, str(error))
    except OSError as error:
        log(options.name, f"{error.filename or 'system call'}: {error.strerror or error}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
