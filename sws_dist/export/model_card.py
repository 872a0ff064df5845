"""Write the model card: ``README.md`` with what the Hub reads at its top, and what the model is and comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from sws_dist.export.origin import describe_origin
from sws_dist.export.source import ExportSource

_LICENSE_HINT = "# license: yours to choose, see https://huggingface.co/docs/hub/repositories-licenses"
_MOST_NAMES = 20
"""Labels that are listed by name."""


def write_card(
    source: ExportSource, title: str, license_id: str | None, files: Mapping[str, str], measured: Mapping[str, str]
) -> str:
    """Return the text of the model card.

    Args:
        license_id: the Hub's name of the license; None leaves the field to the user.
        files: name of each file -> what it is, and how it was checked.
        measured: what this export has measured -> the figure.
    """
    config, about = source.config, source.config["pretrained_cfg"]
    channels, height, width = about["input_size"]
    millions = sum(parameter.numel() for parameter in source.model.parameters()) / 1e6
    rows = {
        "model": f"`{config['architecture']}` of timm{_geometry(config['model_args'])}, {millions:.2f} M parameters",
        "classes": _classes(config),
        "images": f"{channels} x {height} x {width}: the centre {100 * about['crop_pct']:g} % of "
        f"{'both sides, made equal' if about['crop_mode'] == 'squash' else 'the shorter side'} "
        f"({about['interpolation']}); mean {_numbers(about['mean'])}, std {_numbers(about['std'])}",
        **describe_origin(source),
        **measured,
    }
    head: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "sws-dist"],
    }
    if license_id:
        head["license"] = license_id
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).rstrip(),
            *([] if license_id else [_LICENSE_HINT]),
            "---",
            "",
            f"# {title}",
            "",
            *_table(("", ""), rows),
            "",
            "```python",
            "import timm",
            "from PIL import Image",
            "",
            'model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # or hf-hub:OWNER/NAME',
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            'probabilities = model(transform(Image.open("image.jpg").convert("RGB"))[None]).softmax(1)',
            "```",
            "",
            *_table(("file", "what it is"), {f"`{name}`": text for name, text in files.items()}),
            "",
            "Written by `sws export`, which compared each file with the model.",
            "",
        ]
    )


def _geometry(arguments: Mapping[str, Any]) -> str:
    known = {"depth": "layers", "embed_dim": "wide", "num_heads": "heads"}
    return "".join(f", {arguments[key]} {word}" for key, word in known.items() if key in arguments)


def _classes(config: Mapping[str, Any]) -> str:
    names = config.get("label_names") or []
    if not names:
        return str(config["num_classes"])
    more = ", ..." if len(names) > _MOST_NAMES else ""
    return f"{len(names)}: {', '.join(names[:_MOST_NAMES])}{more}"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _table(head: Sequence[str], rows: Mapping[str, str]) -> list[str]:
    """Return a table of Markdown; what stands in a cell cannot end it."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows.items()]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {first} | {second} |" for first, second in cells)]
