"""The one exception that a user sees as a sentence instead of a traceback."""


class UsageError(Exception):
    """Bad input: the message is one sentence that names the file, row, column or flag and says what to do."""
