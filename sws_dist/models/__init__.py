"""Models: importing this package registers ours with timm's ``create_model``."""

from sws_dist.models.geometry import geometry
from sws_dist.models.tleg import LinearStage, TLEGVisionTransformer
from sws_dist.models.vit import Stage, SWSVisionTransformer, branch_scale, create_model

__all__ = [
    "LinearStage",
    "SWSVisionTransformer",
    "Stage",
    "TLEGVisionTransformer",
    "branch_scale",
    "create_model",
    "geometry",
]
