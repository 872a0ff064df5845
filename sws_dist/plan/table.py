"""Write a plan for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from sws_dist.plan.bill import PAPER, Bill
from sws_dist.plan.devices import Device
from sws_dist.plan.memory import Memory
from sws_dist.plan.run import Plan
from sws_dist.plan.speed import decoding_cores
from sws_dist.units import format_bytes, format_duration

DAY_S = 86_400


def plan_table(plan: Plan, device: Device) -> str:
    """Return the whole plan, one fact a line."""
    groups = _run(plan), _memory(plan, device), _traffic(plan), _time(plan, device), _bill(plan)
    return "\n\n".join("\n".join(lines) for group in groups if (lines := list(group)))


def _run(plan: Plan) -> Iterator[str]:
    shards, size = plan.sharding, plan.size
    yield f"model      {plan.model}, {size.parameters / 1e6:.2f} M parameters; stages run as: {plan.kernels}"
    yield (
        f"ranks      {plan.network.nodes} node(s) x {plan.network.ranks_a_node}, ZeRO-{shards.zero_stage}, "
        f"{shards.precision}: {shards.micro_batch} images x {shards.accumulation} micro-batch(es) a rank and step"
    )
    yield f"work       {plan.total_steps:,} steps, {plan.total_flops / 1e15:,.4g} PFLOP"
    for each in plan.left_out:
        yield f"left out   {each}"


def _memory(plan: Plan, device: Device) -> Iterator[str]:
    yield f"{'memory a rank':16}{'backward begins':>16}{'update':>12}"
    for field in fields(Memory):
        both = [getattr(moment, field.name) for moment in (plan.memory.backward, plan.memory.update)]
        if any(both):
            yield f"  {field.name:14}{format_bytes(both[0]):>16}{format_bytes(both[1]):>12}"
    yield f"  {'total':14}{format_bytes(plan.memory.backward.total):>16}{format_bytes(plan.memory.update.total):>12}"
    for name, num_bytes in (("offloaded", plan.memory.host), ("copy to save", plan.memory.checkpoint)):
        if num_bytes:
            yield f"  {name:14}{format_bytes(num_bytes):>16} of host memory"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield (
        f"  {verdict}: {device.name} has {format_bytes(device.memory_bytes)}, of which "
        f"{format_bytes(plan.memory_limit)} are used; the largest micro-batch that fits is {plan.largest_micro_batch}"
    )


def _traffic(plan: Plan) -> Iterator[str]:
    yield "traffic a step"
    for each in plan.collectives:
        yield (
            f"  {each.kind:15} {each.purpose:16} {format_bytes(each.num_bytes):>10} in {each.calls} call(s), "
            f"{format_bytes(each.wire_bytes(plan.sharding.ranks))} sent by each rank"
        )
    if not plan.collectives:
        yield "  none: there is one rank"


def _time(plan: Plan, device: Device) -> Iterator[str]:
    time, days, run_s = plan.time, plan.total_steps / DAY_S, plan.total_steps * plan.time.longest
    images = plan.sharding.ranks * plan.sharding.micro_batch * plan.sharding.accumulation / time.longest
    yield f"time       {1e3 * time.shortest:.1f} to {1e3 * time.longest:.1f} ms a step (traffic hidden or not)"
    yield f"           arithmetic {1e3 * time.arithmetic:.1f} ms, traffic {1e3 * time.network:.1f} ms"
    yield (
        f"           {days * time.shortest:.3g} to {days * time.longest:.3g} days ({format_duration(run_s)}), without "
        "evaluation and saving; "
        f"{days * time.longest * 24 * plan.sharding.ranks:.3g} GPU hours"
    )
    yield (
        f"input      {images:,.0f} images/s: {decoding_cores(images):.0f} CPU cores, if DALI decodes on CPUs as "
        "fast as where it was measured"
    )
    yield f"assumed    {100 * plan.speed.utilisation:.1f} % of the published rate; {plan.speed.reason}"
    yield f"           {device.source}"


def _bill(plan: Plan) -> Iterator[str]:
    bill = plan.bill
    if bill is None:
        return
    depths = ", ".join(map(str, bill.depths))
    yield f"bill of {len(bill.depths)} descendants of {depths} layers, in PFLOP"
    costs = {
        "teacher's training": bill.teacher_training,
        "auxiliary model": bill.auxiliary,
        "teacher's answers": bill.teaching,
        f"fine-tuning, {bill.budget.tuned} epochs each": bill.tuning,
        f"from random weights, {bill.budget.scratch} epochs each": bill.scratch,
    }
    for name, flops in costs.items():
        yield f"  {name:40}{flops / 1e15:>14,.4g}"
    yield from _ratios(bill)
    yield "untuned: for an auxiliary model that is trained at many depths (model.elastic)"


def _ratios(bill: Bill) -> Iterator[str]:
    yield f"{'random weights cost':42}{'here, FLOP':>12}{'in epochs':>12}{'paper':>8}"
    epochs = bill.epoch_ratios()
    for name, ratio in bill.ratios().items():
        paper = f"{PAPER[name]:.1f} x" if name in PAPER else ""
        yield f"  {name:40}{ratio:>10.1f} x{epochs[name]:>10.1f} x{paper:>8}"
