"""Find what a forward and a backward pass keep in memory, by running them on tensors that have shapes and no data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sws_dist.config.schema import RunConfig
from sws_dist.models.losses import DistillationLoss


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one micro-batch on one rank, without weights and their gradients."""

    activations: int
    """The batch, and what autograd keeps of the forward pass for the backward pass."""
    workspace: int
    """Most that exists for a moment on top of them."""


def measure_pass(model: Any, config: RunConfig, micro_batch: int, dtype: torch.dtype, *, is_triton: bool) -> PassMemory:
    """Run one training pass of ``model`` without data, and follow every tensor from its birth to its end.

    What is counted is what PyTorch's operators return, so the scratch memory inside an operator is not. The reference
    path takes the fused attention of the CPU, which keeps for the backward pass what the ones of a GPU keep (flash,
    memory-efficient, cuDNN): queries, keys, values, the result, and a sum for each row. The Triton stage runs by the
    shapes that its operators declare.

    Args:
        model: the student on the meta device, with its kernels chosen; its tensors are replaced.
        micro_batch: number of images.
        dtype: the model's precision.
        is_triton: True if the Triton kernels run its stages.
    """
    device = torch.device("meta" if is_triton else "cpu")
    size, num_classes = config.data.image_size, model.num_classes
    model.to(dtype).train()
    with nullcontext() if is_triton else FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with LiveBytes((*model.parameters(), *model.buffers())) as live:
            images = torch.empty(micro_batch, 3, size, size, device=device)
            targets = torch.empty(micro_batch, num_classes, device=device)
            has_teacher = config.distill.teacher is not None or config.distill.logits is not None
            taught = torch.empty(micro_batch, num_classes, device=device, dtype=dtype) if has_teacher else None
            loss = DistillationLoss(config.distill)(model(images.to(dtype)), targets, taught).total
            activations = live.now
            loss.backward()
    return PassMemory(activations, live.peak - activations)


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors that operators return inside the block, as long as somebody holds them.

    Args:
        others: tensors whose memory does not count.
    """

    def __init__(self, others: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in others}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
