"""The event loop of a port and of an emulated NIC: `selectors`, callbacks, and signals that end it.

Written by hand where asyncio would do, because a port process does without it to stay small. A descriptor
is registered in `selector` with a callable as its data, which is called with the event mask.
"""

import contextlib
import selectors
import signal
import socket
from collections.abc import Callable, Container, Iterator


def dispatch(
    selector: selectors.BaseSelector,
    timeout: float | None = None,
    only: Container[object] | None = None,
) -> None:
    """Wait, `timeout` seconds at most, and call back whoever has something to do.

    :param only: of what is registered, nothing but these file objects; what else is ready stays so.
    """
    ready = selector.select(timeout)
    registered = selector.get_map()
    for key, mask in ready:
        # An earlier callback may have closed this descriptor, and another may have its number by now.
        if registered.get(key.fd) == key and (only is None or key.fileobj in only):
            key.data(mask)


@contextlib.contextmanager
def ended_by_signals(selector: selectors.BaseSelector, end: Callable[[], object]) -> Iterator[None]:
    """Have SIGTERM and SIGINT call `end`, and wake the loop up so that it notices."""
    reader, writer = socket.socketpair()
    for end_of_pair in (reader, writer):
        end_of_pair.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = {
        number: signal.signal(number, lambda _number, _frame: end() and None)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    selector.register(reader, selectors.EVENT_READ, lambda _mask: reader.recv(64))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        selector.unregister(reader)
        reader.close()
        writer.close()
