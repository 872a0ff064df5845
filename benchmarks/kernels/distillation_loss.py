"""Define the cases of PyTorch's distillation loss, to see whether a kernel could be worth it (docs/kernels.md)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.measure import Machine, Size
from benchmarks.kernels.operator_case import OperatorCase, Provider, label, tupled, work
from sws_dist.config.schema import DistillConfig
from sws_dist.models.losses import DistillationLoss


def cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    shape = (size.batch, size.num_classes)
    teacher_logits = machine.normal(*shape)
    targets = machine.normal(*shape).softmax(dim=1).float()
    loss = DistillationLoss(DistillConfig())

    def reference(logits: Tensor) -> Tensor:
        return loss(logits, targets, teacher_logits).total

    logits = size.batch * size.num_classes * machine.dtype.itemsize
    yield OperatorCase(
        operator="distillation_loss",
        label=label(machine, *shape),
        inputs=lambda: ([machine.normal(*shape)], [torch.ones((), device=machine.device)]),
        providers={
            "eager": Provider(tupled(reference)),
            "compile": Provider(tupled(machine.compile(reference))),
        },
        reference=tupled(reference),
        num_bytes=work(2 * logits, 3 * logits),  # both logits are read, then read again and one gradient written
    )
