"""The videos that requests may name: files under one directory, and no others."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from megavila.runtime.errors import MegavilaError
from megavila.serving.errors import ApiError

_PARAM = "messages[0].content"


class MediaRoot:
    """Finds videos under a directory; `None`: there are none.

    Raises MegavilaError where it is no directory.
    """

    def __init__(self, directory: str | None) -> None:
        self._root: Path | None = None
        if directory is not None:
            if not Path(directory).is_dir():
                raise MegavilaError(
                    f"media_root {directory} is not a directory; name the one with the videos"
                )
            self._root = Path(directory).resolve()

    def find(self, url: str) -> str:
        """The file that a `video_url` means: a path, absolute or under the directory, or a file:// URL.

        Links are followed first: what they lead to must lie under the directory too. Whether a file outside of it
        exists is not told.

        Raises:
            ApiError: 400 for anything else than a path under the directory, 404 where there is no such file.
        """
        if self._root is None:
            raise _refused(f"video {url!r}: this server was started without media_root and reads no videos")
        try:
            parts = urlsplit(url) if "://" in url or url.startswith("data:") else None
            if parts is not None and parts.scheme != "file":
                raise _refused(
                    f"video {url[:80]!r}: {parts.scheme} URLs are not fetched; give the path of a file under the "
                    "server's media_root"
                )
            found = (self._root / (url if parts is None else unquote(parts.path))).resolve()
            inside = found.is_relative_to(self._root)
            is_file = inside and found.is_file()
        except RuntimeError:  # links in a circle, before Python 3.13
            inside, is_file = True, False
        except (OSError, ValueError) as error:  # too long, NUL in it, half a URL
            raise _refused(f"video {url[:80]!r}: not a path that can be read: {_reason(error)}") from None
        if not inside:
            raise _refused(f"video {url!r} lies outside of the server's media_root")
        if not is_file:
            raise ApiError(
                404,
                f"video {url!r}: no such file under the server's media_root",
                param=_PARAM,
                code="video_not_found",
            )
        return str(found)


def _refused(message: str) -> ApiError:
    return ApiError(400, message, param=_PARAM, code="video_refused")


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
