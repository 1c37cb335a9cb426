"""The logits of one model in the Hub's layout, as one library computes them.

    python exact.py transformers|mlx-vlm|avg-mlx FOLDER    # writes FOLDER/KIND.json: positions, and the last logits

FOLDER is that of folders.py. All get the same text and image; transformers computes in float32, with Pillow's pixels.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Result = tuple[int, np.ndarray]  # positions, and the last one's logits


def main() -> None:
    kind, home = sys.argv[1], Path(sys.argv[2])
    compute: dict[str, Callable[[Path], Result]] = {
        "transformers": transformers,
        "mlx-vlm": mlx_vlm,
        "avg-mlx": avg_mlx,
    }
    positions, logits = compute[kind](home)
    (home / f"{kind}.json").write_text(json.dumps({"positions": positions, "logits": logits.tolist()}))


def prompt(home: Path) -> str:
    """The text as the folder's template writes it."""
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": f"<image> {(home / 'question.txt').read_text()}"}]
    tokenizer = AutoTokenizer.from_pretrained(home / "theirs")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def transformers(home: Path) -> Result:
    import torch
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(home / "theirs", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(home / "theirs", backend="pil")
    inputs = processor(text=prompt(home), images=Image.open(home / "image.jpg"), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits[0, -1]
    return inputs["input_ids"].shape[1], logits.numpy()


def mlx_vlm(home: Path) -> Result:
    from mlx_vlm import load
    from mlx_vlm.utils import prepare_inputs

    model, processor = load(str(home / "theirs"))
    text, image = prompt(home), Image.open(home / "image.jpg")
    inputs = prepare_inputs(processor, images=[image], prompts=text, add_special_tokens=True)
    embeddings = model.get_input_embeddings(inputs["input_ids"], inputs["pixel_values"]).inputs_embeds
    logits = model.language_model(inputs["input_ids"], inputs_embeds=embeddings).logits[0, -1]
    return embeddings.shape[1], np.array(logits)


def avg_mlx(home: Path) -> Result:
    from avg_mlx import load
    from avg_mlx.inference.options import Looking
    from avg_mlx.inference.steps import prepare

    model, tokenizer = load(home / "converted")
    question = f"<image> {(home / 'question.txt').read_text()}"
    looking = Looking(granularity=model.config.finest)
    embeddings = prepare(model, tokenizer, question, str(home / "image.jpg"), looking).embeddings
    return len(embeddings), np.array(model.head(model.hidden(embeddings[None])[0, -1]))


if __name__ == "__main__":
    main()
