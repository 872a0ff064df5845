"""`stage` as two CUDA graphs, forward and backward, for training at one shape: a small model is bound by launches.

A stage of a ViT-Ti launches some 40 kernels a repeat, most shorter than their launch takes. A graph launches all of
them at once. Both graphs are captured at the first call, whose shape they keep, and replayed at every further one.

What that asks of the caller, and how it is kept:

    weights stay where they are     a replay reads the captured addresses; a weight found elsewhere is an error.
                                    Optimizers update in place, also under ZeRO-1 and 2; ZeRO-3 moves weights
    one backward a forward          what the forward kept is overwritten by the next; an error where it would matter
    one order                       the stages of a model share one pool of memory: forward from the first to the
                                    last, backward from the last to the first
    another shape, or no gradient   runs `stage` itself, for example evaluation

Nothing random is inside: drop-path's scales are drawn before and copied in. In backward everything leaves as a copy,
the weights' gradients as one, so that autograd may keep them and add to them (gradient accumulation), and hooks on
the weights' gradients run outside, as ever (DeepSpeed's do).

Why the stages may share memory, though each is captured whole before the next: what a stage keeps for its backward is
never given back. Where a later stage's tensors lie, an earlier one may have had temporary tensors and will write them
again: those of its forward before the later stage begins, those of its backward after it has ended.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sws_kernels.stage import StageWeights, check_stage, stage, stage_backward, stage_forward

Recorded = tuple[Callable[[], None], Any]


class GraphPool:
    """The memory that the graphs of one model's stages share, and the stream that they are captured on."""

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, function: Callable[[], Any]) -> Recorded:
        """(a call that does again what ``function`` did, on the same memory; what ``function`` returned).

        The results are written by each such call, and not before the first.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()  # Triton compiles, and cuBLAS takes its workspace: capture allows neither
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: DALI's threads and NCCL's watchdog go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, self._handle, self._stream, capture_error_mode="thread_local"):
            results = function()
        return graph.replay, results


class _Plan(NamedTuple):
    """What of a stage is no tensor."""

    repeats: int
    num_heads: int
    eps: float
    recompute: bool


class GraphedStage:
    """`stage` with backend="triton", captured at the first training call and replayed afterwards."""

    def __init__(self, pool: GraphPool) -> None:
        self._pool = pool
        self._graphs: _Graphs | None = None

    def __call__(
        self,
        x: Tensor,
        weights: StageWeights,
        repeats: int,
        num_heads: int,
        eps: float = 1e-6,
        scales: Tensor | None = None,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """As `stage`, differentiable in the same way: x [B, T, D] to the same shape.

        The result lies in the pool and is whole until the stage's backward; copy what must outlive it.

        Raises:
            RuntimeError: a weight has moved since the capture; a backward without its own forward right before.
        """
        plan = _Plan(repeats, num_heads, eps, recompute)
        if torch.is_grad_enabled():
            if self._graphs is None:
                check_stage(x, weights, repeats, num_heads, scales)
                self._graphs = _Graphs(x, weights, scales, plan, self._pool)
            if self._graphs.fit(x, scales, plan):
                self._graphs.require_unmoved(weights)
                return _Replayed.apply(x, scales, self._graphs, *weights)
        return stage(x, weights, repeats, num_heads, eps, scales, recompute=recompute, backend="triton")


class _Graphs:
    """The two graphs of one stage and the tensors that they read and write."""

    def __init__(self, x: Tensor, weights: StageWeights, scales: Tensor | None, plan: _Plan, pool: GraphPool) -> None:
        self._plan, self._token = plan, object()
        self._weights = StageWeights(*(None if w is None else w.detach() for w in weights))
        self._x = x.detach().clone(memory_format=torch.contiguous_format)
        self._scales = None if scales is None else scales.clone()
        self._dy = torch.zeros_like(self._x)

        def forward() -> tuple[Tensor, list[Tensor]]:
            return stage_forward(self._x, self._weights, self._scales, *plan)

        def backward() -> tuple[Tensor, Tensor]:
            d_x, d_weights = stage_backward(self._dy, self._weights, self._scales, self._kept, *plan)
            return d_x, torch.cat([d.flatten() for d in d_weights if d is not None])

        with torch.no_grad(), torch.cuda.device_of(x):
            self._replay_forward, (self._y, self._kept) = pool.record(forward)
            self._replay_backward, (self._d_x, self._d_weights) = pool.record(backward)

    def fit(self, x: Tensor, scales: Tensor | None, plan: _Plan) -> bool:
        """Whether this is the call that was captured, but for what the tensors hold."""
        return plan == self._plan and _same_kind(x, self._x) and _same_kind(scales, self._scales)

    def require_unmoved(self, weights: StageWeights) -> None:
        for name, weight, captured in zip(StageWeights._fields, weights, self._weights, strict=True):
            if weight is not captured and (weight is None or weight.data_ptr() != captured.data_ptr()):
                raise RuntimeError(
                    f"stage: {name} is not where it was when its CUDA graph was captured. Weights must be updated in "
                    "place; run without CUDA graphs (model.cuda_graphs: false) where they cannot be"
                )

    def forward(self, x: Tensor, scales: Tensor | None) -> tuple[Tensor, object]:
        """(y, what `backward` will ask for)."""
        self._x.copy_(x)
        if scales is not None and self._scales is not None:
            self._scales.copy_(scales)
        self._token = object()
        self._replay_forward()
        return self._y.detach(), self._token

    def backward(self, dy: Tensor, token: object) -> tuple[Tensor, list[Tensor | None]]:
        """(dx, the weights' gradients), the caller's own."""
        if token is not self._token:
            raise RuntimeError(
                "stage: with CUDA graphs each forward has one backward, and before the next forward: what this one "
                "kept is overwritten. Run without them (model.cuda_graphs: false) where that does not hold"
            )
        self._token = object()
        self._dy.copy_(dy)
        self._replay_backward()
        sizes = [0 if weight is None else weight.numel() for weight in self._weights]
        parts = self._d_weights.clone().split(sizes)
        shaped = zip(parts, self._weights, strict=True)
        return self._d_x.clone(), [None if weight is None else part.view_as(weight) for part, weight in shaped]


class _Replayed(torch.autograd.Function):
    """The stage's two graphs as one node of autograd's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor | None, graphs: _Graphs, *weights: Any) -> Tensor:
        y, ctx.token = graphs.forward(x, scales)
        ctx.graphs = graphs
        ctx.save_for_backward(*weights)  # so that autograd notices a weight changed in place before the backward
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        d_x, d_weights = ctx.graphs.backward(dy, ctx.token)
        return d_x, None, None, *d_weights


def _same_kind(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
