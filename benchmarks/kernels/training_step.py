"""Define the cases of a training step: forward, loss, backward, AdamW and EMA, with and without a teacher.

It is the trainer's step on one GPU without DeepSpeed: bf16 weights, their fp32 masters, which AdamW updates and the
average follows, and the paper's drop-path. Every provider trains the same model from the same weights.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.measure import Ceilings, Machine, Row, Size
from sws_dist.config.schema import DistillConfig
from sws_dist.models import create_model
from sws_dist.models.flops import TRAIN_FACTOR, forward_flops
from sws_dist.models.kernel_backend import enable_cuda_graphs, select_kernels
from sws_dist.models.losses import DistillationLoss, LossParts
from sws_dist.optim import parameter_groups

DROP_PATH, LEARNING_RATE, WEIGHT_DECAY, EMA_DECAY = 0.1, 5e-4, 0.05, 0.99996
CHECKED_STEPS = 5
Step = Callable[[], Tensor]  # runs one step and returns the loss before it


@dataclass(frozen=True)
class Provider:
    """Say who runs the stages, what is compiled or graphed, and which attention PyTorch takes."""

    kernels: Literal["reference", "triton"]
    compile: bool = False
    graph: Literal["stages", "step"] | None = None
    attention: SDPBackend | None = None

    def context(self) -> AbstractContextManager:
        return nullcontext() if self.attention is None else sdpa_kernel(self.attention)


PROVIDERS = {
    "triton": Provider("triton"),
    "triton, stages graphed": Provider("triton", graph="stages"),
    "triton, step graphed": Provider("triton", graph="step"),
    "triton, rest compiled": Provider("triton", compile=True),
    "eager timm": Provider("reference"),
    "compile timm, flash": Provider("reference", compile=True, attention=SDPBackend.FLASH_ATTENTION),
    "compile timm, cuDNN": Provider("reference", compile=True, attention=SDPBackend.CUDNN_ATTENTION),
}


def build(size: Size, machine: Machine) -> nn.Module:
    """Return the auxiliary model, with the same weights at every call."""
    torch.manual_seed(0)
    geometry = {"img_size": size.image, "patch_size": size.patch, "embed_dim": size.width, "num_heads": size.heads}
    schedule = {"schedule": size.schedule, "drop_path_rate": DROP_PATH, "num_classes": size.num_classes}
    return create_model("sws_vit", **geometry, **schedule).to(machine.device, machine.dtype)


def build_teacher(size: Size) -> nn.Module:
    return create_model(size.teacher, num_classes=size.num_classes).eval().requires_grad_(False)


class TrainingStep:
    """Hold a model, its optimizer and one batch. A call runs one step and returns the loss before it."""

    def __init__(self, size: Size, machine: Machine, provider: Provider, teacher: bool) -> None:
        torch.manual_seed(1)
        self.images = machine.normal(size.batch, 3, size.image, size.image)
        self.labels = torch.randint(size.num_classes, (size.batch,), device=machine.device)
        self.model = build(size, machine)
        if provider.kernels == "triton":
            select_kernels("triton", self.model, torch.device(machine.device), machine.dtype)
        if provider.graph == "stages":
            enable_cuda_graphs(self.model, torch.device(machine.device))
        self.forward: Callable[[Tensor], Tensor] = self.model
        self.loss: Callable[..., LossParts] = DistillationLoss(DistillConfig())
        self.teacher: Callable[[Tensor], Tensor] | None = None
        if teacher:
            self.teacher = build_teacher(size).to(machine.device, machine.dtype)
            self._teach()  # LeViT stores its attention biases at the first call; they must not lie in a graph's memory
        if provider.compile:
            self.forward = machine.compile(self.model, cuda_graphs=True)
            self.loss = machine.compile(self.loss, cuda_graphs=True)
            self.teacher = self.teacher and machine.compile(self.teacher, cuda_graphs=True)
        self.compiled = provider.compile
        self.weights = [p for group in parameter_groups(self.model, WEIGHT_DECAY) for p in group["params"]]
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.weights]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.average = [master.detach().clone() for master in self.masters]
        self.optimizer = torch.optim.AdamW(self._groups(), lr=LEARNING_RATE, fused=True, capturable=self._on_gpu)

    @property
    def _on_gpu(self) -> bool:
        return self.images.is_cuda

    def _groups(self) -> list[dict]:
        master_of = dict(zip(map(id, self.weights), self.masters, strict=True))
        groups = parameter_groups(self.model, WEIGHT_DECAY)
        return [group | {"params": [master_of[id(p)] for p in group["params"]]} for group in groups]

    def __call__(self) -> Tensor:
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        teacher_logits = None if self.teacher is None else self._teach()
        loss = self.loss(self.forward(self.images), self.labels, teacher_logits).total
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_([master.grad for master in self.masters], [p.grad for p in self.weights])
            for weight in self.weights:
                weight.grad = None
            self.optimizer.step()
            torch._foreach_lerp_(self.average, self.masters, 1 - EMA_DECAY)
            torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()

    @torch.no_grad()
    def _teach(self) -> Tensor:
        return self.teacher(self.images)


def in_one_graph(step: Step) -> Step:
    """Capture the whole step as one CUDA graph, which shows what is left when no launch costs anything."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and makes the optimizer's state, which capture does not allow
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay(_alive: Step = step) -> Tensor:  # the graph does not own the tensors that it reads
        graph.replay()
        return loss

    return replay


def first_losses(step: Step) -> list[float]:
    torch.manual_seed(2)
    return [step().item() for _ in range(CHECKED_STEPS)]


@cache
def exact_losses(size: Size, device: str, teacher: bool) -> list[float]:
    """Return the first losses of PyTorch in fp32."""
    return first_losses(TrainingStep(size, Machine(device, torch.float32), PROVIDERS["eager timm"], teacher))


@dataclass(frozen=True)
class StepCase:
    """Hold one model's training step. Its work is the model's arithmetic, and the teacher's where there is one."""

    size: Size
    teacher: bool
    tolerance: float = 0.05  # of the loss after each of the first steps, against fp32: drop-path draws differ

    operator = "training_step"
    providers = PROVIDERS

    @property
    def label(self) -> str:
        return f"{self.size.name}, batch {self.size.batch}{f', teacher {self.size.teacher}' if self.teacher else ''}"

    def measure(self, provider: str, machine: Machine, ceilings: Ceilings) -> list[Row]:
        """Return one row.

        Raises:
            ValueError: the losses of the first steps are not those of PyTorch in fp32.
        """
        chosen = PROVIDERS[provider]
        if chosen.graph is not None and machine.device != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, not {machine.device}")
        exact = exact_losses(self.size, machine.device, self.teacher)
        machine.fresh()
        empty = machine.reserved_bytes()
        with chosen.context():
            step: Step = TrainingStep(self.size, machine, chosen, self.teacher)
            for number, (got, want) in enumerate(zip(first_losses(step), exact, strict=True)):
                if not abs(got - want) <= self.tolerance * abs(want):
                    raise ValueError(f"the loss before step {number} is {got:.4f}, in fp32 {want:.4f}; not timed")
            if chosen.graph == "step":
                step = in_one_graph(step)
            machine.fresh(keep_code=True)  # what compiling and tuning took does not count
            ms = machine.wall_ms(step, calls=30 if machine.device == "cuda" else 1)
        row = {"pass": "step", "ms": ms, "images_per_s": 1e3 * self.size.batch / ms}
        row |= ceilings.rates(ms, num_flops=self._flops())
        if machine.device == "cuda":  # reserved, not allocated: a CUDA graph's memory is its own between its runs
            row["peak_bytes"] = machine.reserved_bytes(peak=True) - empty
        return [row]

    def _flops(self) -> int:
        meta = Machine("meta", torch.float32)
        student = forward_flops(partial(build, self.size, meta), self.size.image)
        teacher = forward_flops(partial(build_teacher, self.size), self.size.image) if self.teacher else 0
        return self.size.batch * (TRAIN_FACTOR * student + teacher)


def cases(machine: Machine, size: Size) -> Iterator[StepCase]:
    yield StepCase(size, teacher=False)
    yield StepCase(size, teacher=True)


def warm_up(machine: Machine, size: Size) -> None:
    """Run what is compiled, without a teacher, so that Inductor's cache on disk holds its code. Nothing is timed."""
    for name, provider in PROVIDERS.items():
        if provider.compile:
            machine.fresh()
            with provider.context():
                step = TrainingStep(size, machine, provider, teacher=False)
                for _ in range(CHECKED_STEPS):
                    step()
            machine.synchronize()
            print(f"{name} of {size.name} has run", flush=True)
