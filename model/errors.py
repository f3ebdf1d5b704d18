"""Base class of all errors that a user can fix: the command line prints only the message, without a traceback."""


class UserError(ValueError):
    """Unusable input; the message says what is wrong, what it must be, what was found, where, and what to do."""
