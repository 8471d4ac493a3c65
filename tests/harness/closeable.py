"""What a `with` closes at its end."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closeable(ABC):
    """Something with a `close`; as a context manager it is closed at the end."""

    @abstractmethod
    def close(self) -> None:
        """Let go of whatever it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
