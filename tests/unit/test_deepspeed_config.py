"""The DeepSpeed JSON: what DeepSpeed would accept without a word is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sws_dist.config.loader import load_config
from sws_dist.config.schema import RunConfig
from sws_dist.errors import ConfigError
from sws_dist.zero.config import (
    load_deepspeed_config,
    precision_of,
    resolve_deepspeed_config,
    set_zero3_memory_defaults,
)
from sws_dist.zero.schema import check_against_deepspeed


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    (tmp_path / "run.yaml").write_text(
        "output: x\nmodel: {name: sws_vit}\ndata: {root: x}\ntrain: {global_batch: 48}\n"
    )
    return load_config(tmp_path / "run.yaml")


def resolve(folder: Path, run: RunConfig, ds: Any, world_size: int = 2) -> dict[str, Any]:
    file = folder / "ds.json"
    file.write_text(ds if isinstance(ds, str) else json.dumps(ds))
    return resolve_deepspeed_config(file, run, world_size)


@pytest.mark.parametrize(
    ("given", "micro", "steps"),
    [
        ({}, 24, 1),
        ({"train_micro_batch_size_per_gpu": 8}, 8, 3),
        ({"gradient_accumulation_steps": 4}, 6, 4),
        ({"train_micro_batch_size_per_gpu": 12, "gradient_accumulation_steps": 2}, 12, 2),
    ],
)
def test_the_batch_is_completed(tmp_path: Path, run: RunConfig, given: dict[str, int], micro: int, steps: int) -> None:
    ds = resolve(tmp_path, run, given)
    assert (ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (micro, steps)
    assert ds["train_batch_size"] == 48


def test_defaults_that_deepspeed_hides_are_set(tmp_path: Path, run: RunConfig) -> None:
    ds = resolve(tmp_path, run, {})
    assert ds["gradient_clipping"] == 0.0
    assert ds["zero_optimization"]["stage"] == 0
    assert resolve(tmp_path, run, {"gradient_clipping": 2.0})["gradient_clipping"] == 2.0


@pytest.mark.parametrize(
    ("ds", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 5}, "5 x gradient_accumulation_steps 4 x 2 ranks = 40"),
        ({"train_micro_batch_size_per_gpu": 0}, "must be a whole number above 0"),
        ({"train_micro_batch_size_per_gpu": "8"}, "must be a whole number above 0"),
        ({"train_micro_batch_size_per_gpu": "auto"}, 'train_micro_batch_size_per_gpu is "auto"'),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization?"),
        ({"zero_optimization": {"stage": 4}}, "must be one of (0, 1, 2, 3)"),
        ({"optimizer": {"type": "Adam"}}, "set optim.* in the run config"),
        ({"activation_checkpointing": {"partition_activations": True}}, "set model.grad_checkpointing"),
        ({"aio": {"block_size": 1}}, "NVMe is not supported"),
        ({"tensorboard": {"enabled": True}}, "writes TensorBoard events to OUTPUT/tensorboard by itself"),
        ({"comet": {"enabled": True, "api_key": "x"}}, "comet.api_key: not here: it would be written"),
        ({"wandb": True}, "wandb: expected a JSON object"),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["Block"]}}}, "gives wrong gradients"),
        ({"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 9}}, "on a CPU it crashes"),
        ({"zero_optimization": {"stage": 3, "elastic_checkpoint": True}}, "fit any world size"),
        ({"zero_optimization": {"stage": 2, "load_from_fp32_weights": False}}, "fit any world size"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "use zero_optimization.offload_param"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "behind the optimizer's back"),
        ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, "offload_optimizer.super_offload"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}, "offload_optimizer.ratio"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme is not supported"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "do nothing at stage 2"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, "do nothing at stage 2"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}}, "do nothing at stage 2"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer does nothing at stage 0"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}, "4 does not divide the 2 ranks"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "expected a JSON object, found 'cpu'"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "keeps fp32 masters"),
        ({"train_batch_size": 48}, "set train.global_batch"),
        ({"gradient_clipping": -1}, "gradient_clipping = -1: expected the largest norm of the gradient"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping = '1.0': expected"),
        ({"gradient_clipping": True}, "gradient_clipping = True: expected"),
        ('{"gradient_clipping": NaN}', "gradient_clipping = nan: expected"),
        ('{"gradient_clipping": 1e999}', "gradient_clipping = inf: expected"),
        ({"communication_data_type": "fp8"}, "communication_data_type = 'fp8': expected one of fp32, fp16, bf16"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown = 'yes': expected true or false"),
        ({"csv_monitor": 1}, "csv_monitor: expected a JSON object, found 1"),
        ({"comms_logger": {"enabled": True}}, "comms_logger is not read from here; nothing would show its counts"),
        ("[" * 9000, "not valid JSON"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "choose one"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "optim.name=cpu_adam"),
        ('{"bf16": {}, "bf16": {}}', "'bf16' appears twice"),
        ("{", "ds.json:1: not valid JSON: Expecting property name"),
        ('{"bf16": {},\n\n}', "ds.json:3: not valid JSON: a comma before the closing bracket"),
        ('{"bf16": [1, 2,]}', "ds.json:1: not valid JSON: a comma before the closing bracket"),
        ('{\n"bf16": {} // mine\n}', "ds.json:2: not valid JSON: Expecting ',' delimiter"),
        ("", "ds.json:1: not valid JSON: the file is empty"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ("[]", "expected a JSON object"),
    ],
)
def test_refusals(tmp_path: Path, run: RunConfig, ds: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path, run, ds)
    assert said in str(caught.value)
    assert "ds.json" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "ds", "said"),
    [
        ({"compile": True}, {"zero_optimization": {"stage": 3}}, "model.compile does not work under ZeRO-3"),
        ({"cuda_graphs": True}, {"zero_optimization": {"stage": 3}}, "model.cuda_graphs does not work under ZeRO-3"),
    ],
)
def test_models_that_cannot_be_run_so(
    tmp_path: Path, run: RunConfig, model: dict[str, bool], ds: Any, said: str
) -> None:
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **model))
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path, run, ds)
    assert said in str(caught.value)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(b'\xef\xbb\xbf{"bf16": {"enabled": true}}')
    assert load_deepspeed_config(tmp_path / "ds.json")["bf16"] == {"enabled": True}
    (tmp_path / "ds.json").write_text("{}", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"ds\.json: not UTF-8 text \(byte 0 is 0xff\)"):
        load_deepspeed_config(tmp_path / "ds.json")
    with pytest.raises(ConfigError, match="it is a folder"):
        load_deepspeed_config(tmp_path)


def test_a_batch_that_the_ranks_cannot_share(tmp_path: Path, run: RunConfig) -> None:
    with pytest.raises(ConfigError, match="48 cannot be shared evenly by 5 ranks; the nearest that can is 50"):
        resolve(tmp_path, run, {}, world_size=5)


def test_a_micro_batch_that_would_part_the_crops_of_an_image(tmp_path: Path, run: RunConfig) -> None:
    run = dataclasses.replace(run, augment=dataclasses.replace(run.augment, num_crops=4))
    assert resolve(tmp_path, run, {})["train_micro_batch_size_per_gpu"] == 24
    with pytest.raises(ConfigError, match=r"augment.num_crops 4: a micro-batch of 6 images .* is no multiple of it"):
        resolve(tmp_path, run, {"gradient_accumulation_steps": 4})


def test_a_micro_batch_above_the_decoders_limit(tmp_path: Path, run: RunConfig) -> None:
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, global_batch=8192))
    with pytest.raises(ConfigError, match="train_micro_batch_size_per_gpu 8192 is more than the 4096 images"):
        resolve(tmp_path, run, {}, world_size=1)
    assert resolve(tmp_path, run, {}, world_size=2)["train_micro_batch_size_per_gpu"] == 4096


def test_precision() -> None:
    assert precision_of({}) == "fp32"
    assert precision_of({"bf16": {"enabled": True}}) == "bf16"
    assert precision_of({"fp16": {"enabled": False}}) == "fp32"


# ---- what DeepSpeed itself knows ----


@pytest.mark.parametrize(
    ("ds", "said"),
    [
        ({"zero_optimization": {"reduce_buket_size": 5}}, "did you mean reduce_bucket_size?"),
        ({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 5}}, "did you mean stage3_prefetch_bucket_size?"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "none"}}}, "did you mean device?"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "zero_optimization.reduce_bucket_size = 'many'"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "greater than 0"),
        ({"bf16": {"enable": True}}, "did you mean enabled?"),
        ({"csv_monitor": {"enabled": True, "job_nam": "x"}}, "did you mean job_name?"),
        ({"fp16": {"enabled": True}}, "fp16 needs a GPU"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "quantises with CUDA kernels"),
    ],
)
def test_keys_and_values_that_deepspeed_does_not_take(tmp_path: Path, run: RunConfig, ds: Any, said: str) -> None:
    resolved = resolve(tmp_path, run, ds)
    with pytest.raises(ConfigError) as caught:
        check_against_deepspeed(resolved, tmp_path / "ds.json", torch.device("cpu"))
    assert said in str(caught.value)
    assert "ds.json" in str(caught.value)


def test_every_config_that_ships_passes(run: RunConfig) -> None:
    for file in Path("configs/deepspeed").glob("*.json"):
        device = torch.device("cuda" if "fp16" in file.name else "cpu")
        check_against_deepspeed(load_deepspeed_config(file), file, device)


# ---- lean ZeRO-3 ----


def test_lean_settings_follow_the_stage_and_leave_what_is_given() -> None:
    zero = {"stage": 3, "stage3_max_live_parameters": 7, "prefetch_bucket_size": 8}
    set_zero3_memory_defaults(zero, 100)
    assert zero == {
        "stage": 3,
        "stage3_max_live_parameters": 7,
        "prefetch_bucket_size": 8,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 200,
    }
