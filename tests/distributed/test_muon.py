"""Muon under every ZeRO stage, against a plain PyTorch loop with ``torch.optim.Muon`` and ``torch.optim.AdamW``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sws_dist.config.schema import OptimConfig
from sws_dist.distributed.init import init_distributed
from sws_dist.models import create_model
from sws_dist.optim import hidden_matrices
from sws_dist.zero import muon
from sws_dist.zero.engine import build_engine, connect_deepspeed, take_step
from sws_dist.zero.partition import fragments, master_weights
from tests import ranks

STEPS, BATCH, CLIPPING, LR = 4, 8, 0.5, 0.02
OPTIM = OptimConfig(name="muon", weight_decay=0.1, momentum=0.9)
STAGES = (0, 1, 2, 3)
NUM_HEADS = 2


def build_model() -> Any:
    """Two stages of unequal use, with wide, tall and square matrices, and norms and biases that are trained."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": NUM_HEADS, "num_classes": 5}
    return create_model("sws_vit", schedule=[2, 1], class_token=True, **sizes)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator)
    return images, torch.randint(5, (BATCH,), generator=generator)


def train_plainly() -> dict[str, Tensor]:
    """Train without DeepSpeed. Each head's rows of a qkv weight are a parameter of their own, in the same memory."""
    model = build_model()
    matrices, muons, adams = hidden_matrices(model), [], []
    for name, p in model.named_parameters():
        if name in matrices:
            muons += [(nn.Parameter(rows), p, i) for i, rows in enumerate(p.data.chunk(matrices[name]))]
        else:
            is_decayed = name in ("patch_embed.proj.weight", "head.weight")
            adams.append({"params": [p], "weight_decay": 0.1 if is_decayed else 0.0})
    first = torch.optim.Muon([rows for rows, _, _ in muons], LR, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    second = torch.optim.AdamW(adams, LR)
    for step in range(STEPS):
        images, labels = batch_of(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        for rows, p, i in muons:
            rows.grad = p.grad.chunk(p.shape[0] // rows.shape[0])[i]
        first.step()
        second.step()
        model.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_sharded(runs: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Train at each (ZeRO stage, precision). Returns this rank's pieces of the weights, and what it orthogonalised."""
    init_distributed(60)
    connect_deepspeed()
    return [_train(stage, precision) for stage, precision in runs]


def _train(stage: int, precision: str) -> dict[str, Any]:
    world = torch.distributed.get_world_size()
    accumulation = 2 // world
    ds = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIPPING,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 2000},
        "bf16": {"enabled": precision == "bf16"},
    }
    engine = build_engine(build_model(), ds, OPTIM)
    counts, original = [], muon.orthogonalize
    muon.orthogonalize = lambda matrices: counts.append(len(matrices)) or original(matrices)
    norms = []
    for step in range(STEPS):
        images, labels = (part.chunk(2) for part in batch_of(step))
        for group in engine.optimizer.param_groups:
            group["lr"] = LR
        for micro in range(accumulation):
            own = micro * world + torch.distributed.get_rank()
            engine.backward(nn.functional.cross_entropy(engine(images[own].to(_dtype(engine))).float(), labels[own]))
            result = take_step(engine)
        assert result is not None
        assert result.applied
        norms.append(float(result.grad_norm or 0))
    muon.orthogonalize = original
    masters = master_weights(engine)
    pieces = [(p.name, p.start, p.of(masters).clone()) for p in fragments(engine)]
    return {"pieces": pieces, "counts": counts, "norms": norms}


def _dtype(engine: Any) -> torch.dtype:
    return next(engine.module.parameters()).dtype


def whole_weights(found: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put the ranks' pieces together."""
    shapes = {name: p.shape for name, p in build_model().named_parameters()}
    whole = {name: torch.full((shape.numel(),), torch.nan) for name, shape in shapes.items()}
    for each in found:
        for name, start, values in each["pieces"]:
            whole[name][start : start + len(values)] = values
    return {name: values.view(shapes[name]) for name, values in whole.items()}


RUNS = [(stage, precision) for stage in STAGES for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def trained() -> dict[tuple[int, int, str], list[dict[str, Any]]]:
    """World size, stage and precision -> what each rank returns."""
    found = {world: ranks.run(train_sharded, RUNS, world=world) for world in (1, 2)}
    return {(world, *run): [own[i] for own in found[world]] for world in found for i, run in enumerate(RUNS)}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return train_plainly()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_weights_equal_plain_pytorch(trained: Any, plain: dict[str, Tensor], world: int, stage: int) -> None:
    found = whole_weights(trained[world, stage, "fp32"])
    for name, expected in plain.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-1, msg=lambda m, name=name: f"{name}: {m}")
