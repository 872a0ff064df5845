#!/usr/bin/env python
"""Draw the documentation's diagrams as SVG: ``method.svg`` and ``step.svg``. ``make docs`` runs this script.

The pictures have a white background of their own, so they look the same on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from sws_dist.learngene.plan import expansion_plan
from sws_dist.models.vit import PAPER_SCHEDULE

FOLDER = Path(__file__).parent
FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"
INK, FAINT, GREY, PALE = "#24292f", "#57606a", "#eaeef2", "#f6f8fa"
BLUE, GREEN = "#ddf4ff", "#dafbe1"
STAGE_COLOURS = ("#9ecbff", "#a5e3b5", "#ffe08a", "#ffb59a", "#d3b8f5")


class Drawing:
    """Collect the elements of one SVG picture. All positions and sizes are in pixels; y grows downwards."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._elements = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="{FONT}" fill="{INK}" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" '
            f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{FAINT}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="10" fill="white"/>',
        ]

    def box(
        self, x: float, y: float, width: float, height: float, fill: str = "white", *, dashed: bool = False
    ) -> None:
        """Draw a rectangle with round corners."""
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._elements.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{FAINT}"{dashes}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        lines: str | Sequence[str],
        *,
        size: int = 14,
        bold: bool = False,
        anchor: str = "middle",
        colour: str = INK,
    ) -> None:
        """Write lines of text, centred vertically on ``y``."""
        lines = [lines] if isinstance(lines, str) else lines
        leading = size * 1.25
        top = y - leading * (len(lines) - 1) / 2 + size * 0.35
        weight = ' font-weight="bold"' if bold else ""
        for number, line in enumerate(lines):
            self._elements.append(
                f'<text x="{x:g}" y="{top + number * leading:g}" font-size="{size}" text-anchor="{anchor}" '
                f'fill="{colour}"{weight}>{escape(line)}</text>'
            )

    def line(self, points: Sequence[tuple[float, float]], *, arrow: str = "", dashed: bool = False) -> None:
        """Draw a line through ``points``; ``arrow`` is empty, ``end`` or ``both``."""
        path = " ".join(f"{'L' if number else 'M'}{x:g} {y:g}" for number, (x, y) in enumerate(points))
        heads = ' marker-end="url(#head)"' if arrow else ""
        heads += ' marker-start="url(#head)"' if arrow == "both" else ""
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._elements.append(f'<path d="{path}" fill="none" stroke="{FAINT}" stroke-width="1.5"{heads}{dashes}/>')

    def svg(self) -> str:
        """Return the picture as text."""
        return "\n".join([*self._elements, "</svg>", ""])


# ---- the method ------------------------------------------------------------------------------------------------------

BOTTOM, LAYER_HEIGHT = 432, 19
DEPTHS = (6, 9, 12)


def method_picture() -> str:
    """Draw the way from the auxiliary model by its learngene to descendants of several depths."""
    picture = Drawing(900, 500, "Auxiliary model, learngene and descendants")
    for x, number, name, about in (
        (192, 1, "auxiliary model", "16 layers, 5 sets of weights"),
        (452, 2, "learngene", "the 5 layers: all that is kept"),
        (740, 3, "descendants", "any depth, fine-tuned for a few epochs"),
    ):
        picture.text(x, 26, f"{number}  {name}", size=18, bold=True)
        picture.text(x, 50, about, size=13, colour=FAINT)

    picture.box(14, 217, 80, 66, GREY)
    picture.text(54, 250, ["teacher", "(LeViT-384)"], size=13)
    picture.line([(94, 250), (142, 250)], arrow="end")
    picture.text(118, 238, "teaches", size=12, colour=FAINT)

    _stack(picture, 144, 96, list(enumerate(PAPER_SCHEDULE)))
    bottom = BOTTOM - 24
    for stage, repeats in enumerate(PAPER_SCHEDULE):
        middle = bottom - repeats * LAYER_HEIGHT / 2
        bottom -= repeats * LAYER_HEIGHT
        picture.text(248, middle, [f"stage {stage + 1}", f"{repeats} times"], size=13, anchor="start")

    picture.line([(320, 250), (392, 250)], arrow="end")
    picture.text(356, 222, ["one layer", "per stage"], size=13, colour=FAINT)
    _stack(picture, 404, 96, [(stage, 1) for stage in range(len(PAPER_SCHEDULE))], height=34)

    picture.line([(514, 250), (586, 250)], arrow="end")
    picture.text(550, 222, ["copy each to", "some layers"], size=13, colour=FAINT)
    for number, depth in enumerate(DEPTHS):
        x = 604 + 98 * number
        top = _stack(picture, x, 76, [(stage, 1) for stage in expansion_plan(PAPER_SCHEDULE, depth)])
        picture.text(x + 38, top - 14, f"{depth} layers", size=14)

    picture.box(144, 454, 34, 32, STAGE_COLOURS[0])
    picture.line([(144, 470), (178, 470)], dashed=True)
    picture.text(188, 470, "one layer that runs several times with the same weights", size=13, anchor="start")
    picture.box(588, 460, 34, 20, STAGE_COLOURS[0])
    picture.text(632, 470, "a layer with its own weights", size=13, anchor="start")
    return picture.svg()


def _stack(
    picture: Drawing,
    x: float,
    width: float,
    layers: Sequence[tuple[int, int]],
    *,
    height: float = LAYER_HEIGHT,
) -> float:
    """Draw a model with its input at the bottom.

    Args:
        layers: (stage, repeats) from the input to the output.
        height: of one layer.

    Returns:
        The y of the model's top.
    """
    y = BOTTOM - 24
    picture.box(x, y, width, 24, GREY)
    picture.text(x + width / 2, y + 12, "embedding", size=12, colour=FAINT)
    for stage, repeats in layers:
        y -= repeats * height
        picture.box(x, y, width, repeats * height, STAGE_COLOURS[stage])
        for repeat in range(1, repeats):
            picture.line([(x, y + repeat * height), (x + width, y + repeat * height)], dashed=True)
        for repeat in range(repeats):
            picture.text(x + width / 2, y + (repeat + 0.5) * height, str(stage + 1), size=13)
    y -= 24
    picture.box(x, y, width, 24, GREY)
    picture.text(x + width / 2, y + 12, "head", size=12, colour=FAINT)
    return y


# ---- a training step -------------------------------------------------------------------------------------------------

LANES = {
    "threads 0": (12, 98),
    "rank 0": (134, 196),
    "network": (358, 184),
    "rank 1": (570, 196),
    "threads 1": (790, 98),
}
"""Left edge and width of each column."""
ROW_HEIGHT, ROW_GAP, FIRST_ROW = 52, 18, 62


def step_picture() -> str:
    """Draw what two ranks, their input threads and the network between them do in one training step."""
    rows: list[tuple[Sequence[str], Sequence[str]]] = [
        (["take the next batch"], []),
        (["erase and mix images,", "teacher's logits"], []),
        (["forward, stage after stage;", "loss"], ["ZeRO-3: gather", "a stage's weights"]),
        (["backward, stage after stage"], ["average the gradients;", "ZeRO-3: gather weights"]),
        (["AdamW on its own shard;", "moving average"], ["ZeRO-1, 2: gather", "the new weights"]),
        (["status of all ranks after", "step s - 1: go on or stop"], []),
        (["send its own status", "after step s"], ["loss, signals,", "failures, times"]),
        (["end of an epoch, or a stop:", "evaluate, save"], ["sum the scores; each", "rank writes its shard"]),
    ]
    picture = Drawing(900, 622, "One training step on two ranks")
    for lane, title in (("rank 0", "rank 0"), ("network", "between the ranks"), ("rank 1", "rank 1")):
        x, width = LANES[lane]
        picture.text(x + width / 2, 28, title, size=17, bold=True)
    for lane in ("threads 0", "threads 1"):
        x, width = LANES[lane]
        picture.text(x + width / 2, 28, "its threads", size=15, bold=True)

    left = LANES["rank 0"][0] - 8
    right = sum(LANES["rank 1"]) + 8
    picture.box(left, FIRST_ROW - 9, right - left, 4 * (ROW_HEIGHT + ROW_GAP), PALE, dashed=True)
    centre = LANES["network"][0] + LANES["network"][1] / 2
    picture.text(
        centre, _row(0) + ROW_HEIGHT + ROW_GAP / 2, ["once for each", "micro-batch of step s"], size=14, colour=FAINT
    )

    for number, (own, shared) in enumerate(rows):
        y, is_last = _row(number), number == len(rows) - 1
        for lane in ("rank 0", "rank 1"):
            x, width = LANES[lane]
            picture.box(x, y, width, ROW_HEIGHT, BLUE, dashed=is_last)
            picture.text(x + width / 2, y + ROW_HEIGHT / 2, own)
            if number:
                picture.line([(x + width / 2, y - ROW_GAP), (x + width / 2, y - 1)], arrow="end")
        if shared:
            x, width = LANES["network"]
            picture.box(x, y, width, ROW_HEIGHT, GREEN, dashed=is_last)
            picture.text(x + width / 2, y + ROW_HEIGHT / 2, shared)
            picture.line([(sum(LANES["rank 0"]) + 1, y + ROW_HEIGHT / 2), (x - 1, y + ROW_HEIGHT / 2)], arrow="both")
            picture.line(
                [(x + width + 1, y + ROW_HEIGHT / 2), (LANES["rank 1"][0] - 1, y + ROW_HEIGHT / 2)], arrow="both"
            )

    middle = _row(0) + ROW_HEIGHT / 2
    for lane, edge, rank_edge in (
        ("threads 0", sum(LANES["threads 0"]), LANES["rank 0"][0]),
        ("threads 1", LANES["threads 1"][0], sum(LANES["rank 1"])),
    ):
        x, width = LANES[lane]
        picture.box(x, _row(0), width, _row(6) + ROW_HEIGHT - _row(0), GREY)
        work = ["draw and read", "the images of", "later batches;", "", "DALI decodes,", "crops and", "augments them"]
        picture.text(x + width / 2, _row(3) + ROW_HEIGHT / 2, work, size=12)
        inward = 1 if edge < rank_edge else -1
        picture.line([(edge + inward, middle), (rank_edge - inward, middle)], arrow="end")
    return picture.svg()


def _row(number: int) -> float:
    """Return the y of a row's top."""
    return FIRST_ROW + number * (ROW_HEIGHT + ROW_GAP)


PICTURES = {"method.svg": method_picture, "step.svg": step_picture}


def main() -> None:
    """Write all pictures beside this script."""
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw())
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
