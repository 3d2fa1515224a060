"""How a run ends other than by finishing. Imports nothing heavy: the command line waits for it."""

import signal

from megavila.runtime.errors import MegavilaError


class PeerError(MegavilaError):
    """Another rank failed; the message is its error's."""


class ResumeError(MegavilaError):
    """A run that cannot go on from where it is told to."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"{name} after step {step}: the run is saved; start it again with --resume auto to go on"
        )
        self.number = number
