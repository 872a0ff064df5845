"""Map folders to import names; all other metadata stands in pyproject.toml.

``kernels/`` is imported as ``sws_kernels``, because PyPI's ``kernels`` is another project's name. ``configs/`` and
``launcher/`` stay at the top of a checkout, where people look for them; a wheel carries them inside ``sws_dist``, where
``sws_dist/source_tree.py`` finds them.
"""

from setuptools import find_packages, setup

PLACES = {"sws_kernels": "kernels", "sws_dist.configs": "configs", "sws_dist.launcher": "launcher"}

setup(
    packages=[*find_packages(include=["sws_dist", "sws_dist.*"]), *PLACES],
    package_dir=PLACES,
    package_data={
        "sws_dist": ["py.typed"],
        "sws_dist.configs": ["**/*.yaml", "**/*.json"],
        "sws_dist.launcher": ["slurm/*"],
    },
)
