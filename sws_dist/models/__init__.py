"""Models: importing this package registers ours with timm's ``create_model``."""

from sws_dist.models.vit import Stage, SWSVisionTransformer, create_model, geometry

__all__ = ["SWSVisionTransformer", "Stage", "create_model", "geometry"]
