"""The command line of `pretrain_sft.py` and `pretrain_grpo.py`.

Imports nothing heavy, so that a mistyped key is answered at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from megavila.config import ConfigError, TrainingRoot, load_config
from megavila.runtime.errors import MegavilaError
from megavila.training.errors import Interrupted, PeerError

C = TypeVar("C", bound=TrainingRoot)

USER_ERROR = 2


def parse_config(cls: type[C], description: str, arguments: Sequence[str]) -> C:
    """Read ``--config FILE key=value … --resume auto|never|PATH``.

    Raises:
        ConfigError: as `load_config` does.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Every key of the config can be set as key=value, such as optimizer.lr=1e-5, over the file.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with the settings of the run")
    parser.add_argument(
        "--resume",
        metavar="auto|never|PATH",
        help="auto: go on from the latest checkpoint if there is one; never: start anew; or go on from PATH",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parsed = parser.parse_intermixed_args(list(arguments))
    overrides = [*parsed.overrides]
    if parsed.resume is not None:
        overrides.append(f"run.resume={parsed.resume}")
    return load_config(cls, parsed.config, overrides)


def main(cls: type[C], run: Callable[[C], object], description: str) -> int:
    """Parse the command line, run, and return the exit code: 2, with one message, for a user's mistake."""
    try:
        run(parse_config(cls, description, sys.argv[1:]))
    except Interrupted as stopped:
        _say(str(stopped))
        return 128 + stopped.number
    except PeerError:  # the rank that met the error has said so
        return USER_ERROR
    except MegavilaError as error:
        # All ranks find the same mistakes in a config, before they know each other; one message is enough.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            _say(f"error: {error}")
        return USER_ERROR
    return 0


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
