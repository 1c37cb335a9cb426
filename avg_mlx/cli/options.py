"""Options that a dataclass describes (avg_mlx/training/options.py), on the command line and in YAML files."""

import argparse
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest, printable
from ..files import read_file
from ..training.checked import Option, options_of
from .parser import Parser, with_flags

MAX_YAML = 1 << 16  # bytes of a file of options
MAX_LEVELS = 4  # of lists and mappings inside each other


class OptionsParser(Parser):
    """Parses into a dataclass, which becomes the `options` of the parsed arguments; -c names a YAML file of more."""

    def __init__(self, prog: str, description: str, kind: type[Any]):
        super().__init__(prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
        self.kind, self.command = kind, prog.removeprefix("avg-mlx ")
        self.add_argument(
            "-c", "--config", metavar="FILE", help="YAML file of options, named as here; the command line wins"
        )
        groups: dict[str, Any] = {"": self}
        for option in options_of(kind).values():
            if option.group not in groups:
                groups[option.group] = self.add_argument_group(option.group)
            groups[option.group].add_argument(_flag(option.name), **_argument(option))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the command line, and take from the YAML file what it does not say. Whatever is wrong is one line."""
        parsed = vars(super().parse_args(args, namespace))
        try:
            file = parsed.get("config")
            told = values_of(file, read_yaml(file), options_of(self.kind), self.command) if file else {}
            told |= {name: value for name, value in parsed.items() if name in options_of(self.kind)}
            if missing := missing_options(self.kind, told):
                self.error(f"the following arguments are required: {', '.join(map(_flag, missing))}")
            options = self.kind(**told)
        except InputError as error:
            self.error(with_flags(self, str(error)))
        return argparse.Namespace(**parsed | vars(options), options=options)


def _argument(option: Option) -> dict[str, Any]:
    """Describe an option to argparse. Values are checked later, together with those of YAML files."""
    if option.kind is bool:
        return {"action": "store_true", "help": option.help}
    default = " (required)" if option.required else "" if option.default is None else f" (default: {option.default})"
    metavar = f"{{{','.join(option.choices)}}}" if option.choices else option.metavar
    return {"type": option.read, "help": f"{option.help}{default}", "metavar": metavar}


def missing_options(kind: type[Any], given: Collection[str]) -> list[str]:
    """List the options that have no default and are not given."""
    return [name for name, option in options_of(kind).items() if option.required and name not in given]


def read_yaml(file: str) -> dict[str, Any]:
    """Return the mapping in a YAML file, or raise InputError.

    Options need three levels and no anchors on lists or mappings, with which a few lines can stand for any amount.
    """
    import yaml

    expected, depth = "expected a YAML file of options", 0
    try:
        text = read_file(Path(file), expected, MAX_YAML).decode()
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.ScalarEvent):
                event.value.encode()  # fails at half a character
            elif isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if event.anchor is not None:
                    raise ValueError(f"the list or mapping {event.anchor} is to be written out")
                if depth > MAX_LEVELS:
                    raise ValueError(f"more than {MAX_LEVELS} levels of lists and mappings")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        content = yaml.safe_load(text)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); {expected}") from None
    except Exception as error:  # PyYAML raises ValueError, KeyError, AttributeError and more for odd scalars
        raise InputError(f"cannot read {file} ({printable(error)}); {expected}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no options; expected lines such as learning-rate: 1.0e-5")
    return content


def values_of(where: str, content: Mapping[Any, Any], known: Mapping[str, Option], command: str) -> dict[str, Any]:
    """Check a YAML mapping: {name: value}. Null counts as not given, and mlx-lm's lora_parameters may be nested.

    Raises InputError for a key that is not `known` as an option of `command`, or a value that it cannot have.
    """
    values = {}
    for key, value in _flat(content).items():
        name = key.replace("-", "_")
        if name not in known:
            hint = nearest(key, (option.replace("_", "-") for option in known))
            raise InputError(f"{where}: {printable(key, 80)} is not an option of {command}{hint}")
        if value is not None:
            option = replace(known[name], name=key)  # errors say what the file says
            try:
                values[name] = option.check(option.read(value) if isinstance(value, str) else value)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
    return values


def _flat(content: Mapping[Any, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name == "lora-parameters" and isinstance(value, dict):
            flat |= {f"lora-{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[name] = value
    return flat


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
