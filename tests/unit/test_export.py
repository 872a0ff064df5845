"""Exported files, opened as their users open them, and the commands that use them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml

import sws_dist
from sws_dist.build_models import build_models
from sws_dist.checkpoint.model_file import save_model_file
from sws_dist.checkpoint.onnx_file import OnnxClassifier
from sws_dist.checkpoint.open_model import open_model
from sws_dist.cli import classify as classify_command
from sws_dist.config.schema import DataConfig, ModelConfig, RunConfig
from sws_dist.errors import RunError, require_packages
from sws_dist.export import exporter
from sws_dist.export.exporter import Exported, export
from sws_dist.export.origin import describe_origin
from sws_dist.export.parity import compare, sample_images
from sws_dist.export.programs import load_program
from sws_dist.export.source import open_source
from sws_dist.learngene.expand import expand_learngene
from sws_dist.learngene.file import describe_model, load_learngene
from sws_dist.models import SWSVisionTransformer

GEOMETRY = {"schedule": (2, 1), "img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "num_classes": 10}
PREPROCESSING = {"mean": [0.4] * 3, "std": [0.2] * 3, "image_size": 32, "crop_pct": 0.8, "interpolation": "bilinear"}
CLASSES = [str(digit) for digit in range(10)]
ORIGIN = {"run": "/home/me/runs/aux", "teacher": "/home/me/runs/teacher/model.safetensors", "epochs": 3, "seed": 1}
ORIGIN |= {"step": 9, "commit": "abc", "versions": {"torch": "2.14"}, "initial_learngene": None}


def write_learngene(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    model = SWSVisionTransformer(**(GEOMETRY | changes))
    torch.nn.init.normal_(model.head.weight)  # logits that lie far apart
    info = describe_model(model, "learngene", preprocessing=PREPROCESSING, classes=CLASSES, provenance=ORIGIN)
    return save_model_file(folder / "learngene.safetensors", info, model.state_dict())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder as training leaves it, without its checkpoints and logs."""
    folder = tmp_path_factory.mktemp("runs") / "aux"
    folder.mkdir()
    write_learngene(folder)
    scores = {"top1": 0.5, "top5": 0.75}
    last = {f"val{name}/{key}": v + n / 10 for n, name in enumerate(("", "_depth4")) for key, v in scores.items()}
    metrics: dict[str, Any] = {"history": [last], "steps": 9, "commit": "abc", "depth": 3, "validation_images": 33}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    config = {"data": {"root": "/data/private/digits", "image_size": 32}, "model": {"elastic": None}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, few_digits: Path) -> Exported:
    """All formats of a descendant of four layers."""
    source = open_source(run, depth=4)
    out = run.parent / "exported"
    return export(source, out, tuple(exporter.FORMATS), data=few_digits / "val", license_id="mit", max_drop=1.0)


@pytest.fixture(scope="module")
def descendant(run: Path) -> Any:
    return sws_dist.expand(run / "learngene.safetensors", depth=4).eval()


IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_plain_timm_opens_the_folder_and_gives_the_logits(exported: Exported, descendant: Any, tmp_path: Path) -> None:
    torch.save(IMAGES, tmp_path / "images.pt")
    code = f"""if True:
        import json, sys, timm, torch
        sys.modules["sws_dist"] = None
        model = timm.create_model("local-dir:{exported.folder}", pretrained=True).eval()
        logits = model(torch.load("images.pt"))
        about = timm.data.resolve_model_data_config(model) | {{"labels": model.pretrained_cfg["label_names"]}}
        torch.save(logits, "logits.pt")
        print(json.dumps(about))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), descendant(IMAGES), rtol=0, atol=1e-5)
    assert json.loads(done.stdout) == {
        "input_size": [3, 32, 32],
        "mean": [0.4] * 3,
        "std": [0.2] * 3,
        "crop_pct": 0.8,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "labels": CLASSES,
    }


@pytest.mark.parametrize(("file", "atol"), [("model", 1e-5), ("model_fp16", 0.02), ("model_int8", 0.3)])
@pytest.mark.parametrize("batch", [1, 5])
def test_onnx_files_take_any_batch(exported: Exported, descendant: Any, file: str, atol: float, batch: int) -> None:
    model = OnnxClassifier(exported.folder / f"{file}.onnx")
    difference = (model(IMAGES[:batch]) - descendant(IMAGES[:batch])).abs().max()
    assert difference < atol
    assert (difference > 1e-4) == (file != "model"), "fp16 and int8 really compute in fewer bits"
    assert model.pretrained_cfg["crop_pct"] == 0.8
    assert model.pretrained_cfg["label_names"] == CLASSES


def test_fewer_bits_take_less_room(exported: Exported) -> None:
    fp32, fp16, int8 = ((exported.folder / f"model{kind}.onnx").stat().st_size for kind in ("", "_fp16", "_int8"))
    assert fp16 < 0.6 * fp32
    assert int8 < 0.4 * fp32


def test_the_program_of_torch_export_takes_any_batch(exported: Exported, descendant: Any) -> None:
    program, config = load_program(exported.folder / "model.pt2")
    for batch in (1, 5):
        torch.testing.assert_close(program(IMAGES[:batch]), descendant(IMAGES[:batch]), rtol=0, atol=1e-5)
    assert config == json.loads((exported.folder / "config.json").read_text())


def test_the_command_has_measured_what_it_says(exported: Exported, few_digits: Path, descendant: Any) -> None:
    own = sws_dist.evaluate(descendant, few_digits / "val")
    assert exported.scores["model.safetensors"] == own
    assert exported.scores["model_int8.onnx"].images == 33
    assert set(exported.parities) == {"model.safetensors", *(each.file for each in exporter.FORMATS.values())}
    assert all(parity.difference <= parity.tolerance for parity in exported.parities.values())
    assert exported.test.images.shape == (32, 3, 32, 32)


def test_every_exported_file_is_evaluated_and_classifies_alike(
    exported: Exported, few_digits: Path, descendant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation and ``sws classify`` prepare images in the same way."""
    kept = tmp_path / "kept.npz"
    sws_dist.evaluate(exported.folder / "model.onnx", few_digits / "val", predictions=kept)
    predictions = np.load(kept)
    expected = torch.from_numpy(predictions["logits"]).softmax(1)
    files = [str(few_digits / "val" / name) for name in predictions["path"]]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    for model in (exported.folder, exported.folder / "model.onnx", exported.folder / "model.safetensors"):
        found = tmp_path / "found.json"
        command = ["sws classify", str(model), str(few_digits / "val"), str(bad), "--top=10", f"--json={found}"]
        monkeypatch.setattr(sys, "argv", [*command, "--quiet"])
        classify_command.main()
        labels = json.loads(found.read_text())
        assert set(labels) == set(files)
        for file, row in zip(files, expected, strict=True):
            probabilities = torch.zeros(10)
            for best in labels[file]:
                assert best["label"] == CLASSES[best["number"]]
                probabilities[best["number"]] = best["probability"]
            torch.testing.assert_close(probabilities, row, rtol=0, atol=1e-4)
            assert [best["number"] for best in labels[file]] == probabilities.argsort(descending=True).tolist()


def test_the_card_says_where_the_model_is_from(exported: Exported, run: Path) -> None:
    card = (exported.folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["library_name"], head["license"]) == ("timm", "mit")
    for fact in ("stages 0, 0, 1, 1", "teacher/model.safetensors", "3 epochs, 9 steps, seed 1", "`abc`", "torch 2.14"):
        assert fact in card, fact
    assert "top-1 60.00 %, top-5 85.00 % of 33 images, in the training run" in card
    assert "| trained on | digits |" in card
    assert ", on 32 validation images" in card
    assert "/home/me" not in card + str(open_source(run, depth=4).info)
    assert "/data" not in card


def test_the_data_is_not_named_by_the_folder_above_it(run: Path, tmp_path: Path) -> None:
    """``sws finetune --data photos`` takes the folder of class folders itself for the split."""
    shutil.copytree(run, tmp_path / "aux")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for root, split, name in (("/home/alice", "photos", "photos"), ("/home/alice/pets", "train", "pets")):
        config["data"] |= {"root": root, "train_split": split}
        (tmp_path / "aux" / "config.yaml").write_text(yaml.safe_dump(config))
        assert describe_origin(open_source(tmp_path / "aux", depth=3))["trained on"] == name


def test_a_fine_tuned_descendant_keeps_its_method(run: Path, tmp_path: Path) -> None:
    info, weights = expand_learngene(*load_learngene(run / "learngene.safetensors"), (0, 0, 1, 1))
    file = save_model_file(tmp_path / "des4.safetensors", info, weights)
    data = DataConfig("unused", image_size=32, mean=(0.4,) * 3, std=(0.2,) * 3)
    kwargs = {key: info.kwargs[key] for key in ("patch_size", "embed_dim", "num_heads")}
    for start in (file, tmp_path / "tuned0.safetensors", tmp_path / "tuned1.safetensors"):  # tuned again and again
        config = RunConfig(
            "unused", ModelConfig("sws_vit", depth=4, kwargs=kwargs, initial_checkpoint=str(start)), data
        )
        parts = build_models(config, CLASSES, torch.device("cpu"), torch.float32, {}, 100)
        tuned = tmp_path / f"tuned{len(list(tmp_path.glob('tuned*')))}.safetensors"
        save_model_file(tuned, parts.info, parts.student.state_dict())
        source = open_source(tuned)
        assert "stages 0, 0, 1, 1, then fine-tuned" in describe_origin(source)["method"]
        assert source.info.provenance["expansion"]["learngene"]["teacher"] == "teacher/model.safetensors"
    run_from_learngene = replace(info, provenance={"initial_learngene": "/home/me/runs/aux/learngene.safetensors"})
    save_model_file(file, run_from_learngene, weights)
    model = ModelConfig("sws_vit", depth=4, kwargs=kwargs, initial_checkpoint=str(file))
    again = build_models(RunConfig("unused", model, data), CLASSES, torch.device("cpu"), torch.float32, {}, 100).info
    assert again.provenance["expansion"] == {"plan": None, "learngene": "/home/me/runs/aux/learngene.safetensors"}
    source = open_source(save_model_file(tmp_path / "again.safetensors", again, weights))
    assert "from a learngene (aux/learngene.safetensors), then fine-tuned" in describe_origin(source)["method"]


def test_an_accuracy_is_claimed_only_for_the_weights_that_it_was_measured_for(run: Path, tmp_path: Path) -> None:
    def accuracy(path: Path, **options: Any) -> str:
        return describe_origin(open_source(path, **options))["accuracy"]

    assert accuracy(run, depth=3).startswith("top-1 50.00 %")
    unknown = "not measured for these weights"
    assert accuracy(run, depth=3, plan=(0, 1, 1)) == unknown
    assert accuracy(run, depth=5) == unknown
    assert accuracy(run, depth=4, image_size=48) == unknown
    assert accuracy(run, depth=4).startswith("top-1 60.00 %")
    aside = shutil.copytree(run, tmp_path / "aside")
    config = yaml.safe_load((aside / "config.yaml").read_text()) | {"train": {"eval_plan": "proportional"}}
    (aside / "config.yaml").write_text(yaml.safe_dump(config))
    assert accuracy(aside, depth=4) == unknown, "the run has evaluated another plan"
    assert accuracy(aside, depth=4, plan="proportional").startswith("top-1 60.00 %")
    info, weights = expand_learngene(*load_learngene(run / "learngene.safetensors"), (0, 0, 1, 1), branch_scaling=1)
    assert accuracy(save_model_file(aside / "des4.safetensors", info, weights)) == unknown, "other weights"
    assert accuracy(write_learngene(tmp_path), depth=4) == unknown
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    other = json.loads((run / "metrics.json").read_text()) | {"steps": 10}
    (tmp_path / "metrics.json").write_text(json.dumps(other))
    assert accuracy(tmp_path / "learngene.safetensors", depth=4) == unknown, "another run's metrics"


def test_the_released_codes_norms_are_exported(tmp_path: Path) -> None:
    file = write_learngene(tmp_path, norm_eps=1e-5)
    out = export(open_source(file, depth=3), tmp_path / "out").folder
    assert "on 8 images of noise" in (out / "README.md").read_text()
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert model.blocks[0].norm1.eps == 1e-5
    torch.testing.assert_close(model(IMAGES), sws_dist.expand(file, 3).eval()(IMAGES), rtol=0, atol=1e-5)
    assert "# license: " in (out / "README.md").read_text()


def test_a_file_of_another_program_is_exported_and_exported_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    torch.save({"state_dict": model.state_dict(), "arch": "resnet10t"}, tmp_path / "weights.pth")
    (tmp_path / "names.txt").write_text("cat\ndog\nfox\n")
    source = open_source(tmp_path / "weights.pth", classes=tmp_path / "names.txt", image_size=64)
    first = export(source, tmp_path / "first").folder
    again = open_source(export(open_source(first), tmp_path / "second").folder)
    assert again.config == source.config
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(open_model(first).eval()(images), model(images))
    with pytest.raises(ValueError, match="0 % of this model's weights are in linear layers"):
        export(source, tmp_path / "third", ["onnx-int8"])
    assert not (tmp_path / "third").exists()


def test_what_cannot_be_exported_is_refused(run: Path, exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a learngene; --depth says how many .* \(the auxiliary model has 3\)"):
        open_source(run)
    with pytest.raises(ValueError, match="--depth 3: only a learngene can be expanded"):
        open_source(exported.folder, depth=3)
    with pytest.raises(ValueError, match=r"the run has no learngene_ema.safetensors or model_ema.safetensors"):
        open_source(run, depth=3, ema=True)
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(open_source(exported.folder), exported.folder)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="this run is not finished"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"norm_eps 0\.0001: no ViT of timm's has it"):
        open_source(write_learngene(tmp_path, norm_eps=1e-4), depth=3)


def test_a_file_that_computes_something_else_is_refused(run: Path, descendant: Any) -> None:
    test = sample_images(open_source(run, depth=4), None)
    for wrong in (lambda x: 1.01 * descendant(x), lambda x: descendant(x) * torch.nan):
        with pytest.raises(RunError, match=r"m\.onnx: logits differ by .* nothing is written"):
            compare("m.onnx", wrong, descendant, test, 1e-4)


def test_missing_packages_are_named() -> None:
    with pytest.raises(ValueError, match=r"^missing: onyx; pip install 'sws-dist\[export\]' brings them$"):
        require_packages("export", "onnx", "onyx")
