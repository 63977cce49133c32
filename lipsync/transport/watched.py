"""Files that are read again when they change."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

from lipsync.errors import ConfigError

logger = logging.getLogger(__name__)


class WatchedFiles:
    """Some files, and the one function that reads them all.

    They are known by their inodes, sizes and times: a file may be written over, replaced, or be a link that is moved.
    """

    def __init__(self, paths: tuple[str, ...], read: Callable[[], None]) -> None:
        """Reads them for the first time. Raises what `read` raises: ConfigError for files that cannot be used."""
        self.paths = paths
        self._read = read
        self._told: object = None  # how they looked when it was last told that they cannot be used, and why
        self._seen = self._look()  # before they are read, so that no change after it is missed
        read()

    def refresh(self, *, force: bool = False) -> None:
        """Read them again if they have changed, or at any rate. Blocks; one thread at a time.

        Files that cannot be used are told of in the log, once, and what was read before stays. They are tried again
        each time, changed or not: it may not have been their fault.
        """
        seen = self._look()
        if seen == self._seen and not force:
            return
        shown = ", ".join(self.paths)
        try:
            self._read()
        except ConfigError as error:
            if self._is_news(seen, error) or force:
                logger.warning("not read again: %s: %s; what was read before stays in use", shown, error)
        except Exception as error:  # nobody waits for an answer of whoever watches: it must not end
            if self._is_news(seen, error) or force:
                logger.exception("not read again: %s; what was read before stays in use", shown)
        else:
            self._seen, self._told = seen, None
            logger.info("read again: %s", shown)

    def _is_news(self, seen: object, error: Exception) -> bool:
        told, self._told = self._told, (seen, repr(error))
        return told != self._told

    def _look(self) -> list[tuple[int, ...]]:
        looks = []
        for path in self.paths:
            look: tuple[int, ...] = ()
            with contextlib.suppress(OSError, ValueError):
                stat = os.stat(path)
                look = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_mode)
            looks.append(look)
        return looks
