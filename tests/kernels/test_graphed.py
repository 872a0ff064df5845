"""Stages as CUDA graphs, all but the capture itself: on a GPU captured, without one by a pool that runs them again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sws_dist.models import create_model, fused
from sws_kernels import GraphedStage, GraphPool, StageWeights, stage
from tests.kernels.stage_checks import EPS, Inputs, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class RunAgain:
    """What `GraphPool.record` promises, without a GPU: a replay computes anew and writes where the results lie.

    And what sharing memory may cost: where a graph had temporary tensors, those captured after it may have their
    results. So a replay first overwrites all of these.
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


def small(seed: int = 0, **changes: Any) -> Inputs:
    inputs = make_inputs((2, 3, 64), 2, 2, torch.float32, DEVICE, hidden=64, drop_path=True, **changes)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (inputs.x, inputs.dy, inputs.scales):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return inputs


def parameters(inputs: Inputs) -> StageWeights:
    return StageWeights(*(None if w is None else torch.nn.Parameter(w.clone()) for w in inputs.weights))


def call(function: Any, inputs: Inputs, weights: StageWeights, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, dx), copied; the weights' gradients are added to ``.grad``."""
    x = inputs.x.clone().requires_grad_()
    y = function(x, weights, inputs.repeats, inputs.num_heads, EPS, inputs.scales, **arguments)
    y.backward(inputs.dy)
    return y.detach().clone(), x.grad


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}], ids=["plain", "no_qkv_bias"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_replays_are_the_stage_to_the_bit(recompute: bool, changes: dict[str, Any]) -> None:
    """Two batches in a row, of which the first was captured; gradients add up over them, as in accumulation."""
    graphed = GraphedStage(new_pool())
    own, plain = parameters(small(**changes)), parameters(small(**changes))
    for seed in range(2):
        inputs = small(seed, **changes)
        got = call(graphed, inputs, own, recompute=recompute)
        want = call(stage, inputs, plain, recompute=recompute, backend="triton")
        assert all(map(torch.equal, got, want))
        for name, mine, theirs in zip(StageWeights._fields, own, plain, strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine.grad, theirs.grad), name


def test_updates_in_place_are_seen() -> None:
    graphed, weights, inputs = GraphedStage(new_pool()), parameters(small()), small()
    call(graphed, inputs, weights)
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.5)
    got, want = call(graphed, inputs, weights), call(stage, inputs, weights, backend="triton")
    assert all(map(torch.equal, got, want))


def test_hooks_on_gradients_run_once_a_backward() -> None:
    """DeepSpeed reduces gradients from such hooks."""
    graphed, weights, seen = GraphedStage(new_pool()), parameters(small()), []
    for name, weight in weights._asdict().items():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    for _ in range(2):
        call(graphed, small(), weights)
    assert sorted(seen) == sorted([*StageWeights._fields] * 2)


def test_other_shapes_and_no_gradient_run_the_stage_itself() -> None:
    graphed, weights = GraphedStage(new_pool()), parameters(small())
    captured = call(graphed, small(), weights)
    inputs = make_inputs((1, 5, 64), 2, 2, torch.float32, DEVICE, hidden=64)
    got, want = call(graphed, inputs, weights), call(stage, inputs, weights, backend="triton")
    assert all(map(torch.equal, got, want))
    with torch.no_grad():
        y = graphed(inputs.x, weights, 2, 2, EPS)
    assert torch.equal(y, want[0])
    assert all(map(torch.equal, call(graphed, small(), weights), captured)), "the graph is as it was"


def test_a_weight_that_moved_is_an_error() -> None:
    graphed, weights = GraphedStage(new_pool()), parameters(small())
    call(graphed, small(), weights)
    weights.w1.data = weights.w1.data.clone()
    with pytest.raises(RuntimeError, match="w1 is not where it was when its CUDA graph was captured"):
        call(graphed, small(), weights)


def test_a_backward_after_another_forward_is_an_error() -> None:
    graphed, weights, inputs = GraphedStage(new_pool()), parameters(small()), small()

    def forward() -> torch.Tensor:
        return graphed(inputs.x, weights, inputs.repeats, inputs.num_heads, EPS, inputs.scales)

    first, second = forward(), forward()
    with pytest.raises(RuntimeError, match="each forward has one backward"):
        first.sum().backward()
    second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="each forward has one backward"):
        second.sum().backward()


def test_a_weight_changed_before_the_backward_is_an_error() -> None:
    graphed, weights, inputs = GraphedStage(new_pool()), parameters(small()), small()
    y = graphed(inputs.x, weights, inputs.repeats, inputs.num_heads, EPS, inputs.scales)
    with torch.no_grad():
        weights.w2.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_wrong_arguments_are_said_before_anything_is_captured() -> None:
    inputs = small()
    with pytest.raises(ValueError, match=r"stage: b1 must be"):
        GraphedStage(new_pool())(inputs.x, inputs.weights._replace(b1=inputs.weights.w1), 2, 2)


def test_a_model_trains_the_same() -> None:
    """Stages that share their memory, drop-path drawn outside, two micro-batches a step, evaluation in between."""
    losses = {}
    for graphs in (False, True):
        torch.manual_seed(0)
        model = create_model(
            "sws_vit", schedule=[1, 2, 1], img_size=16, patch_size=8, embed_dim=64, num_heads=2, mlp_ratio=1.0,
            num_classes=4, drop_path_rate=0.5,
        ).to(DEVICE)  # fmt: skip
        model.use_kernels("triton")
        if graphs:
            pool = new_pool()
            for block in model.blocks:
                block.graphed = GraphedStage(pool)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        images, labels = torch.randn(6, 3, 16, 16).to(DEVICE), torch.arange(6, device=DEVICE) % 4
        losses[graphs] = []
        for _ in range(3):
            for start in (0, 3):
                logits = model(images[start : start + 3])
                torch.nn.functional.cross_entropy(logits, labels[start : start + 3]).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                losses[graphs].append(model(images[:5]).square().mean().item())
            model.train()
    assert losses[True] == losses[False]
    assert len(set(losses[True])) == 3


@pytest.mark.parametrize(
    ("kernels", "device", "reason"),
    [
        ("reference", "cuda", "the stages run PyTorch's code, not the kernels"),
        ("triton", "cpu", "the device is cpu"),
    ],
)
def test_where_it_cannot_be(kernels: Any, device: str, reason: str) -> None:
    model = create_model("sws_vit", schedule=[1], img_size=16, patch_size=8, embed_dim=64, num_heads=2, num_classes=4)
    model.use_kernels(kernels)
    with pytest.raises(ValueError, match=rf"model\.cuda_graphs: true was asked for, but {reason}"):
        fused.use_cuda_graphs(model, torch.device(device))
