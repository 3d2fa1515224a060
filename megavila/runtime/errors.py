"""The error every user-facing failure derives from."""


class MegavilaError(Exception):
    """A user's mistake or bad input; the command line prints its message without a traceback.

    The message names the value, the limit and the fix.
    """
