"""The error for what a user gave and can mend; everything else that goes wrong is a bug and keeps its traceback."""


class InputError(ValueError):
    """A setting, file or folder that cannot be used. The message names it, its value, the rule and a way out."""
