"""The words that are written into pictures."""

from pathlib import Path

WORDS = sorted({w.upper() for w in (Path(__file__).parent / "words.txt").read_text().split() if 3 <= len(w) <= 5})
HELD_OUT = WORDS[::8]  # never seen in training
LEARNED = [word for word in WORDS if word not in HELD_OUT]
