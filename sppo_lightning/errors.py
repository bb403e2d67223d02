"""The one exception that a user is meant to read."""


class InputError(ValueError):
    """A setting, a data row or a verifier's answer that cannot be used.

    Its text is one sentence: which setting, row or component, its value, and the way out. The command line
    prints that sentence alone and exits with status 2; everything else surfaces as a traceback.
    """
