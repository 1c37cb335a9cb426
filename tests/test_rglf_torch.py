"""Router training against an independent one in PyTorch, written from the specification."""

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
from conftest import RECORDS, write_samples

from avg_mlx.training import rglf
from avg_mlx.training.data import read_samples
from avg_mlx.training.feedback import collect_feedback
from avg_mlx.training.forward import instruction_embeddings
from avg_mlx.training.loop import train
from avg_mlx.training.optimizer import LoopSettings
from avg_mlx.training.plan import Plan
from avg_mlx.training.run import Run
from avg_mlx.weights.adapters import AdapterConfig, trained_tensors
from avg_mlx.weights.pytorch import AUTHORS_LAYOUT

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.slow

STEPS = 20
RATE = 1e-3
# Relative. Adam divides by small gradients, so that float32's rounding grows with every step, in either framework.
FIRST_LOSSES_TOLERANCE = 1e-5
LOSS_TOLERANCE = 5e-3
LOGIT_TOLERANCE = 0.02  # absolute; logits are normalized to a variance of 1


class Router(torch.nn.Module):
    """Sections 5 and 6 of the specification, under the authors' names."""

    def __init__(self, D: int, granularities: list[int], filtered_text_num: int, patch_grid: tuple[int, int]):
        super().__init__()
        self.merger = torch.nn.TransformerEncoderLayer(D, nhead=8, dim_feedforward=D, dropout=0.0)
        self.router = torch.nn.Sequential(
            torch.nn.Linear(D, D), torch.nn.GELU(), torch.nn.Linear(D, len(granularities))
        )
        self.voter = torch.nn.Parameter(torch.zeros(sum(granularities) + filtered_text_num, 1))
        self.norm = torch.nn.LayerNorm(len(granularities))
        self.granularities = granularities
        self.filtered_text_num = filtered_text_num
        self.patch_grid = patch_grid

    def forward(self, features, text):
        """(crops, patches, D), (tokens, D) → (granularities,)"""
        levels = [self.pool(features, g) for g in self.granularities]
        filtered = self.filter(text, features[0])
        x = torch.cat([*levels, filtered.expand(len(features), -1, -1)], dim=1)
        x = self.merger(x)  # sequence-first, as trained: attention runs across crops
        votes = (self.router(x) * self.voter).sum(dim=1)
        return self.norm(votes.mean(dim=0))

    def pool(self, features, g: int):
        crops, patches, D = features.shape
        if g == patches:
            return features
        side = int((patches / g) ** 0.5)
        kernel = {patches // 2: (1, 2), patches // 8: (2, 4)}.get(g, (side, side))
        grid = features.transpose(1, 2).reshape(crops, D, *self.patch_grid)
        return torch.nn.functional.avg_pool2d(grid, kernel, kernel).flatten(2).transpose(1, 2)

    def filter(self, text, base):
        similarity = torch.nn.functional.cosine_similarity(text[:, None], base[None], dim=-1).mean(dim=1)
        kept = text[similarity.argsort(descending=True)[: self.filtered_text_num]]
        return torch.nn.functional.pad(kept, (0, 0, 0, self.filtered_text_num - len(kept)))


def rglf_loss(logits, feedback):
    """Section 9, stage 4, of a batch."""
    losses, order = feedback.sort(dim=1)
    scores = torch.log_softmax(logits.gather(1, order), dim=1)
    ranking = 0
    for j in range(1, logits.shape[1]):
        margins = 1.0 * j * (losses[:, j:] - losses[:, :-j])
        ranking = ranking + torch.relu(scores[:, j:] - scores[:, :-j] + margins).mean()
    choice = torch.nn.functional.cross_entropy(logits, feedback.argmin(dim=1))
    return 1.0 * ranking + 0.1 * choice


def schedule(step: int) -> float:
    """Warm-up over 3 % of the steps, then a cosine to 0; step counts from 0."""
    warm_up = -(-STEPS * 3 // 100)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + np.cos(np.pi * (step - warm_up) / (STEPS - warm_up)))


def tensor(array) -> "torch.Tensor":
    return torch.tensor(np.array(array.astype(mx.float32)))


def test_twenty_steps_follow_pytorch(own_tiny, tmp_path):
    model, tokenizer = own_tiny
    data = write_samples(tmp_path, [record for record in RECORDS if isinstance(record.get("image"), str)])
    samples = read_samples(data, None, tokenizer, model.config)
    rows = collect_feedback(model, samples, tmp_path / "feedback.jsonl")
    mx.random.seed(0)
    rglf.prepare(model, fresh=True)
    for module in model.router.modules():
        if isinstance(module, mlx_nn.Dropout):
            module._p_1 = 1.0  # what is kept

    config = model.config
    theirs = Router(config.hidden_size, list(config.granularities), config.filtered_text_num, config.vision.patch_grid)
    parts: dict[str, dict] = {}
    for name, array in trained_tensors(model).items():
        place = AUTHORS_LAYOUT.origin(name)
        parts.setdefault(place.name.removeprefix("model.router."), {})[place.part] = tensor(array)
    state = {name: torch.cat([arrays[part] for part in sorted(arrays)]) for name, arrays in parts.items()}
    theirs.load_state_dict(state, strict=True)
    features = [tensor(rglf.FeatureCache(model).features(sample)) for sample in samples]
    texts = [tensor(instruction_embeddings(model, sample)) for sample in samples]
    feedback = torch.tensor([row.losses for row in rows])

    untrained = [theirs(f, text).detach().numpy() for f, text in zip(features, texts, strict=True)]
    plan = Plan([1] * len(samples), 3, seed=0)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    their_losses = []
    for step in range(STEPS):
        batch = plan.batch(step)
        optimizer.zero_grad()
        loss = rglf_loss(torch.stack([theirs(features[i], texts[i]) for i in batch]), feedback[batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        their_losses.append(loss.item())

    our_losses = []
    task = rglf.RouterTask(model, samples, rows, [], [], 2, 1.0, 1.0, 0.1, rglf.FeatureCache(model))
    run = Run(tmp_path / "run", {}, AdapterConfig(num_layers=0))
    settings = LoopSettings(steps=STEPS, learning_rate=RATE)
    with run.open(resume=False):
        train(model, task, plan, settings, run, lambda record: our_losses.append(record["loss"]))

    assert our_losses[:5] == pytest.approx(their_losses[:5], rel=FIRST_LOSSES_TOLERANCE)
    assert our_losses == pytest.approx(their_losses, rel=LOSS_TOLERANCE)
    model.eval()
    for f, text, before in zip(features, texts, untrained, strict=True):
        ours = np.array(model.route(mx.array(f.numpy()), mx.array(text.numpy())))
        logits = theirs(f, text).detach().numpy()
        assert np.abs(logits - before).max() > 20 * LOGIT_TOLERANCE
        assert np.abs(ours - logits).max() < LOGIT_TOLERANCE
