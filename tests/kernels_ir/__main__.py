"""Run this folder's tests under ttsem, which executes each launch of a kernel on the CPU. Arguments go to pytest.

run.sh makes the environment that this needs.
"""

import sys
from pathlib import Path

import pytest
from ttsem.sanitize import session


def main() -> None:
    here = str(Path(__file__).parent)
    with session() as run:
        code = pytest.main([here, "--confcutdir", here, "-p", "no:cacheprovider", *sys.argv[1:]])
    if run.races_unchecked:  # ttsem keeps a few million accesses of a launch; without all of them it finds no race
        sys.exit(f"test-kernels-ir: {run.races_unchecked} launches are too large to be checked for races")
    sys.exit(code)


if __name__ == "__main__":
    main()
