"""Plan one run: put together its size, memory, traffic, operations, time and bill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from sws_dist.build_models import (
    DTYPES,
    Flops,
    build_student,
    count_flops,
    count_layer,
    elastic_depth,
    num_layers,
    training_flops,
)
from sws_dist.config.lr_schedule import count_steps
from sws_dist.config.schema import MAX_BATCH, RunConfig
from sws_dist.data.sampler import TrainOrder
from sws_dist.distill.teacher import build_teacher, count_teacher_flops
from sws_dist.learngene.elastic import ElasticDepth
from sws_dist.models import SWSVisionTransformer
from sws_dist.models.flops import TRAIN_FACTOR
from sws_dist.models.kernel_backend import ALL_AUTO, choose_providers, model_obstacle, require_not_asked_for
from sws_dist.plan.bill import Bill, Budget, Costs, add_up
from sws_dist.plan.devices import HEADROOM, Backend, Device, SpeedAssumption, assume_utilisation
from sws_dist.plan.memory import RankMemory, rank_memory
from sws_dist.plan.sharding import ModelSize, Sharding
from sws_dist.plan.speed import StepTime, step_time
from sws_dist.plan.step_memory import PassMemory, measure_pass
from sws_dist.plan.traffic import Collective, Network, step_collectives


@dataclass(frozen=True)
class Request:
    """What is planned: a run, its shards, and the machines it is to run on."""

    config: RunConfig
    ds: dict[str, Any]
    """The resolved DeepSpeed config."""
    num_images: int
    num_classes: int
    nodes: int
    ranks_a_node: int
    device: Device
    utilisation: float | None = None
    """Share of the device's published rate; None takes what was measured."""
    network_bytes: float | None = None
    """Bytes a second between nodes, for each GPU; None takes what the device's server has."""
    headroom: float = HEADROOM
    depths: tuple[int, ...] = ()
    """Layers of the descendants of the bill; empty for no bill."""
    tuned_epochs: int = 10
    scratch_epochs: int | None = None
    """None: the auxiliary model's."""
    teacher_epochs: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything that is known of a run before it is queued. Sizes are in bytes, times in seconds."""

    model: str
    kernels: Backend
    size: ModelSize
    sharding: Sharding
    total_steps: int
    step_flops: float
    total_flops: float
    memory: RankMemory
    memory_limit: int
    largest_micro_batch: int
    collectives: tuple[Collective, ...]
    network: Network
    speed: SpeedAssumption
    rate: float
    """Operations a second that one device is assumed to reach."""
    time: StepTime
    bill: Bill | None
    left_out: tuple[str, ...]
    """What the run has and this plan does not count."""

    @property
    def wire_bytes(self) -> int:
        """Bytes that one rank sends in a step."""
        return sum(each.wire_bytes(self.sharding.ranks) for each in self.collectives)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.memory_limit

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain dictionaries and lists."""
        found = asdict(self)
        found["memory"]["peak"] = self.memory.peak
        found["wire_bytes"], found["fits"] = self.wire_bytes, self.fits
        if self.bill is not None:
            found["bill"] |= {"ratios": self.bill.ratios(), "epoch_ratios": self.bill.epoch_ratios()}
        return found


def plan_run(request: Request) -> Plan:
    """Plan a run.

    Raises:
        ValueError: a model that cannot be built, kernels that cannot run, or a bill of a model that is no auxiliary.
        RunError: a step needs more images than the run has.
    """
    config, device = request.config, request.device
    student = build_on_meta(config, request.num_classes)
    kernels = choose_backend(config, student)
    size = ModelSize.of(student)
    ranks = request.nodes * request.ranks_a_node
    sharding = Sharding.of(request.ds, ranks, is_ours=size.stages > 0)
    order = TrainOrder(request.num_images, config.train.seed, config.augment.num_repeats)
    total_steps = count_steps(config.train, order.epoch_size)
    flops, elastic = count_flops(config, request.num_classes), elastic_depth(config, student, order.epoch_size)
    teacher_flops = flops.teacher or 0
    counted = flops._replace(teacher=teacher_flops)
    total_flops = training_flops(counted, elastic, total_steps, config.train.global_batch)
    assert total_flops is not None
    step_flops = total_flops / total_steps
    if config.model.grad_checkpointing:  # the forward pass of each stage runs twice
        step_flops += (total_flops / total_steps - config.train.global_batch * teacher_flops) / TRAIN_FACTOR
    add_memory = partial(rank_memory, size, config=config, teacher=_count_teacher_parameters(config))
    measure = partial(pass_memory, config, request.num_classes, kernels, DTYPES[sharding.precision], elastic)
    memory = add_memory(sharding, measure(sharding.micro_batch))
    limit = int(device.memory_bytes * (1 - request.headroom))
    network = Network.of(device, request.nodes, request.ranks_a_node)
    if request.network_bytes is not None:
        network = replace(network, network_bytes=request.network_bytes)
    if request.utilisation is not None:
        speed = SpeedAssumption(request.utilisation, "as was asked for")
    else:
        speed = assume_utilisation(device, kernels, student.embed_dim if size.stages else None, sharding.precision)
    rate = speed.utilisation * device.flops(sharding.precision)
    collectives = tuple(step_collectives(size, sharding))
    return Plan(
        model=config.model.name,
        kernels=kernels,
        size=size,
        sharding=sharding,
        total_steps=total_steps,
        step_flops=step_flops,
        total_flops=total_flops,
        memory=memory,
        memory_limit=limit,
        largest_micro_batch=largest_batch(lambda micro: add_memory(sharding, measure(micro)).peak, limit),
        collectives=collectives,
        network=network,
        speed=speed,
        rate=rate,
        time=step_time(step_flops, collectives, network, rate),
        bill=plan_bill(request, student, size, counted, total_flops, total_steps) if request.depths else None,
        left_out=tuple(_left_out(config, sharding, counts_teacher=flops.teacher is not None)),
    )


def _count_teacher_parameters(config: RunConfig) -> int:
    """Return the number of the teacher's parameters; 0 where none runs."""
    if config.distill.teacher is None or config.distill.logits is not None:
        return 0
    with torch.device("meta"):
        return sum(p.numel() for p in build_teacher(config.distill, config.data.image_size).parameters())


def _left_out(config: RunConfig, sharding: Sharding, *, counts_teacher: bool) -> Iterator[str]:
    if not counts_teacher:
        yield "the teacher's operations, which torch cannot count"
    if config.optim.name == "muon":
        yield "Muon's orthogonalisation: its operations, and the exchange of matrices that ranks share"
    if config.model.operators != ALL_AUTO:
        yield "who computes what (model.operators): the speed is that of our own kernels"
    for key in sharding.unmodelled:
        yield f"what zero_optimization.{key} changes in memory and traffic"


def build_on_meta(config: RunConfig, num_classes: int) -> Any:
    """Build the student without memory."""
    with torch.device("meta"):
        return build_student(config, num_classes)


def choose_backend(config: RunConfig, student: Any) -> Backend:
    """Return how the stages will run on a GPU whose tensor cores know bf16, as ``select_kernels`` decides there.

    Raises:
        ValueError: kernels that were asked for and cannot run the model.
    """
    wanted = config.model.kernels
    obstacle = "they were not asked for" if wanted == "reference" else model_obstacle(student)
    if obstacle is None:
        return "triton, stages graphed" if config.model.cuda_graphs else "triton"
    require_not_asked_for(wanted, config.model.operators, obstacle)
    return "compile timm, cuDNN" if config.model.compile else "eager timm"


def pass_memory(
    config: RunConfig,
    num_classes: int,
    kernels: Backend,
    dtype: torch.dtype,
    elastic: ElasticDepth | None,
    micro_batch: int,
) -> PassMemory:
    """Return what one micro-batch keeps in memory on a GPU, at the largest depth that is drawn.

    Raises:
        ValueError: a provider of an operator that was asked for and cannot run there.
    """
    model = build_on_meta(config, num_classes)
    is_triton = kernels.startswith("triton")
    if is_triton:
        chosen = choose_providers(config.model.kernels, config.model.operators, torch.device("cuda"), dtype)
        model.use_kernels("triton", chosen)
    if config.model.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if elastic is not None:
        model.set_repeats(elastic.repeats(elastic.depths[-1]))
    return measure_pass(model, config, micro_batch, dtype, is_triton=is_triton)


def largest_batch(peak: Any, limit: int) -> int:
    """Return the largest micro-batch whose peak is within ``limit``; 0 if not even one image is.

    Activations grow evenly with the batch, so two sizes say what an image takes; the result is tried once more.
    """
    few, many = 8, 16
    an_image = (peak(many) - peak(few)) / (many - few)
    if an_image <= 0:  # the update is the peak of both: activations do not count yet
        few, many = 256, 512
        an_image = max(1.0, (peak(many) - peak(few)) / (many - few))
    largest = min(MAX_BATCH, max(0, int(few + (limit - peak(few)) / an_image)))
    while largest > 0 and peak(largest) > limit:
        largest -= max(1, largest // 100)
    return largest


def plan_bill(
    request: Request, student: Any, size: ModelSize, flops: Flops, total_flops: int, total_steps: int
) -> Bill:
    """Add up the bill of the family that ``request`` asks for.

    Raises:
        ValueError: the model is no auxiliary model of stages.
    """
    config = request.config
    if not (isinstance(student, SWSVisionTransformer) and student.is_shared and size.stages > 1):
        raise ValueError(f"--depths: {config.model.name} is no auxiliary model, whose stages share weights: no bill")
    own = num_layers(student)
    assert own is not None
    assert flops.teacher is not None
    # A teacher whose logits are stored has given them once for each image that is shown: as much as beside the run.
    teacher = count_teacher_flops(config.distill, config.data.image_size) if config.distill.logits else flops.teacher
    if teacher is None:
        raise ValueError(f"--depths: torch cannot count the operations of {config.distill.teacher}: no bill")
    shown = total_steps * config.train.global_batch
    costs = Costs(
        auxiliary=(total_flops / shown - flops.teacher) / TRAIN_FACTOR,
        own=flops.student,
        own_depth=own,
        layer=count_layer(config, request.num_classes),
        teacher=teacher,
        parameters=size.parameters,
        stages=size.stages,
        layer_parameters=size.stage,
    )
    epochs = config.train.epochs
    scratch = epochs if request.scratch_epochs is None else request.scratch_epochs
    budget = Budget(request.num_images, epochs, request.tuned_epochs, scratch, request.teacher_epochs)
    return add_up(costs, request.depths, budget)


def scaling(plan: Plan, counts: Sequence[int], micro_batch: int, ranks_a_node: int = 8) -> list[tuple[int, StepTime]]:
    """Return the step time on other numbers of ranks, each with ``micro_batch`` images and no accumulation."""
    found = []
    for ranks in counts:
        inside = min(ranks, ranks_a_node)
        network = replace(plan.network, nodes=ranks // inside, ranks_a_node=inside)
        sharding = replace(plan.sharding, ranks=ranks, micro_batch=micro_batch, accumulation=1)
        an_image = plan.step_flops / (plan.sharding.ranks * plan.sharding.micro_batch * plan.sharding.accumulation)
        flops = an_image * ranks * micro_batch
        found.append((ranks, step_time(flops, step_collectives(plan.size, sharding), network, plan.rate)))
    return found
