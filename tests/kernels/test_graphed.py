"""Test stages as CUDA graphs: captured on a GPU; without one, a pool that runs them again stands for the capture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sws_dist.models import create_model
from sws_dist.models.kernel_backend import enable_cuda_graphs
from sws_kernels import GraphedStage, GraphPool, Providers, StageWeights
from tests.kernels.checks.numerics import Inputs
from tests.kernels.checks.stage import EPS, arguments, make_inputs, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RIVALS = Providers("triton" if DEVICE == "cuda" else "flash", "torch", "torch")  # flash takes no fp32 on a GPU


class RunAgain:
    """Do what `GraphPool` promises, without a GPU: a replay computes anew and writes where the results lie.

    It also shows what sharing memory may cost. Where a graph had temporary tensors, those captured after it may have
    their results, so a replay first overwrites all of these.
    """

    def __init__(self) -> None:
        self._recorded: list[list[torch.Tensor]] = []

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        results = function()
        flat, again = flattened(results), flattened(function())
        number = len(self._recorded)
        self._recorded.append(
            [one for one, other in zip(flat, again, strict=True) if one.data_ptr() != other.data_ptr()]
        )

        def replay() -> None:
            for later in self._recorded[number + 1 :]:
                for tensor in later:
                    tensor.fill_(torch.nan)
            for old, new in zip(flat, flattened(function()), strict=True):
                old.copy_(new)

        return replay, results


def flattened(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else [t for part in results for t in flattened(part)]


def new_pool() -> Any:
    return GraphPool() if DEVICE == "cuda" else RunAgain()


def small(seed: int = 0, *, repeats: int = 1, **changes: Any) -> Inputs:
    """Return a small stage; ``seed`` chooses the tensors of the batch, not the weights."""
    inputs = make_inputs((2, 3, 32), repeats, 1, torch.float32, DEVICE, hidden=32, drop_path=True, **changes)
    generator = torch.Generator().manual_seed(seed)
    for name in ("x", "dy", "scales"):
        inputs[name].copy_(torch.randn(inputs[name].shape, generator=generator))
    return inputs


def parameters(inputs: Inputs) -> StageWeights:
    return StageWeights(*(None if w is None else torch.nn.Parameter(w.clone()) for w in inputs["weights"]))


def call(function: Any, inputs: Inputs, weights: StageWeights, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return copies of (y, dx). The weights' gradients are added to ``.grad``."""
    x = inputs["x"].clone().requires_grad_()
    y = function(*arguments(inputs | {"x": x, "weights": weights}), **options)
    y.backward(inputs["dy"])
    return y.detach().clone(), x.grad


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {"repeats": 2}),
        ({"recompute": True}, {"repeats": 2}),
        ({}, {"qkv_bias": False}),
        ({"providers": RIVALS}, {"repeats": 2}),
    ],
    ids=["saved", "recomputed", "no_qkv_bias", "rivals"],
)
def test_replays_are_the_stage_to_the_bit(options: dict[str, Any], changes: dict[str, Any]) -> None:
    """The first of two batches is captured; gradients add up over both, as in gradient accumulation."""
    graphed = GraphedStage(new_pool())
    own, plain = parameters(small(**changes)), parameters(small(**changes))
    for seed in range(2):
        inputs = small(seed, **changes)
        got = call(graphed, inputs, own, **options)
        expected = call(triton, inputs, plain, **options)
        assert all(map(torch.equal, got, expected))
        for name, mine, theirs in zip(StageWeights._fields, own, plain, strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine.grad, theirs.grad), name


def test_updates_in_place_are_seen() -> None:
    graphed, weights, inputs = GraphedStage(new_pool()), parameters(small()), small()
    call(graphed, inputs, weights)
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.5)
    got, expected = call(graphed, inputs, weights), call(triton, inputs, weights)
    assert all(map(torch.equal, got, expected))


def test_hooks_on_gradients_run_once_a_backward() -> None:
    """DeepSpeed reduces gradients in such hooks."""
    graphed, weights, seen = GraphedStage(new_pool()), parameters(small()), []
    for name, weight in weights._asdict().items():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    for _ in range(2):
        call(graphed, small(), weights)
    assert sorted(seen) == sorted([*StageWeights._fields] * 2)


def test_other_shapes_and_no_gradient_run_the_stage_itself() -> None:
    graphed, weights = GraphedStage(new_pool()), parameters(small())
    captured = call(graphed, small(), weights)
    inputs = make_inputs((1, 5, 32), 1, 1, torch.float32, DEVICE, hidden=32)
    got, expected = call(graphed, inputs, weights), call(triton, inputs, weights)
    assert all(map(torch.equal, got, expected))
    with torch.no_grad():
        y = graphed(inputs["x"], weights, 1, 1, EPS)
    assert torch.equal(y, expected[0])
    assert all(map(torch.equal, call(graphed, small(), weights), captured)), "the graph has changed"


def test_a_weight_that_moved_is_an_error() -> None:
    graphed, weights = GraphedStage(new_pool()), parameters(small())
    call(graphed, small(), weights)
    weights.fc1_weight.data = weights.fc1_weight.data.clone()
    with pytest.raises(RuntimeError, match="fc1_weight is not where it was when its CUDA graph was captured"):
        call(graphed, small(), weights)


def test_a_backward_after_another_forward_is_an_error() -> None:
    graphed, weights, inputs = GraphedStage(new_pool()), parameters(small()), small()

    def forward() -> torch.Tensor:
        return graphed(*arguments(inputs | {"weights": weights}))

    first, second = forward(), forward()
    with pytest.raises(RuntimeError, match="each forward has one backward"):
        first.sum().backward()
    second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="each forward has one backward"):
        second.sum().backward()


def test_a_weight_changed_before_the_backward_is_an_error() -> None:
    graphed, weights, inputs = GraphedStage(new_pool()), parameters(small()), small()
    y = graphed(*arguments(inputs | {"weights": weights}))
    with torch.no_grad():
        weights.fc2_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_wrong_arguments_are_errors_before_anything_is_captured() -> None:
    inputs = small()
    wrong = inputs["weights"]._replace(fc1_bias=inputs["weights"].fc1_weight)
    with pytest.raises(ValueError, match=r"stage: fc1_bias must be"):
        GraphedStage(new_pool())(inputs["x"], wrong, 1, 1)


@pytest.mark.parametrize("depths", [[(1, 1, 1)], [(1, 1, 2), (2, 1, 1)]], ids=["one_depth", "elastic"])
def test_a_model_trains_the_same(depths: list[tuple[int, ...]]) -> None:
    """The stages share their memory, drop-path is drawn outside, a step has two micro-batches and then evaluates."""
    losses: dict[bool, list[float]] = {}
    for graphs in (False, True):
        torch.manual_seed(0)
        model = create_model(
            "sws_vit", schedule=[1, 1, 1], img_size=16, patch_size=8, embed_dim=32, num_heads=1, mlp_ratio=1.0,
            num_classes=4, drop_path_rate=0.5, branch_scaling=1.0,
        ).to(DEVICE)  # fmt: skip
        model.use_kernels("triton")
        if graphs:
            pool = new_pool()
            for block, counts in zip(model.blocks, zip(*depths, strict=True), strict=True):
                block.graphed = GraphedStage(pool, counts)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        images, labels = torch.randn(4, 3, 16, 16).to(DEVICE), torch.arange(4, device=DEVICE)
        losses[graphs] = []
        for step in range(2):
            model.set_repeats(depths[step % len(depths)])
            for start in (0, 2):
                logits = model(images[start : start + 2])
                torch.nn.functional.cross_entropy(logits, labels[start : start + 2]).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                losses[graphs].append(model(images[:3]).square().mean().item())
            model.train()
    assert losses[True] == losses[False]
    assert len(set(losses[True])) == 2


@pytest.mark.parametrize(
    ("kernels", "device", "reason"),
    [
        ("reference", "cuda", "the stages run PyTorch's code, not the kernels"),
        ("triton", "cpu", "the device is cpu"),
    ],
)
def test_cuda_graphs_that_cannot_be_are_an_error(kernels: Any, device: str, reason: str) -> None:
    model = create_model("sws_vit", schedule=[1], img_size=16, patch_size=8, embed_dim=64, num_heads=2, num_classes=4)
    model.use_kernels(kernels)
    with pytest.raises(ValueError, match=rf"model\.cuda_graphs: true was asked for, but {reason}"):
        enable_cuda_graphs(model, torch.device(device))
