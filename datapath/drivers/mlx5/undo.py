"""How what was made is given back where something has failed on the way."""

from contextlib import ExitStack
from types import TracebackType

from datapath.vdpa import DeviceError


class Undo(ExitStack):
    """A stack that tells why it is unwound, not what fails meanwhile: a device that has died takes nothing
    back."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            return bool(super().__exit__(kind, error, trace))
        except DeviceError:
            if error is None:
                raise
            return False
