"""The small model that comes with the package."""

from pathlib import Path

DEMO = "demo"  # its name wherever a model is asked for; a folder of that name is given as ./demo


def demo_model() -> Path:
    """Return its folder. It was trained by examples/demo, and knows shapes, colours and short texts (docs/demo.md)."""
    return Path(__file__).parent.parent / "demo_model"
