"""A checkpoint becomes a converted folder, one tensor at a time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config import VisionConfig, default_granularities
from ..errors import AvgMlxError, InputError
from ..model.inventory import Part, parts_of, sizes_of
from ..progress import Progress, silent
from .checkpoint import load_tokenizer
from .hub import hub_tokenizer_files
from .quantization import DTYPES, Dtype, Quantization
from .recasting import Recasting
from .sentencepiece import tokenizer_files
from .side_files import PROCESSOR, converted_files, preprocessor_config
from .source import Source, first_line, open_source
from .writing import SHARD_BYTES, free_path, write_folder


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    *,
    revision: str | None = None,
    quantization: Quantization | None = None,
    dequantize: bool = False,
    dtype: Dtype | None = None,
    granularities: Sequence[int] | None = None,
    progress: Progress = silent,
    shard_bytes: int = SHARD_BYTES,
) -> list[Part]:
    """Write a checkpoint folder or Hub repository as a converted model to `mlx_path`, which must not exist yet.

    hf_path: a LLaVA or AVG-LLaVA checkpoint in its authors' layout or the Hub's, or a converted one to quantize,
    dequantize or recast. dtype: the type of all that is not quantized; by default the checkpoint's own. granularities:
    give a model without a router these, so that it can be made adaptive; an empty list is for the tower's usual ones.
    `mlx_path` appears only when it is complete. Returns the model's parts. Raises InputError or AvgMlxError, and then
    leaves nothing behind.
    """
    destination = free_path(mlx_path)
    if quantization and dequantize:
        raise InputError("quantizing and dequantizing exclude each other; ask for one of them")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    source = open_source(hf_path, revision)
    if granularities is not None:
        source = _regranulated(source, granularities)
    result = Recasting(source, dtype, dequantize, quantization)
    files = converted_files(source.folder, hf_path, result.keys)
    if not source.converted:
        hub = result.target.config.layout == "transformers"
        files |= hub_tokenizer_files(source.folder, result.keys) if hub else tokenizer_files(source.folder)
        files[PROCESSOR] = preprocessor_config(result.target.config.vision)

    def check(folder: Path) -> None:
        """Try the tokenizer and its chat template."""
        remedy = "convert the checkpoint again" if source.converted else "download its tokenizer's files again"
        load_tokenizer(folder, result.keys, name=source.folder, remedy=remedy)

    sizes = sizes_of(result.target)
    write_folder(destination, files, result.tensors(), sizes, progress=progress, shard_bytes=shard_bytes, check=check)
    return parts_of(result.target)


def _regranulated(source: Source, granularities: Sequence[int]) -> Source:
    if source.keys["router_select"]:
        raise InputError(
            f"{source.folder} has a router, which knows its own granularities only; leave granularities out"
        )
    vision = VisionConfig.from_dict(source.keys["vision_config"])
    chosen = list(granularities) or default_granularities(vision.patch_grid)
    return replace(source, keys={"filtered_text_num": 32, **source.keys, "vis_token_granularity": chosen})


def upload(folder: str | Path, repo: str) -> str:
    """Upload a converted folder to a Hub repository, and return the repository's address.

    The repository is created if it does not exist. Raises AvgMlxError if the upload fails.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        # Since huggingface-hub 2 this resumes and commits in batches; upload_large_folder is gone.
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # from the Hub client, the network or the account
        remedy = f"{folder} is complete, so resume with: hf upload {repo} {folder}"
        raise AvgMlxError(f"cannot upload to {repo} ({first_line(error)}); {remedy}") from error
    return str(address)
