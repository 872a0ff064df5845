"""Plan the runs of a family: a teacher, auxiliary models, and at some depths descendants beside their rivals.

    FOLDER/teacher                        the ancestry model
    FOLDER/auxiliary, FOLDER/untaught     auxiliary models that are trained at many depths, with and without the teacher
    FOLDER/fixed                          trained at its own depth alone, as in the paper
    FOLDER/tleg, FOLDER/unshared          rivals of the method: TLEG, and a model whose layers are picked
    FOLDER/{fixed,tleg,unshared}/scaled.json   scores of their descendants with scaled branches
    FOLDER/depthD/expanded.safetensors    a descendant as it leaves the learngene
    FOLDER/depthD/tuned                   the same, fine-tuned
    FOLDER/depthD/scratch                 random weights, fine-tuning's recipe
    FOLDER/depthD/scratch_full            random weights, the auxiliary model's budget
    FOLDER/depthD/scratch_taught          the same, with the teacher

Every run is a command that a user could give. ``sws report`` reads the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sws_dist.cli.commands import Command, perform, sws, train_command
from sws_dist.config.paths import escape_path
from sws_dist.progress import track

ONE_DEPTH = ("fixed", "tleg", "unshared")
AUXILIARIES = ("auxiliary", "untaught", *ONE_DEPTH)
AT_DEPTHS = ("tuned", "scratch", "scratch_full", "scratch_taught")
"""The runs of single depths, the short ones first."""
FULL_BUDGET = (*AUXILIARIES, "scratch_full", "scratch_taught")
TAUGHT = ("auxiliary", *ONE_DEPTH, "tuned", "scratch", "scratch_taught")
"""The runs that learn from the teacher: fine-tuning does, so its rival with the same recipe does too."""


@dataclass(frozen=True)
class Family:
    """The runs of one family with one seed.

    Args:
        configs: the folder of its run configs, such as ``quickstart``.
        auxiliaries: ``auxiliary``, and others of ``AUXILIARIES`` beside it.
        at_depths: those of ``AT_DEPTHS`` that take place at each of ``depths``.
        sets: config overrides of all runs.
        scored: depths at which the auxiliary models are scored, instead of the configs'.
        epochs: overrides of the configs: of the ``teacher``, and as ``auxiliary`` of all that have the full budget.
        options: further options of all commands.
        teacher: folder of another family's teacher, which teaches this one too; None: the family has its own.
        ranks: processes of each run that has the machine to itself.
    """

    folder: Path
    configs: str
    seed: int
    auxiliaries: tuple[str, ...]
    at_depths: tuple[str, ...]
    depths: tuple[int, ...]
    sets: tuple[str, ...] = ()
    scored: tuple[int, ...] | None = None
    epochs: dict[str, int] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    teacher: Path | None = None
    ranks: int = 1

    def teacher_command(self) -> Command:
        """Return the run of the family's own teacher."""
        return self._train("1. a teacher", "teacher", self.folder / "teacher")

    def auxiliary_commands(self, *, beside_others: bool = False) -> list[Command]:
        """Return the auxiliary models' runs, which need the teacher."""
        return [
            self._train("" if beside_others else "2. the auxiliary model", name, self.folder / name, (), beside_others)
            for name in self.auxiliaries
        ]

    def scaled_commands(self, images: Path) -> Iterator[Command]:
        """Yield the commands that score descendants of the models of one depth, with scaled branches, on ``images``.

        They need these models' runs. A model that was trained at many depths has scaled branches anyway.
        """
        depths = ",".join(map(str, self.scored or ()))
        for name in (name for name in self.auxiliaries if name in ONE_DEPTH):
            run, scores = self.folder / name, self.folder / name / "scaled.json"
            words = ["--checkpoint", escape_path(run), "--data", escape_path(images), "--depths", depths]
            words += ["--branch-scaling", "1", "--num-threads", "1", "--json", escape_path(scores)]
            words += ["--plan", "spaced"] if name == "unshared" else []
            yield Command("", (*sws("evaluate"), *words, *self.options), scores, scores.with_suffix(".log"))

    def expand_commands(self) -> Iterator[Command]:
        """Yield the expansion of each descendant that is fine-tuned, which needs the auxiliary model."""
        learngene = f"{escape_path(self.folder)}/auxiliary/learngene.safetensors"
        for depth in self.depths if "tuned" in self.at_depths else ():
            file = self._at(depth) / "expanded.safetensors"
            words = ("--learngene", learngene, "--depth", str(depth), "--out", escape_path(file))
            yield Command("", (*sws("expand"), *words, *self.options), file)

    def depth_commands(self) -> Iterator[Command]:
        """Yield the runs of the descendants and their rivals, the long ones first, so that all workers end together."""
        for kind in reversed(self.at_depths):
            for depth in sorted(self.depths, reverse=True):
                folder, sets = self._at(depth), [f"model.depth={depth}"]
                if kind == "tuned":
                    sets.append(f"model.initial_checkpoint={escape_path(folder)}/expanded.safetensors")
                yield self._train("", kind, folder / kind, sets, beside_others=True)

    def _at(self, depth: int) -> Path:
        return self.folder / f"depth{depth}"

    def _train(
        self, title: str, config: str, output: Path, sets: Iterable[str] = (), beside_others: bool = False
    ) -> Command:
        teacher = escape_path(self.teacher or self.folder / "teacher")
        own = [f"distill.teacher={teacher}/model.safetensors"] if config in TAUGHT else []
        if (epochs := self.epochs.get("auxiliary" if config in FULL_BUDGET else config)) is not None:
            own.append(f"train.epochs={epochs}")
        if self.scored is not None and config in self.auxiliaries:
            own.append(f"train.eval_depths={list(self.scored)}")
        return train_command(
            title, f"{self.configs}/{config}", output, self.seed, *self.options,
            sets=[*self.sets, *own, *sets], ranks=1 if beside_others else self.ranks, beside_others=beside_others,
        )  # fmt: skip


def perform_side_by_side(commands: Iterable[Command], jobs: int) -> None:
    """Run commands, ``jobs`` at a time, in their order.

    Raises:
        RunError: one failed; those that had begun were finished.
    """
    due = list(commands)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        list(track(pool.map(perform, due), "runs", len(due), "runs"))
