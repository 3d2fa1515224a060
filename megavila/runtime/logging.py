"""Log lines: rich on a terminal, one plain line each elsewhere; ranks other than the main speak up from WARNING on."""

import logging

from rich.console import Console
from rich.logging import RichHandler

_ROOT = "megavila"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, `get_logger(__name__)`."""
    configured = logging.getLogger(_ROOT)
    if not configured.handlers:
        configure_logging(is_main=True)
    return logging.getLogger(name if name.split(".")[0] == _ROOT else f"{_ROOT}.{name}")


def configure_logging(*, is_main: bool, rank: int = 0) -> None:
    """Sets level and handler of all of Megavila's loggers; `topology.initialize` calls it."""
    root = logging.getLogger(_ROOT)
    root.handlers.clear()
    root.setLevel(logging.INFO if is_main else logging.WARNING)
    mark = "" if is_main else f"[rank {rank}] "
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, rich_tracebacks=False, markup=False)
        handler.setFormatter(logging.Formatter(f"{mark}%(message)s"))
    else:  # a log file: rich would break lines, and the paths in them, at 80 columns
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {mark}%(message)s", "%H:%M:%S"))
    root.addHandler(handler)
