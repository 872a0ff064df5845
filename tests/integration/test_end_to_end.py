"""Everything that a user does, from a teacher to a fine-tuned descendant: each step a command, on real JPEG files."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from sws_dist.checkpoint.model_file import load_model_file
from sws_dist.config.loader import load_config
from sws_dist.learngene.file import load_learngene
from sws_dist.models.geometry import timm_arguments
from tests import ranks, runs
from tests.launching import REPOSITORY, Job, log, train

CONFIGS = REPOSITORY / "configs" / "runs" / "quickstart"
SMALL = {"train.epochs": 2, "train.eval_every": 1, "train.log_every": 4, "checkpoint.every": 1}
ZERO2, ZERO3 = ({"gradient_clipping": 1.0, "zero_optimization": {"stage": stage}} for stage in (2, 3))


def run_script(*arguments: str | Path, fails: bool = False, world: int = 1) -> str:
    """Return what a script prints. It has to succeed, or where it ``fails``, to end with an error."""
    done = ranks.script(*arguments, world=world)
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits_root: Path) -> Path:
    """Train a teacher, an auxiliary model (ZeRO-2) and a descendant (ZeRO-3), and expand two: short runs, real parts.

    The two that users start on several machines go through DeepSpeed's launcher.
    """
    out = tmp_path_factory.mktemp("trained")
    data = {"data.root": str(digits_root)}
    done = runs.train(Job(CONFIGS / "teacher.yaml", out / "teacher", ZERO2, SMALL | data), ranks=2)
    assert done.returncode == 0, done.stdout[-6000:]
    teacher = {"distill.teacher": str(out / "teacher" / "model.safetensors")}
    sets = teacher | {"optim.ema_decay": 0.9, "model.elastic": None, "train.eval_depths": [7], "train.profile": [2, 3]}
    followed = ZERO2 | {"csv_monitor": {"enabled": True}}
    done = train(Job(CONFIGS / "auxiliary.yaml", out / "auxiliary", followed, SMALL | data | sets), ranks=2)
    assert done.returncode == 0, done.stdout[-6000:]
    (out / "auxiliary.txt").write_text(done.stdout)
    learngene_file = out / "auxiliary/learngene.safetensors"
    for depth in (7, 10):
        file = out / f"des{depth}.safetensors"
        run_script("launcher/expand.py", "--learngene", learngene_file, "--depth", str(depth), "--out", file)
    start = {"model.depth": 7, "model.initial_checkpoint": str(out / "des7.safetensors"), "train.epochs": 1}
    done = train(Job(CONFIGS / "tuned.yaml", out / "des7", ZERO3, SMALL | data | teacher | start), ranks=2)
    assert done.returncode == 0, done.stdout[-6000:]
    return out


def evaluate(checkpoint: Path, data: Path, *arguments: str | Path) -> dict[str, float]:
    out = checkpoint.with_suffix(".json")
    run_script("launcher/evaluate.py", "--checkpoint", checkpoint, "--data", data, "--json", out, *arguments)
    return json.loads(out.read_text())


def test_a_run_leaves_what_it_promises(trained: Path) -> None:
    for run, weights in (("teacher", "model"), ("auxiliary", "learngene"), ("des7", "model")):
        names = {path.name for path in (trained / run).iterdir()}
        assert names >= {
            "config.yaml", "deepspeed.json", "environment.json", "log.jsonl", "tensorboard", "checkpoints",
            "metrics.json", f"{weights}.safetensors",
        }  # fmt: skip
        load_config(trained / run / "config.yaml")  # the resolved config is itself a config
    metrics = json.loads((trained / "auxiliary" / "metrics.json").read_text())
    assert metrics["world_size"] == 2
    assert metrics["zero_stage"] == 2
    assert metrics["flops"] == metrics["images"] * (3 * metrics["flops_forward"] + metrics["flops_teacher"])
    assert metrics["top1"] == metrics["history"][-1]["val/top1"]


def test_training_learns(trained: Path) -> None:
    entries = [entry for entry in log(trained / "teacher") if "train/loss" in entry]
    assert entries[-1]["train/loss"] < 0.5 * entries[0]["train/loss"]


def test_own_schedule_scores_the_same(trained: Path, digits_root: Path) -> None:
    auxiliary = evaluate(trained / "auxiliary" / "learngene.safetensors", digits_root / "val")
    descendant = evaluate(trained / "des10.safetensors", digits_root / "val")
    assert auxiliary["top1"] == descendant["top1"]
    assert descendant["loss"] == pytest.approx(auxiliary["loss"], abs=1e-5)
    in_training = json.loads((trained / "auxiliary" / "metrics.json").read_text())["top1"]
    assert auxiliary["top1"] == pytest.approx(in_training)


def test_fine_tuning_starts_from_the_expanded_weights(trained: Path, digits_root: Path) -> None:
    start = next(entry for entry in log(trained / "des7") if entry["step"] == 0)
    expanded = evaluate(trained / "des7.safetensors", digits_root / "val")
    assert start["val/top1"] == pytest.approx(expanded["top1"])


def test_a_learngenes_descendants_of_several_depths_are_scored(trained: Path, digits_root: Path) -> None:
    """At its own depth the learngene's auxiliary model, at others what expand writes; on two ranks too."""
    out, data = trained / "depths.json", digits_root / "val"
    arguments = ["--checkpoint", trained / "auxiliary", "--data", data, "--depths", "7,10", "--json", out]
    run_script("launcher/evaluate.py", *arguments, world=2)
    found = json.loads(out.read_text())["depths"]
    own = evaluate(trained / "auxiliary" / "learngene.safetensors", data)
    for depth, alone in (("7", evaluate(trained / "des7.safetensors", data)), ("10", own)):
        assert found[depth]["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert {key: found[depth][key] for key in ("top1", "images")} == {key: alone[key] for key in ("top1", "images")}


def test_predictions_hold_every_image_once_on_any_number_of_ranks(trained: Path, digits_root: Path) -> None:
    file = trained / "predictions.npz"
    checkpoint, out = trained / "des7.safetensors", trained / "three-ranks.json"
    arguments = ["--checkpoint", checkpoint, "--data", digits_root / "val", "--json", out, "--predictions", file]
    run_script("launcher/evaluate.py", *arguments, "--batch", "50", world=3)
    scores = json.loads(out.read_text())
    assert scores == evaluate(checkpoint, digits_root / "val")  # on one rank
    with np.load(file) as found:
        expected = sorted(str(p.relative_to(digits_root / "val")) for p in (digits_root / "val").glob("*/*.jpg"))
        assert sorted(found["path"]) == expected
        assert all(int(path.split("/")[0]) == label for path, label in zip(found["path"], found["label"], strict=True))
        assert (found["logits"].argmax(axis=1) == found["label"]).mean() == pytest.approx(scores["top1"])


def test_any_timm_model_with_local_weights_is_scored(trained: Path, digits_root: Path) -> None:
    """A bare state dict of the teacher, whose label count is not the model's own 1,000."""
    _, weights = load_model_file(trained / "teacher" / "model.safetensors")
    torch.save({"state_dict": weights}, trained / "teacher.pth")
    pixels = ["--image-size", "32", "--crop-pct", "1.0"]
    pixels = ["--image-size", "32", "--crop-pct", "1.0"]
    scores = evaluate(trained / "teacher.pth", digits_root / "val", "--model", "resnet10t", *pixels)
    model = timm.create_model("resnet10t", num_classes=10).eval()
    model.load_state_dict(weights)
    files = sorted((digits_root / "val").glob("*/*.jpg"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files])
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    guesses = model(((images / 255 - mean) / std).permute(0, 3, 1, 2)).argmax(dim=1)
    hits = sum(int(file.parent.name) == guess for file, guess in zip(files, guesses.tolist(), strict=True))
    assert scores["top1"] == pytest.approx(hits / len(files))
    few = digits_root.parent / "two-classes"
    for label in "01":
        shutil.copytree(digits_root / "val" / label, few / label)
    said = run_script(
        "launcher/evaluate.py",
        "--model",
        "resnet10t",
        "--checkpoint",
        trained / "teacher.pth",
        "--data",
        few,
        fails=True,
    )
    assert "has 2 class folders" in said


def test_tensorboard_tells_the_whole_story(trained: Path) -> None:
    events = EventAccumulator(str(trained / "auxiliary" / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= {
        "train/loss", "train/loss_labels", "train/loss_distill", "train/lr", "train/grad_norm",
        "val/top1", "val/top5", "val/top1_ema", "depth/val_top1/7", "time/forward", "time/reduce",
        "norms/gradient/blocks.4", "norms/weights/patch_embed",
        "perf/images_per_s", "perf/data_wait_share", "perf/memory_gib",
    }  # fmt: skip
    assert {tag.split("/")[0] for tag in tags["scalars"]} == {"train", "val", "depth", "time", "norms", "perf"}
    assert "perf/mfu" not in tags["scalars"], "a share of a peak that nobody knows"
    assert {"config.yaml/text_summary", "deepspeed.json/text_summary"} <= set(tags["tensors"])
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == sorted(set(steps))
    logged = [entry["train/loss"] for entry in log(trained / "auxiliary") if "train/loss" in entry]
    np.testing.assert_allclose([event.value for event in events.Scalars("train/loss")], logged, rtol=1e-6)


def test_tensorboard_has_pictures_and_a_page_for_the_family(trained: Path) -> None:
    events = EventAccumulator(str(trained / "auxiliary" / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    shown = {tag.split(" ")[0]: events.Images(tag) for tag in events.Tags()["images"]}
    assert set(shown) == {"train/batch", "val/worst", "val/confusion"}
    last = log(trained / "auxiliary")[-1]["step"]
    assert len(shown["val/worst"]) == 2, "one an evaluation"
    assert [event.step for event in shown["val/confusion"]] == [last]
    (page,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(page.tensor_proto.string_val[0])
    drawn = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    for tag in drawn:
        if "mfu" not in tag and "train_loss" not in tag:  # no peak is known of a CPU; this run draws no depth
            assert [name for name in events.Tags()["scalars"] if re.search(tag, name)], tag


def test_the_confusion_matrix_is_that_of_the_final_weights(trained: Path, digits_root: Path) -> None:
    weights, file = trained / "auxiliary" / "learngene.safetensors", trained / "auxiliary.npz"
    evaluate(weights, digits_root / "val", "--predictions", file, "--no-ema")
    with np.load(file) as found:
        expected = np.zeros((10, 10), dtype=int)
        np.add.at(expected, (found["label"], found["logits"].argmax(axis=1)), 1)
    header, *rows = list(csv.reader((trained / "auxiliary" / "confusion.csv").read_text().splitlines()))
    assert header == ["label / guess", *map(str, range(10))]
    assert [row[0] for row in rows] == header[1:]
    counts = np.array([row[1:] for row in rows], dtype=int)
    assert abs(counts - expected).sum() <= 2, "but for a tie that another batch size decides otherwise"


def test_steps_are_traced_and_deepspeeds_monitor_is_fed(trained: Path) -> None:
    run, said = trained / "auxiliary", (trained / "auxiliary.txt").read_text()
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "steps-2-3.pt.trace.json.gz"  # what TensorBoard's plugin looks for
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") >= 2
    found = re.search(r"^profile  (\S+): (\S+ \d+%(, )?){5}$", said.replace("aten::", ""), re.M)
    assert found is not None
    assert found[1] == str(trace)
    lines = (run / "csv" / "train_loss.csv").read_text().split()
    assert lines[0] == "step,loss"
    entries = [entry for entry in log(run) if "train/loss" in entry]
    assert [int(line.split(",")[0]) for line in lines[1:]] == [32 * int(entry["step"]) for entry in entries]
    assert [float(line.split(",")[1]) for line in lines[1:]] == [entry["train/loss"] for entry in entries]


def test_the_end_of_a_run_is_summed_up(trained: Path) -> None:
    said = (trained / "auxiliary.txt").read_text()
    metrics = json.loads((trained / "auxiliary" / "metrics.json").read_text())
    summary = said[said.index("\ndone ") :].split("\n")
    assert [line.split()[0] for line in summary[1:8]] == [
        "done", "accuracy", "time", "cost", "weights", "figures", "curves",
    ]  # fmt: skip
    assert f"top-1 {100 * metrics['top1']:.2f} %, " in summary[2]
    for path in (*summary[5].split()[1:], *summary[6].replace(",", "").split()[1:]):
        assert Path(path).is_file()
    assert "\r" not in said


def test_checkpoint_gives_the_learngene_and_plain_timm(trained: Path, tmp_path: Path) -> None:
    newest = sorted((trained / "auxiliary" / "checkpoints").glob("step-*"))[-1]
    run_script("launcher/convert.py", "--checkpoint", newest, "--out", tmp_path / "learngene.safetensors")
    _, weights = load_learngene(tmp_path / "learngene.safetensors")
    _, final = load_learngene(trained / "auxiliary" / "learngene.safetensors")
    assert all(torch.equal(weights[name], final[name]) for name in final)

    newest = sorted((trained / "des7" / "checkpoints").glob("step-*"))[-1]  # written under ZeRO-3
    said = run_script("launcher/convert.py", "--checkpoint", newest, "--out", tmp_path / "des7.safetensors")
    assert "timm.create_model(" in said
    info, weights = load_model_file(tmp_path / "des7.safetensors")
    name, arguments = timm_arguments(info.kwargs | {"num_classes": info.num_classes})
    timm.create_model(name, **arguments).load_state_dict(weights, strict=True)


def test_learngene_unrolls_into_plain_timm(trained: Path, tmp_path: Path) -> None:
    source = trained / "auxiliary" / "learngene.safetensors"
    run_script("launcher/convert.py", "--learngene", source, "--out", tmp_path / "plain.safetensors")
    info, weights = load_model_file(tmp_path / "plain.safetensors")
    name, arguments = timm_arguments(info.kwargs | {"num_classes": info.num_classes})
    plain = timm.create_model(name, **arguments).eval()
    plain.load_state_dict(weights, strict=True)
    about, shared = load_learngene(source)
    auxiliary = about.build().eval()
    auxiliary.load_state_dict(shared, strict=True)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(plain(images), auxiliary(images), rtol=0, atol=1e-5)
