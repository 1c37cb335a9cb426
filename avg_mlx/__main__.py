"""`python -m avg_mlx VERB` and the console script `avg-mlx VERB`."""

import importlib
import sys

from .errors import nearest

VERBS = {
    "convert": "PyTorch checkpoint → MLX folder",
    "models": "the checkpoints on this machine, and how to run each",
    "demo": "the small model that comes with the package, on a picture of its own",
    "generate": "image + question → streamed answer",
    "chat": "a conversation about images",
    "explain": "what in image and question made the router look so closely",
    "serve": "the model for other programs, over HTTP in OpenAI's words",
    "train": "fine-tune the language model, the router, or both",
    "feedback": "how well each granularity does on each sample",
    "evaluate": "accuracy, visual tokens and time of each way to choose",
    "bench": "where an answer's time and memory go at each granularity",
    "fuse": "adapters and router → into the model",
    "export": "MLX folder → PyTorch checkpoint",
}


def main() -> int:
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in VERBS:
        return importlib.import_module(f"avg_mlx.cli.{verb}").main(arguments, prog=f"avg-mlx {verb}")
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        print("usage: avg-mlx VERB …\n")
        print("\n".join(f"  {name:{width}}  {purpose}" for name, purpose in VERBS.items()))
        print("\n`avg-mlx VERB --help` lists a verb's options.")
        return 0
    if verb == "--version":
        from .version import VERSION

        print(f"avg-mlx {VERSION}")
        return 0
    print(f"avg-mlx: unknown verb {verb}{nearest(verb, VERBS)}; choose from {', '.join(VERBS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
