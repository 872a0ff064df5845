"""Share what all commands need: a parser that keeps the help's layout, options, results, errors without tracebacks.

What a command was asked for (scores, a job's number, a script) goes to standard output through ``print_result``, also
under ``--quiet``. All other messages go through ``logging``, and ``--quiet`` and ``--debug`` choose among them.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sws_dist.config.paths import expand_path
from sws_dist.config.schema import (
    DEFAULT_NUM_THREADS,
    IMAGE_SIZES,
    MAX_BATCH,
    MAX_LAYERS,
    MAX_SEED,
    MAX_THREADS,
    RunConfig,
)
from sws_dist.distributed.launch_env import ANY_RANK, forget_ranks, local_rank, rank
from sws_dist.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, ConfigError, RunError, Stopped, exit_now
from sws_dist.logging.console import setup_console
from sws_dist.zero.config import require_whole_images

if TYPE_CHECKING:
    from sws_dist.data.tar_shards import SampleKeys

_HEAD_START_S = 2.0

log = logging.getLogger(__name__)


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return an argument parser whose help is the command's docstring, with ``--quiet`` and ``--debug``.

    Every option of ``type=Path`` is expanded as the paths in a config are.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.register("type", Path, lambda text: Path(expanded(text)))
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quiet", action="store_true", help="print results, warnings and errors only")
    level.add_argument("--debug", action="store_true", help="print details, and tracebacks of errors")
    return parser


def whole_number(least: int = 1, most: int = 10_000_000) -> Callable[[str], int]:
    """Return an argparse type: a whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        return int(_parse_number(text, int, least, most))

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """Return an argparse type: a number from ``least`` to ``most``."""
    return lambda text: _parse_number(text, float, least, most)


def _parse_number(text: str, kind: type[int] | type[float], least: float, most: float) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = kind(least) - 1
    if not least <= value <= most:
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r}: expected a {name} from {least} to {most}")
    return value


BATCH_SIZE, DEPTH, IMAGE_SIZE = whole_number(1, MAX_BATCH), whole_number(1, MAX_LAYERS), whole_number(*IMAGE_SIZES)
NUM_THREADS, SEED = whole_number(1, MAX_THREADS), whole_number(0, MAX_SEED)
"""Argparse types with the ranges of the config keys of these names."""


def parse_depths(text: str) -> tuple[int, ...]:
    """Parse the depths of descendants, an argparse type: ``6,9,12`` or ``6-15``."""
    depths: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r}: expected depths such as 6,9,12 or 6-15")
        depths += range(int(found[1]), min(int(found[2] or found[1]), MAX_LAYERS + 1) + 1)
    if not depths or min(depths) < 1 or max(depths) > MAX_LAYERS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected depths from 1 to {MAX_LAYERS}, the smaller one first")
    return tuple(depths)


def add_config_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--config`` and ``--set``, which every command that reads a run config has."""
    parser.add_argument(
        "--config",
        type=Path,
        required=required,
        help="what to train: a YAML file, or the name of a shipped config (auxiliary_small, quickstart/teacher, ...)",
    )
    add_set_option(parser)


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``, whose values are ``overrides`` of ``load_config``."""
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override a config key; repeatable",
    )


def add_deepspeed_option(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--deepspeed_config``, spelled as DeepSpeed does."""
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        required=required,
        help="how it is sharded: a JSON file, or the name of a shipped config (zero2_bf16, ...)",
    )


def add_micro_batch_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--batch``; ``micro_batch_of`` reads it."""
    parser.add_argument(
        "--batch",
        type=BATCH_SIZE,
        help="images in a micro-batch of training: the global batch / (ranks x accumulation) (default: all of it)",
    )


def micro_batch_of(args: argparse.Namespace, config: RunConfig) -> int:
    """Return the number of images of a micro-batch that ``--batch`` asks for."""
    global_batch = config.train.global_batch
    micro: int = args.batch or global_batch
    if global_batch % micro or micro > MAX_BATCH:
        raise ConfigError(
            f"--batch {micro}: expected a divisor of train.global_batch {global_batch}, at most {MAX_BATCH}"
        )
    require_whole_images(micro, config.augment.num_crops)
    return micro


def add_num_threads_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--num-threads``, for commands that read images without a run config."""
    parser.add_argument(
        "--num-threads",
        type=NUM_THREADS,
        default=DEFAULT_NUM_THREADS,
        help="threads of one rank that decode images (default %(default)s)",
    )


def add_shard_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--image-extensions`` and ``--label-key``; ``shard_keys_of`` reads them."""
    parser.add_argument(
        "--image-extensions", nargs="+", metavar="EXT", help="of a sample in tar shards, as in data.image_extensions"
    )
    parser.add_argument("--label-key", help="of a sample's .json, as in data.label_key (default label)")


def shard_keys_of(args: argparse.Namespace) -> SampleKeys:
    """Return how the images and labels of samples in tar shards are called."""
    from sws_dist.data.tar_shards import DEFAULT_KEYS, SampleKeys

    extensions = tuple(args.image_extensions or DEFAULT_KEYS.image_extensions)
    return SampleKeys(extensions, args.label_key or DEFAULT_KEYS.label_key)


def add_local_rank_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--local_rank``, which DeepSpeed's launcher appends; the environment says the same."""
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def parse_args(parser: argparse.ArgumentParser, one_process: bool = False) -> argparse.Namespace:
    """Parse the command line, and show the log as it asks for.

    Args:
        one_process: the command is never one rank among several. A RANK in its environment is not its own, and would
            hide what it has to say.
    """
    args = parser.parse_args()
    if one_process:
        forget_ranks(os.environ)
    setup_console(logging.WARNING if args.quiet else logging.DEBUG if args.debug else logging.INFO)
    return args


def expanded(text: str) -> str:
    """Expand ``~`` and ``$VARIABLE`` in the value of an option that takes a path."""
    try:
        return expand_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def print_result(text: str) -> None:
    """Print what the command was asked for, on rank 0, whatever ``--quiet`` says."""
    if rank() == 0:
        print(text, flush=True)


def run_command(main: Callable[[], None]) -> None:
    """Call ``main``; an error that a user can mend becomes one message and exit code 1 on every rank.

    A run that was told to stop exits with ``EXIT_REQUEUE``. Any other exception is a bug and keeps its traceback.
    """
    setup_console()
    try:
        main()
    except Stopped as stopped:
        log.warning("%s; start again with --resume auto", stopped)
        exit_now(EXIT_REQUEUE)
    except KeyboardInterrupt:
        exit_now(EXIT_INTERRUPTED)
    except (ValueError, OSError, RunError) as error:
        if _reports(error):
            log.error("%s", error, extra=ANY_RANK, exc_info=log.isEnabledFor(logging.DEBUG))
        elif isinstance(error, (ConfigError, RunError)):
            time.sleep(_HEAD_START_S)  # launchers end all ranks when one leaves: let the one that reports be the first
        _exit_failed()
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("nvidia"):
            log.error(
                "DALI, which reads images, is missing: pip install 'sws-dist[dali]', or [dali-cuda12] for CUDA 12"
            )
        else:  # a bug
            traceback.print_exc()
        _exit_failed()


def _exit_failed() -> NoReturn:
    """Exit with code 1. A SLURM job finds out by a file: srun ends the other ranks, and passes on the highest code."""
    if file := os.environ.get("SWS_FAILED"):
        with suppress(OSError):
            Path(file).touch()
    exit_now(1)


def _reports(error: Exception) -> bool:
    """Return True if it is for this rank to report ``error``."""
    if isinstance(error, RunError):  # all ranks know of it
        return rank() == 0
    if isinstance(error, ConfigError):  # each node reads its configs for itself
        return local_rank() == 0
    return True  # this rank met it on its own
