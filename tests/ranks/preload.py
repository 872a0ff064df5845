"""Import once, in the server that ranks are forked from, what every rank would import for itself.

Nothing here may compute: a fork copies only the thread that calls it, so the server must never start another one.
"""

import gc
import importlib

import pytest  # noqa: F401  test modules hold the bodies that ranks run
import setuptools  # noqa: F401  torch's extension builder imports it with a patched distutils
import timm  # noqa: F401
import torch._dynamo  # noqa: F401  torch's optimizers import it in their first step
from PIL import Image

import sws_dist.trainer  # noqa: F401
import sws_kernels  # noqa: F401

# DeepSpeed imports these when it builds an engine; the first one alone takes a second.
for module in (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "torch.utils.tensorboard",
):
    importlib.import_module(module)
Image.init()
# What is imported stays: a collection in a rank would otherwise write to, and so copy, every page of it.
gc.collect()
gc.freeze()
