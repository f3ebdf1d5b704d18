"""The one root of every error that a user can mend: the command line prints its message alone, without a traceback."""


class UserError(ValueError):
    """The user's input cannot be used; the message says what, what it must be, what it is, where, and what to do."""
