"""The one error every unreadable or damaged media file becomes."""

from __future__ import annotations

from megavila.runtime.errors import MegavilaError


class MediaError(MegavilaError):
    """A media file cannot give what was asked of it.

    Attributes:
        path: the file, as it was named by the caller.
        reason: what is wrong with it, in a phrase.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        # Exceptions pickle by their `args` (the joined message), which is not what __init__ takes;
        # decoding workers and spawned ranks send this error across processes.
        return type(self), (self.path, self.reason)
