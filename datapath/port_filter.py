"""A port's receive filter: what its guest wants of the frames on the wire, and whether the VF keeps to it.

The guest tells its front-end by the control queue, and that tells no back-end: whoever can ask the front-end
tells the port, each time that the rings begin to run. A filter lasts as long as they do. Without one a VF
receives what it does for a guest that has not spoken. To set it is the uplink's, as a PF filters for its VFs.
"""

from collections.abc import Callable

from datapath.rx_filter import RxFilter
from datapath.uplink import Uplink


class PortFilter:
    """The filter of one port, if its VF can have one."""

    def __init__(self, uplink: Uplink | None, log: Callable[[str], None]) -> None:
        """:param log: told when a filter could not be set."""
        self._uplink = uplink if uplink is not None and uplink.filters else None
        self._log = log
        self._wanted: RxFilter | None = None
        self._problem: str | None = None

    def set(self, wanted: RxFilter | None) -> None:
        """Have the VF keep to a filter, None: to none.

        :raise ValueError: when it cannot have one.
        """
        if self._uplink is None:
            raise ValueError("the VF has no receive filter that could be set")
        self._wanted = wanted
        self._problem = None
        self._uplink.set_rx_filter(wanted, lambda problem: self._note(wanted, problem))

    def forget(self) -> None:
        """The rings have stopped: what their guest wanted counts no more."""
        if self._uplink is not None and self._wanted is not None:
            self._wanted = self._problem = None
            self._uplink.set_rx_filter(None, lambda problem: None)  # a VF that has gone has lost it as well

    def describe(self) -> dict[str, object] | None:
        """What query-status tells; None when there can be no filter."""
        if self._uplink is None:
            return None
        wanted = self._wanted.describe() if self._wanted is not None else None
        return {"wanted": wanted, "problem": self._problem}

    def _note(self, wanted: RxFilter | None, problem: str | None) -> None:
        if problem is not None and wanted is self._wanted:
            self._problem = problem
            self._log(f"what its guest wants to receive is not filtered: {problem}")
