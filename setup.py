"""Packaging. The folder ``kernels/`` is imported as ``sws_kernels``: PyPI's ``kernels`` is another project's name."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="sws-dist",
    version="0.1.0",
    description="Distributed training of vision transformers with Stage-wise Weight Sharing (SWS)",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["sws_dist", "sws_dist.*"]), "sws_kernels"],
    package_dir={"sws_kernels": "kernels"},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "triton>=3.6",
        "timm>=1.0.20",
        "safetensors",
        "tensorboard",
        "ninja",
        "numpy",
        "pillow",
        "psutil",
        "pydantic>=2",
        "pyyaml",
        "tqdm",
    ],
    extras_require={
        # DALI's package is named after the CUDA version; either one also runs its CPU backend without a GPU.
        "dali": ["nvidia-dali-cuda130>=2.0"],
        "dali-cuda12": ["nvidia-dali-cuda120>=1.50"],
        "quickstart": ["scikit-learn", "matplotlib"],
        "dev": ["pytest", "pytest-xdist", "ruff", "mypy", "types-PyYAML", "types-tqdm"],
    },
)
