"""Texts that end an answer, found in it as it is decoded."""

from collections.abc import Sequence


class StopText:
    """Lets text through up to where the first of the stop texts is complete, without it.

    What might be the beginning of one is held back until it is known. How the text is cut into pieces changes nothing.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take the next piece of text, and return what is certain to belong to the answer."""
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        certain = min(ends)[1] if ends else len(text) - self._begun(text)
        self._held = "" if ends else text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """Return what was held back: no stop text came of it."""
        held, self._held = self._held, ""
        return held

    def _begun(self, text: str) -> int:
        """How many characters at the end of a text might be the beginning of a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        return next((n for n in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)
