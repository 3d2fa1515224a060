"""A video's identity: its content, so that copies of one file share whatever is cached for it."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache

from megavila.media.errors import MediaError

_WHOLE_BYTES = 16 * 1024 * 1024
_BLOCK_BYTES = 64 * 1024
_BLOCKS = 64


def fingerprint(path: str | os.PathLike[str], stream: int | None = None) -> str:
    """Hex digest of a file's content (and of the stream, where one is named).

    Files up to 16 MiB are hashed whole; larger ones by their size and 64 blocks of 64 KiB spread evenly from the
    first byte to the last. Encoded video differs everywhere when it differs at all. Raises MediaError.
    """
    name = os.fspath(path)
    try:
        stat = os.stat(name)
        digest = _content_digest(name, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise MediaError(
            name, "no such file" if isinstance(error, FileNotFoundError) else str(error)
        ) from error
    return digest if stream is None else f"{digest}-{stream}"


@lru_cache(maxsize=65536)
def _content_digest(path: str, size: int, mtime_ns: int) -> str:
    del mtime_ns  # part of the cache's key
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with open(path, "rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            for block in range(_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
