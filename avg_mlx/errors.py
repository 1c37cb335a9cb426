"""Errors whose text says what was found, what was expected and what to do."""


class AvgMlxError(Exception):
    """Anything that stops the work. The command line prints its text and exits with `exit_status`."""

    exit_status = 1


class InputError(AvgMlxError, ValueError):
    """What the caller gave (image, prompt, option, folder, tensor) cannot be used."""

    exit_status = 2
