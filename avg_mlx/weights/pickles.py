"""Pickled weight files: looked through, and then read by PyTorch without running code in them."""

import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from ..errors import AvgMlxError, InputError, listing, printable

PICKLE_BYTES = 1 << 20  # without the tensors' data: a name and a shape take about 120, and there are some 700

# All that a pickle of dense tensors names.
DENSE = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor_v[23]|parameter|parameter_with_state)"
    r"|torch(\.storage)? \w+Storage"
    r"|torch (bool|(u?int|b?float|complex)\d\w*)"
)

# Other tensors, by the function that makes them again: what they are, and what to save in their place.
OTHERS = {
    "torch._utils _rebuild_sparse_tensor": ("a sparse tensor", "tensor.to_dense()"),
    "torch._utils _rebuild_nested_tensor": ("a nested tensor", "its parts"),
    "torch._utils _rebuild_qtensor": ("a quantized tensor", "tensor.dequantize()"),
    "torch._utils _rebuild_meta_tensor_no_storage": ("on the meta device, without data", "a model with its weights"),
    "torch._utils _rebuild_wrapper_subclass": ("of a subclass of Tensor", "a plain tensor"),
    "torch._tensor _rebuild_from_type_v2": ("of a subclass of Tensor", "tensor.as_subclass(torch.Tensor)"),
}


class PickledShards:
    """Files named `pytorch_model*.bin`, mapped into memory. Pickled code in them is never run.

    They are read by `torch.load(weights_only=True)`, in PyTorch 2.6 or newer since older ones could be made to run code
    even so (CVE-2025-32434), and after a check that they hold dense tensors only.
    """

    def __init__(self, files: Iterable[Path], prefix: str = ""):
        files = list(files)
        for file in files:
            _check(file)
        torch = _pytorch()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._tensors: dict[str, Any] = {}
        file_of: dict[str, Path] = {}
        for file in files:
            try:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                others = {name: type(value).__name__ for name, value in tensors.items() if not torch.is_tensor(value)}
            except Exception as error:  # UnpicklingError, RuntimeError, EOFError and more
                # The first sentence: in the next, PyTorch may advise to do without weights_only.
                raise _unreadable(file, re.split(r"\n|\. ", f"{type(error).__name__}: {error}")[0]) from error
            if others:
                name, kind = next(iter(others.items()))
                remedy = "save a model's state_dict() alone, or get it in safetensors form"
                raise _unreadable(file, f"{name!r} is a {kind}, expected a tensor", remedy)
            tensors = {prefix + name: tensor for name, tensor in tensors.items()}
            check_new(file, tensors, file_of)
            self.shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            self.dtypes |= {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
            self._tensors |= tensors
            file_of |= dict.fromkeys(tensors, file)

    def read(self, name: str) -> mx.array:
        """Return a tensor that is copied out of the mapped file."""
        import torch

        tensor = self._tensors[name].detach().resolve_neg().contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type
            return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())


def check_new(file: Path, names: Iterable[str], file_of: Mapping[str, Path]) -> None:
    """Raise InputError if a file has tensors of a name that another one has: nothing says which to take."""
    twice = [name for name in names if name in file_of]
    if twice:
        raise InputError(f"{file_of[twice[0]]} and {file} both hold {listing(twice)}; remove one of the files")


def _pytorch() -> ModuleType:
    remedy = "pip install 'avg-mlx[torch]', then convert again"
    try:
        import torch
    except ImportError:
        raise AvgMlxError(f"pickled .bin shards need PyTorch to read them; {remedy}") from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise AvgMlxError(f"pickled .bin shards need PyTorch 2.6 or newer, and this is {torch.__version__}; {remedy}")
    return torch


def _check(file: Path) -> None:
    """Raise InputError unless a file has the form in which torch.save writes dense tensors, and holds nothing else.

    `torch.load(weights_only=True)` does not run what a pickle names either. But it makes tensors of kinds that MLX does
    not have, decompresses without a limit, and fills as many bytes as a pickle asks for.
    """
    if not zipfile.is_zipfile(file):
        remedy = "download it again, or load and save it with a newer PyTorch"
        raise _unreadable(file, "it is not a whole archive, as torch.save writes since PyTorch 1.6", remedy)
    try:
        named, asked = next(_foreign(file), (None, None))
    except Exception as error:  # BadZipFile, ValueError, NotImplementedError and more
        raise _unreadable(file, str(error) or type(error).__name__) from error
    if asked in OTHERS:
        found, instead = OTHERS[asked]
        raise _unreadable(file, f"{named} is {found}", f"save {instead}, or get it in safetensors form")
    if asked:
        raise _unreadable(file, f"it asks for {asked.replace(' ', '.')}, which no dense tensor needs")


def _foreign(file: Path) -> Iterator[tuple[str, str]]:
    """Yield all that the pickle in an archive asks for beyond DENSE, each after the last string before it: its name."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if len(pickles) != 1 or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("torch.save writes a single data.pkl, and compresses nothing")
        if pickles[0].file_size > PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {pickles[0].file_size} bytes, expected {PICKLE_BYTES} at most")
        pickle = archive.read(pickles[0])
    latest = ""
    for instruction, argument, _ in pickletools.genops(pickle):
        if not isinstance(argument, str):
            continue
        if instruction.name != "GLOBAL":
            latest = argument
        elif not DENSE.fullmatch(argument):
            yield latest, argument


def _unreadable(file: Path, reason: str, remedy: str = "get it in safetensors form") -> InputError:
    """Return the error of a pickled file that is not read."""
    return InputError(f"{file} cannot be read as plain tensors ({printable(reason)}); {remedy}")
