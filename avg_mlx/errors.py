"""Errors whose text says what was found, what was expected, and what to do."""


class AvgMlxError(Exception):
    """Anything that stops the work. The command line prints the text and exits with `exit_status`."""

    exit_status = 1


class InputError(AvgMlxError, ValueError):
    """What the caller gave (an image, prompt, option, folder or tensor) cannot be used."""

    exit_status = 2


class OptionError(InputError, TypeError):
    """A function was given an option that it does not have."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped long work. What was done is kept; the text says how to resume."""
