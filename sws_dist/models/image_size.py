"""Fit models to their images: build them for their size where timm can, and say so where a model cannot take them."""

from __future__ import annotations

from typing import Any

import torch

from sws_dist.models.evaluation_mode import evaluation_mode
from sws_dist.models.vit import timm_config


def image_size_arguments(name: str, image_size: int) -> dict[str, int]:
    """Return the argument that builds the timm model ``name`` for square images; none if it takes images of any size.

    Args:
        image_size: height and width in pixels.

    Raises:
        ValueError: timm does not know the model.
    """
    about = timm_config(name)
    return {"img_size": image_size} if about is not None and about.fixed_input_size else {}


@torch.no_grad()
def require_image_size(model: Any, what: str, image_size: int) -> None:
    """Run one black image through ``model``, in evaluation mode, and look at its answer.

    Args:
        what: names the model in the message.
        image_size: height and width in pixels.

    Raises:
        ValueError: the model takes no images of this size (the message says which it is made for) or of three channels,
            or it answers with anything but the logits of its ``num_classes`` labels.
    """
    parameter = next(model.parameters())
    if (channels := getattr(model, "in_chans", None) or 3) != 3:
        raise ValueError(f"{what} takes images of {channels} channel(s) (in_chans); all images are read as RGB, in 3")
    image = torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
    try:
        with evaluation_mode(model):
            answer = model(image)
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError) as error:
        usual = usual_image_size(model)
        hint = f"; it is made for {usual}: set data.image_size (--image-size) to that" if usual else ""
        raise ValueError(
            f"{what} takes no images of {image_size} x {image_size} pixels ({error or type(error).__name__}){hint}"
        ) from None
    labels, found = getattr(model, "num_classes", None), getattr(answer, "shape", None)
    if not labels or found != (1, labels):
        shape = f"a {type(answer).__name__}" if found is None else f"an array of shape {list(found)}"
        raise ValueError(
            f"{what} answers one image with {shape}, and its num_classes is {labels}: it is no classifier, whose "
            "answer is [1, num_classes]"
        )


def usual_image_size(model: Any) -> int | None:
    """Return the height and width in pixels that a model was made for; None if it does not say it."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (None,))[-1]
