"""Run `stage` as two CUDA graphs, forward and backward, for training at one shape.

A small model is bound by kernel launches: a stage of a ViT-Ti launches some 40 kernels a repeat, and most of them are
shorter than their launch takes. A graph launches all of them at once. Both graphs are captured at the first call, keep
its shape, and are replayed at every further call of that shape. A stage whose number of repeats changes from step to
step (an elastic model) has two graphs for each number.

Graphs require four things of the caller:

    Weights stay in place.      A replay reads the captured addresses, so a weight that has moved is an error.
                                Optimizers update in place, also under ZeRO-1 and 2; ZeRO-3 moves weights.
    One backward a forward.     The next forward overwrites what this one saved; a second backward is an error.
    One order.                  The stages of a model share one pool of memory, so the forwards run from the first
                                stage to the last and the backwards from the last to the first.
    One shape.                  Another shape, or a call without gradients (for example evaluation), runs `stage`
                                itself.

Nothing inside a graph is random: drop-path's scales are drawn before and copied in. In the backward all results leave
as copies, the weights' gradients as one, so that autograd may keep them and add to them (gradient accumulation). Hooks
on the weights' gradients run outside the graph as usual (DeepSpeed's do).

Why the stages may share memory, though each is captured completely before the next: the tensors that a stage saves for
its backward are never given back to the pool. Where a later stage's tensors lie, an earlier stage may have had
temporary tensors and will write them again, but those of its forward are written before the later stage begins, and
those of its backward after the later stage has ended. This needs all graphs of a stage to be captured before the next
stage's first one, so those for the other numbers of repeats are captured at the first call too. Of these only one runs
in a step, but each keeps its own memory: 1, 2 and 3 repeats take that of 6.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sws_kernels.providers import TRITON, Providers
from sws_kernels.stage import StagePlan, StageWeights, check_stage, stage, stage_backward, stage_forward

Recorded = tuple[Callable[[], None], Any]


class GraphPool:
    """Hold the memory that the graphs of one model's stages share and the stream on which they are captured."""

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, function: Callable[[], Any]) -> Recorded:
        """Capture ``function`` as a CUDA graph.

        Returns:
            (replay, results): a call that repeats what ``function`` did, on the same memory, and what ``function``
            returned. Only a replay writes the results; before the first one they hold nothing.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()  # Triton compiles and cuBLAS allocates its workspace, and a capture allows neither
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local, because DALI's threads and NCCL's watchdog continue to call CUDA meanwhile.
        with torch.cuda.graph(graph, self._handle, self._stream, capture_error_mode="thread_local"):
            results = function()
        return graph.replay, results


class GraphedStage:
    """Run `stage` with backend="triton", captured at the first training call and replayed afterwards.

    Args:
        pool: the memory of all stages of the model.
        repeats: the numbers of repeats that will be asked for, beside the first call's.
    """

    def __init__(self, pool: GraphPool, repeats: Iterable[int] = ()) -> None:
        self._pool = pool
        self._repeats = frozenset(repeats)
        self._graphs: dict[int, _Graphs] = {}

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
        providers: Providers = TRITON,
    ) -> Tensor:
        """Compute what `stage` does, with the same arguments: x [B, T, D] to the same shape. Differentiable once.

        The result lies in the pool and is valid until the stage's backward; copy it to keep it longer.

        Raises:
            ValueError: as `stage` does, before anything is captured.
            RuntimeError: a weight has moved since the capture, or a backward does not follow its own forward.
        """
        plan = StagePlan(repeats, num_heads, eps, recompute, providers)
        if torch.is_grad_enabled():
            if not self._graphs:
                check_stage(x, weights, scales, plan)
                for count in sorted(self._repeats | {repeats}):
                    counted = None if scales is None else scales.new_ones(count, *scales.shape[1:])
                    self._graphs[count] = _Graphs(x, weights, counted, plan._replace(repeats=count), self._pool)
            graphs = self._graphs.get(repeats)
            if graphs is not None and graphs.fit(x, scales, plan):
                graphs.require_unmoved(weights)
                return _Replayed.apply(x, scales, graphs, *weights)
        return stage(
            x, weights, repeats, num_heads, eps, scales, recompute=recompute, backend="triton", providers=providers
        )


class _Graphs:
    """Capture the two graphs of a stage with one number of repeats; hold the tensors that they read and write."""

    def __init__(
        self, x: Tensor, weights: StageWeights, scales: Tensor | None, plan: StagePlan, pool: GraphPool
    ) -> None:
        self._plan, self._token = plan, object()
        self._weights = StageWeights._make(None if w is None else w.detach() for w in weights)
        self._x = x.detach().clone(memory_format=torch.contiguous_format)
        self._scales = None if scales is None else scales.clone()
        self._dy = torch.zeros_like(self._x)

        def forward() -> tuple[Tensor, list[Tensor]]:
            return stage_forward(self._x, self._weights, self._scales, plan)

        def backward() -> tuple[Tensor, Tensor]:
            dx, d_weights = stage_backward(self._dy, self._weights, self._scales, self._saved, plan)
            return dx, torch.cat([d.flatten() for d in d_weights if d is not None])

        with torch.no_grad(), torch.cuda.device_of(x):
            self._replay_forward, (self._y, self._saved) = pool.record(forward)
            self._replay_backward, (self._dx, self._d_weights) = pool.record(backward)

    def fit(self, x: Tensor, scales: Tensor | None, plan: StagePlan) -> bool:
        """Return whether the captured call had these shapes, dtypes, devices and arguments."""
        return plan == self._plan and _same_kind(x, self._x) and _same_kind(scales, self._scales)

    def require_unmoved(self, weights: StageWeights) -> None:
        """Check that every weight is at its captured address.

        Raises:
            RuntimeError: one is not.
        """
        for name, weight, captured in zip(StageWeights._fields, weights, self._weights, strict=True):
            address = None if weight is None else weight.data_ptr()
            if address != (None if captured is None else captured.data_ptr()):
                raise RuntimeError(
                    f"stage: {name} is not where it was when its CUDA graph was captured. Weights must be updated in "
                    "place; run without CUDA graphs (model.cuda_graphs: false) where they cannot be"
                )

    def forward(self, x: Tensor, scales: Tensor | None) -> tuple[Tensor, object]:
        """Replay the forward. Return (y, the token that `backward` requires)."""
        self._x.copy_(x)
        if scales is not None and self._scales is not None:
            self._scales.copy_(scales)
        self._token = object()
        self._replay_forward()
        return self._y.detach(), self._token

    def backward(self, dy: Tensor, token: object) -> tuple[Tensor, list[Tensor | None]]:
        """Replay the backward. Return (dx, the weights' gradients) as copies that the caller owns.

        Raises:
            RuntimeError: ``token`` is not from the last forward, or it has been used.
        """
        if token is not self._token:
            raise RuntimeError(
                "stage: with CUDA graphs each forward has one backward, which must run before the next forward "
                "overwrites what this one saved. Run without them (model.cuda_graphs: false) where that does not hold"
            )
        self._token = object()
        self._dy.copy_(dy)
        self._replay_backward()
        sizes = [0 if weight is None else weight.numel() for weight in self._weights]
        parts = self._d_weights.clone().split(sizes)
        shaped = zip(parts, self._weights, strict=True)
        return self._dx.clone(), [None if weight is None else part.view_as(weight) for part, weight in shaped]


class _Replayed(torch.autograd.Function):
    """Make the stage's two graphs one node of the autograd graph."""

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
        dx, d_weights = ctx.graphs.backward(dy, ctx.token)
        return dx, None, None, *d_weights


def _same_kind(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
