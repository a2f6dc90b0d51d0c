"""Errors that a user can mend. The command line prints their message, without a traceback, and leaves."""

from wmtp_ds.masking import printable


class UserError(Exception):
    """Wrong usage or configuration: the message says what is wrong, where, and how to mend it.

    The process leaves with ``exit_code`` 2. Raised before anything is written wherever it can be known then.
    """

    exit_code = 2
    # Whether every rank raises it alike, so that one of them may speak for all.
    everywhere = True

    def __init__(self, message: str):
        # Of a file's or a key's name anything may be part.
        super().__init__(printable(message))


class RunError(UserError):
    """A failure at run time that the user can act on (a full disk, a damaged checkpoint): exit code 1."""

    exit_code = 1

    def __init__(self, message: str, *, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


class CutShortError(RunError):
    """Another rank has gone while all were at something. ``what`` has become of it: a sentence without its point."""

    def __init__(self, what: str, error: Exception):
        super().__init__(f"{what}: another rank is gone ({error}). Go on with --resume auto.")
        self.what = what
