"""The error for input that a user can correct. Any other error is a bug and keeps its traceback."""


class InputError(ValueError):
    """A setting, file or folder that cannot be used. The message names it, its value, the rule and a way out."""
