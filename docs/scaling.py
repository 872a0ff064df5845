#!/usr/bin/env python
"""Draw ``scaling.png``, and print the bills of docs/scaling.md. ``make docs`` runs this script.

Everything comes from ``sws_dist/plan``; nothing is measured here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sws_dist.config.loader import load_config
from sws_dist.plan.bill import PAPER
from sws_dist.plan.devices import DEVICES
from sws_dist.plan.run import Plan, Request, plan_run, scaling
from sws_dist.zero.config import resolve_deepspeed_config

PICTURE = Path(__file__).with_name("scaling.png")
IMAGENET = (1_281_167, 1000)
"""Training images and labels of ImageNet-1K."""
RANKS = [2**power for power in range(11)]
DEPTHS = tuple(range(6, 16))
STAGES = {0: "#888888", 2: "#1b6ca8", 3: "#e08e2b"}


def plan(size: str, stage: int, *, tuned: int = 10, depths: tuple[int, ...] = (), scratch: int | None = None) -> Plan:
    """Plan the auxiliary model of one size, without its teacher's memory, on one H100."""
    config = load_config(f"auxiliary_{size}")
    ds = resolve_deepspeed_config({"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}, config, 1)
    request = Request(config, ds, *IMAGENET, 1, 1, DEVICES["h100"], depths=depths, tuned_epochs=tuned)
    return plan_run(replace(request, scratch_epochs=scratch))


def draw() -> None:
    """Draw the share of linear speed-up against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axes, micro_batch in zip(both, (256, 32), strict=True):
        for stage, colour in STAGES.items():
            times = scaling(plan("small", stage), RANKS, micro_batch)
            hidden = [100 * time.arithmetic / time.shortest for _, time in times]
            exposed = [100 * time.arithmetic / time.longest for _, time in times]
            axes.fill_between(RANKS, exposed, hidden, color=colour, alpha=0.25)
            axes.plot(RANKS, exposed, color=colour, label=f"ZeRO-{stage}")
        axes.set(
            xscale="log", xlabel="H100 GPUs, 8 a node", title=f"{micro_batch} images a GPU and step", ylim=(0, 103)
        )
        axes.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        axes.grid(alpha=0.3)
    both[0].set(ylabel="% of linear speed-up")
    both[0].legend(title="line: no traffic hidden, edge: all", loc="lower left")
    figure.suptitle("Auxiliary ViT-S, bf16: arithmetic's share of a step, as planned")
    figure.savefig(PICTURE, dpi=110)
    pyplot.close(figure)


def bill_rows() -> list[str]:
    """Return the table of the bills: what random weights cost, relative to the method."""
    rows = ["| size | counted in | total training | the same, untuned | stored parameters | pre-training |"]
    rows.append("|---|---|--:|--:|--:|--:|")
    named = " | ".join(f"{PAPER[name]:.1f} x" if name in PAPER else "" for name in ("total training", "untuned"))
    rows.append(f"| paper | epochs | {named} | {PAPER['stored parameters']:.0f} x | {PAPER['pre-training']:.0f} x |")
    for size in ("tiny", "small", "base"):
        bill = plan(size, 2, depths=DEPTHS).bill
        assert bill is not None
        for unit, ratios in (("epochs", bill.epoch_ratios()), ("operations", bill.ratios())):
            cells = " | ".join(f"{ratio:.1f} x" for ratio in ratios.values())
            rows.append(f"| {size} | {unit} | {cells} |")
    return rows


def main() -> None:
    """Draw the picture, and print the table."""
    draw()
    print(f"wrote docs/{PICTURE.name}")
    print("\n".join(bill_rows()))
    for number in (1, 2, 3, 5, 10):
        bill = plan("small", 2, depths=DEPTHS[-number:] if number < 10 else DEPTHS).bill
        assert bill is not None
        print(number, {name: round(ratio, 1) for name, ratio in bill.ratios().items()})


if __name__ == "__main__":
    main()
