"""Times the input: this pipeline, timm's create_loader and torchvision's ImageFolder on the same files and threads.

    python benchmarks/data.py [--data DIR] [--images 2048] [--threads N] [--repeats 3] [--out results.json]
    python benchmarks/data.py --crops 1 2 4 [--recipe plain] [...]

Every provider gives batches of the full recipe, mixed and on the device: random-resized crop (bicubic), flip,
rand-m9-mstd0.5-inc1, normalisation, erasing 0.25, mixup 0.8 and cutmix 1.0. CPU-ms are those of the process and its
workers, so a provider that keeps the cores busy for longer shows it, whatever the clock says. `decode` is no
provider but the ceiling: DALI's decoder on whole images, nothing else. With a GPU, `this pipeline` runs on it, and the
images/s of a training step (sws_aux_small, bf16) stand beside. Without --data, files are made of scikit-learn's two
photographs, in ImageNet's usual size. --crops compares this pipeline with itself instead, at so many crops of each
decoded image; each crop counts as an image. --recipe plain is crop, flip and normalisation alone, as in FKD.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from sws_dist.config.schema import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, DataConfig
from sws_dist.data import manifest, pipeline, sampler
from sws_dist.data.draws import Recipe
from sws_dist.data.mixup import Mixing, augment_batch
from sws_dist.provenance import collect_provenance

AUGMENT = AugmentConfig(
    auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, mixup=0.8, cutmix=1.0, mixup_switch_prob=0.5, smoothing=0.1
)
RECIPES = {"full": AUGMENT, "plain": AugmentConfig()}
SIZE, CLASSES = 224, 1000
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def write_images(root: Path, count: int) -> None:
    """``count`` JPEG files of about 500 x 375 pixels in two classes: windows of photographs, enlarged a little."""
    from sklearn.datasets import load_sample_image

    photographs = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    rng = np.random.default_rng(0)
    for index in range(count):
        name = ("china", "flower")[index % 2]
        width, height = (500, 375) if rng.random() < 0.75 else (375, 500)
        zoom = rng.uniform(0.6, 0.95) * min(640 / width, 427 / height)
        w, h = width * zoom, height * zoom
        left, top = rng.uniform(0, 640 - w), rng.uniform(0, 427 - h)
        window = (left, top, left + w, top + h)
        image = photographs[name].resize((width, height), Image.Resampling.BICUBIC, box=window)
        file = root / "train" / name / f"{index:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, quality=95, subsampling="4:2:0")


def ours(
    root: Path, batch: int, threads: int, device: torch.device, augment: AugmentConfig = AUGMENT, num_crops: int = 1
) -> Batches:
    augment = dataclasses.replace(augment, num_crops=num_crops)
    listed = manifest.scan(root, "train")
    positions = (np.arange(start, start + batch) for start in range(0, 1 << 40, batch))
    order, recipe = sampler.TrainOrder(len(listed), seed=0, num_crops=num_crops), Recipe(augment, SIZE)
    data = DataConfig(root=str(root), num_threads=threads)
    mixing = Mixing(augment, CLASSES, seed=0)
    for item in pipeline.train_loader(listed, order, positions, recipe, 0, data, device):
        yield augment_batch(item, mixing, augment, seed=0)


def mend_timm() -> None:
    """timm 1.0.31 asks Pillow to keep 0 bits at magnitude 10, which Pillow 13 refuses with an exception: keep 1."""
    from timm.data import auto_augment

    original = auto_augment.LEVEL_TO_ARG["PosterizeIncreasing"]
    auto_augment.LEVEL_TO_ARG["PosterizeIncreasing"] = lambda *a: (max(1, original(*a)[0]),)


def timms(root: Path, batch: int, threads: int, device: torch.device) -> Batches:
    from timm.data import ImageDataset, Mixup, create_loader

    mend_timm()
    loader = create_loader(
        ImageDataset(str(root / "train")),
        (3, SIZE, SIZE),
        batch,
        is_training=True,
        auto_augment=AUGMENT.auto_augment,
        interpolation="bicubic",
        re_prob=AUGMENT.re_prob,
        re_mode=AUGMENT.re_mode,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        num_workers=threads,
        device=device,
    )
    mixup = Mixup(AUGMENT.mixup, AUGMENT.cutmix, label_smoothing=AUGMENT.smoothing, num_classes=CLASSES)
    while True:
        for images, labels in loader:
            yield mixup(images, labels)


def torchvisions(root: Path, batch: int, threads: int, device: torch.device) -> Batches:
    """ImageFolder and torch's DataLoader with timm's transforms: torchvision's own RandAugment is another recipe."""
    from timm.data import Mixup, create_transform
    from timm.data.random_erasing import RandomErasing
    from torchvision.datasets import ImageFolder

    mend_timm()
    transform = create_transform(SIZE, True, auto_augment=AUGMENT.auto_augment, interpolation="bicubic")
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(root / "train"), transform),
        batch,
        shuffle=True,
        num_workers=threads,
        drop_last=True,
        persistent_workers=True,
    )
    erasing = RandomErasing(AUGMENT.re_prob, mode=AUGMENT.re_mode, device=device)
    mixup = Mixup(AUGMENT.mixup, AUGMENT.cutmix, label_smoothing=AUGMENT.smoothing, num_classes=CLASSES)
    while True:
        for images, labels in loader:
            yield mixup(erasing(images.to(device)), labels.to(device))


def decode(root: Path, batch: int, threads: int, device: torch.device) -> Batches:
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=device.index if on_gpu else None)
    def graph():
        encoded, labels = fn.readers.file(file_root=str(root / "train"), random_shuffle=True)
        return fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB), labels

    run = graph().run
    while True:
        yield run()


PROVIDERS: dict[str, Callable[[Path, int, int, torch.device], Batches]] = {
    "this pipeline": ours,
    "timm create_loader": timms,
    "torchvision ImageFolder": torchvisions,
    "decode": decode,
}


def providers_of(args: argparse.Namespace) -> dict[str, Callable[[Path, int, int, torch.device], Batches]]:
    """Return what is compared; all others are compared with the first."""
    if args.crops is None:
        return PROVIDERS
    augment = RECIPES[args.recipe]
    return {f"num_crops {count}": partial(ours, augment=augment, num_crops=count) for count in args.crops}


def cpu_seconds() -> float:
    """User and system time so far of this process and its living children."""
    process = psutil.Process()
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(batches: Batches, num_batches: int, batch: int, device: torch.device) -> dict[str, float]:
    """images/s and CPU-ms an image over ``num_batches``, once the workers have started."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(4):
        next(batches)
    wait()
    start, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(num_batches):
        next(batches)
    wait()
    images = num_batches * batch
    took, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    return {"images_per_s": images / took, "cpu_ms_per_image": 1e3 * cpu / images}


def in_its_own_process(name: str, root: Path, args: argparse.Namespace) -> dict[str, float]:
    """So that no provider's workers live on into the next one's time."""
    command = [sys.executable, __file__, "--only", name, "--data", root, "--images", args.images]
    command += ["--batch", args.batch, "--threads", args.threads, "--recipe", args.recipe]
    command += ["--crops", *args.crops] if args.crops else []
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def step_rate(batch: int, device: torch.device) -> float:
    """images/s of forward and backward of the auxiliary ViT-S in bf16: what the input has to keep up with."""
    from sws_dist.models import create_model

    model = create_model("sws_aux_small_patch16_224", num_classes=CLASSES).to(device, torch.bfloat16)
    images = torch.randn(batch, 3, SIZE, SIZE, device=device, dtype=torch.bfloat16)
    for step in range(25):
        if step == 5:
            torch.cuda.synchronize()
            start = time.perf_counter()
        model(images).float().logsumexp(dim=1).mean().backward()
    torch.cuda.synchronize()
    return 20 * batch / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train/<class>/<image> (default: made for the occasion)")
    parser.add_argument("--images", type=int, default=2048, help="images that are timed for each provider")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(), help="DALI threads, or worker processes")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all providers; medians are shown")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--crops", type=int, nargs="+", metavar="K", help="compare these numbers of crops a decode")
    parser.add_argument("--recipe", choices=RECIPES, default="full", help="with --crops: what is done to each image")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # what the parent asks of a child
    args = parser.parse_args()
    if args.recipe != "full" and args.crops is None:
        parser.error(f"--recipe {args.recipe} needs --crops: the other providers know the full recipe alone")
    providers = providers_of(args)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if args.only:
        torch.set_num_threads(1)
        batches = providers[args.only](args.data, args.batch, args.threads, device)
        print(json.dumps(measure(batches, args.images // args.batch, args.batch, device)))
        return
    with tempfile.TemporaryDirectory() as made:
        root = args.data or Path(made)
        if args.data is None:
            write_images(root, 512)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in providers}
        for _ in range(args.repeats):
            for name in providers:
                rounds[name].append(in_its_own_process(name, root, args))
        report(args, rounds, root, device)


def report(args: argparse.Namespace, rounds: dict[str, Any], root: Path, device: torch.device) -> None:
    files = list((root / "train").glob("*/*"))
    packages = ("torchvision", "pillow", "numpy")
    results = collect_provenance() | {
        "device": str(device),
        "cpu": psutil.cpu_count(),
        "threads": args.threads,
        "batch": args.batch,
        "images": args.images,
        "recipe": args.recipe,
        "kib_per_file": sum(file.stat().st_size for file in files) / len(files) / 1024,
        "providers": {
            name: {key: statistics.median(r[key] for r in rows) for key in rows[0]} | {"rounds": rows}
            for name, rows in rounds.items()
        },
    }
    results["versions"] |= {package: version(package) for package in packages}
    if device.type == "cuda":
        results["training_step_images_per_s"] = step_rate(args.batch, device)
        print(f"a training step needs {results['training_step_images_per_s']:.0f} images/s")
    first_ms = next(iter(results["providers"].values()))["cpu_ms_per_image"]
    for name, row in results["providers"].items():
        print(
            f"{name:24s} {row['images_per_s']:8.1f} images/s  {row['cpu_ms_per_image']:6.2f} CPU-ms an image  "
            f"{row['cpu_ms_per_image'] / first_ms:5.2f} x"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
