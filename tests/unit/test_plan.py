"""The arithmetic of a plan: against what autograd saves, DeepSpeed's estimators, measured figures, and by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch.nn import functional as F

from sws_dist.config.loader import load_config
from sws_dist.errors import ConfigError
from sws_dist.plan.bill import Budget, Costs, add_up
from sws_dist.plan.devices import DECODING_CPU_S, DEVICES, MEASURED, assume_utilisation, find_device
from sws_dist.plan.memory import rank_memory
from sws_dist.plan.run import Request, build_on_meta, pass_memory, plan_run
from sws_dist.plan.sharding import ModelSize, Sharding
from sws_dist.plan.step_memory import PassMemory
from sws_dist.plan.traffic import Collective, Network, step_collectives
from sws_dist.zero.config import resolve_deepspeed_config

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SMALL_SETS = ["data.image_size=32", 'model.kwargs={"patch_size": 8, "embed_dim": 64, "num_heads": 2}']
NO_ACTIVATIONS = PassMemory(0, 0)
SIZE = ModelSize(parameters=8_000_000, matrices=7_000_000, stages=4, stage=1_900_000)
NO_AVERAGE = load_config("auxiliary_small", ["optim.ema_decay=null"])


def sharding(stage: int, ranks: int, **more: Any) -> Sharding:
    ds = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
        **more,
    }
    return Sharding.of(ds, ranks, is_ours=True)


# ---- memory ----


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_saves(recompute: bool) -> None:
    """A real pass on the CPU: the storages that autograd keeps, once each, without the weights."""
    sets = [*SMALL_SETS, "model.name=sws_vit", "model.schedule=[2,1]", "model.drop_path=0.1"]
    config = load_config("auxiliary_small", [*sets, f"model.grad_checkpointing={str(recompute).lower()}"])
    planned = pass_memory(config, 10, "eager timm", torch.float32, None, 8)
    model = build_on_meta(config, 10).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.set_grad_checkpointing(recompute)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    images, taught, saved = torch.randn(8, 3, 32, 32), torch.randn(8, 10).log_softmax(1), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.kl_div(model(images).log_softmax(1), taught, log_target=True, reduction="batchmean")
    num_bytes = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    assert loss.isfinite()
    assert planned.activations == pytest.approx(num_bytes, rel=0.1)


def test_the_triton_stages_memory_is_that_of_the_benchmark() -> None:
    """ViT-S, 256 images in bf16 on an H200; the allocator's reserve there is within a tenth of what is counted."""
    rows = json.loads((RESULTS / "kernels.json").read_text())["rows"]
    steps = {
        row["provider"]: row for row in rows if (row["operator"], row["case"]) == ("training_step", "S, batch 256")
    }
    config = load_config("auxiliary_small")
    states = 9_628_648 * (2 + 4 + 8 + 4)
    for path in ("triton", "eager timm"):
        used = pass_memory(config, 1000, path, torch.bfloat16, None, 256)
        assert states + used.activations + used.workspace == pytest.approx(steps[path]["peak_bytes"], rel=0.1)


def test_zero_2_is_what_deepspeed_estimates() -> None:
    """Weights, masters, moments, and the gradient in bf16 and in fp32: 2 N + 18 N / W."""
    memory = rank_memory(SIZE, sharding(2, 8), NO_ACTIVATIONS, NO_AVERAGE, teacher=0).update
    _, estimate = estimate_zero2_model_states_mem_needs(SIZE.parameters, 8, 1, cpu_offload=False)
    assert memory.weights + memory.optimizer + memory.gradients + 4 * SIZE.parameters // 8 == estimate
    assert memory.total == pytest.approx(estimate, rel=0.1)


def test_zero_3_is_what_deepspeed_estimates() -> None:
    """Without its largest layer, and with the gradient's shard in bf16, which the estimate leaves out."""
    memory = rank_memory(SIZE, sharding(3, 8), NO_ACTIVATIONS, NO_AVERAGE, teacher=0).update
    _, estimate, layer = estimate_zero3_model_states_mem_needs(SIZE.parameters, 0, 8, 1, False, False)
    assert layer == 0
    states = memory.weights + memory.optimizer + 4 * SIZE.parameters // 8
    assert states == estimate
    assert memory.gradients == 2 * SIZE.parameters // 8


def test_an_offloaded_optimizer_lies_on_the_host() -> None:
    zero = {"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}}
    config = load_config("auxiliary_small", ["optim.ema_decay=0.9"])
    found = rank_memory(SIZE, sharding(2, 4, zero_optimization=zero), NO_ACTIVATIONS, config, teacher=5)
    assert found.update.optimizer == 0
    assert found.host == SIZE.parameters // 4 * (4 + 8 + 4 + 4 + 2)
    assert found.checkpoint == SIZE.parameters // 4 * (4 + 8 + 4)
    assert found.backward.teacher == 10


def test_muon_keeps_one_moment_of_its_matrices() -> None:
    config = load_config("auxiliary_small", ["optim.ema_decay=null", "optim.name=muon", "checkpoint.background=false"])
    found = rank_memory(SIZE, sharding(2, 4), NO_ACTIVATIONS, config, teacher=0)
    assert found.update.optimizer == 4 * (2 * 7_000_000 + 3 * 1_000_000) // 4
    assert found.checkpoint == 0


# ---- traffic and time ----


def test_a_ring_passes_on_all_parts_but_one() -> None:
    assert Collective("all_gather", "", 1000, 1).wire_bytes(4) == 750
    assert Collective("all_reduce", "", 1000, 1).wire_bytes(4) == 1500
    assert step_collectives(SIZE, sharding(2, 1)) == []


def test_networks_rate_and_hops_are_nccls() -> None:
    network = Network(nodes=4, ranks_a_node=8, link_bytes=450e9, network_bytes=50e9)
    seconds = network.seconds(Collective("all_gather", "", 32_000_000, 1))
    assert seconds == pytest.approx(31e6 / 400e9 + 8.4e-6 + 28 * 3.4e-6 + 3 * 14e-6)
    reduced = network.seconds(Collective("all_reduce", "", 32_000_000, 1))  # by the tree, which has fewer hops
    assert reduced == pytest.approx(62e6 / 400e9 + 8.4e-6 + 2 * (7 * 4e-6 + 2 * 14e-6))


def test_figures_are_those_of_the_committed_results() -> None:
    kernels = json.loads((RESULTS / "kernels.json").read_text())
    for row in kernels["rows"]:
        if row["operator"] == "training_step" and row["provider"] in MEASURED:
            width = {"Ti": 192, "S": 384}[row["case"].split(",")[0]]
            assert MEASURED[row["provider"]][width] / 1e12 == pytest.approx(row["tflop_per_s"], rel=1e-3)
    data = json.loads((RESULTS / "data-cpu.json").read_text())
    assert pytest.approx(1e-3 * data["providers"]["this pipeline"]["cpu_ms_per_image"], rel=1e-3) == DECODING_CPU_S


def test_what_was_not_measured_is_called_assumed() -> None:
    assert assume_utilisation(DEVICES["h200"], "triton", 384, "bf16").reason.startswith("measured")
    for device, width, precision in (("h100", 384, "bf16"), ("h200", 384, "fp32"), ("h200", 768, "bf16")):
        assumed = assume_utilisation(DEVICES[device], "triton", width, precision)
        assert assumed.utilisation == pytest.approx(277.2 / 989.4)
        assert assumed.reason.startswith("assumed to be as measured on an H200: triton, width 384")
    assert find_device("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    with pytest.raises(ConfigError, match="device 'NVIDIA H100 PCIe'"):  # slower, with the memory of another
        find_device("NVIDIA H100 PCIe")
    with pytest.raises(ConfigError, match="device 'TPU': no figures are known; known are a100, h100, h200"):
        find_device("TPU")


# ---- the bill ----


def test_the_papers_ratios_by_hand() -> None:
    """Ten descendants, 100 epochs of the auxiliary model and of each rival, 5 of fine-tuning: 1000 / (100 + 50)."""
    costs = Costs(100.0, 100.0, 16, 6.0, 10.0, parameters=37, stages=5, layer_parameters=7)
    bill = add_up(costs, range(6, 16), Budget(1000, auxiliary=100, tuned=5, scratch=100))
    assert bill.epoch_ratios()["total training"] == pytest.approx(1000 / 150)
    assert bill.epoch_ratios()["pre-training"] == 10
    family = sum(100 + (depth - 16) * 6 for depth in range(6, 16))
    assert bill.scratch == 3 * family * 100 * 1000
    assert bill.as_published == 3 * 100 * 100 * 1000 + 10 * 100 * 1000 + bill.scratch / 20
    assert bill.stored_each / bill.stored == sum(37 + (depth - 5) * 7 for depth in range(6, 16)) / 37


# ---- the whole plan ----


@pytest.fixture(scope="module")
def request_() -> Request:
    sets = [*SMALL_SETS, "model.name=sws_vit", "model.schedule=[2,1]", "distill.teacher=null", "train.epochs=3"]
    sets += ["distill.teacher_weights=null", "model.kernels=reference", "train.global_batch=64"]
    config = load_config("auxiliary_small", sets)
    ds = resolve_deepspeed_config({"zero_optimization": {"stage": 1}}, config, 4)
    return Request(config, ds, 1000, 10, 2, 2, DEVICES["a100"], utilisation=0.5, depths=(2, 4))


def test_a_whole_plan(request_: Request) -> None:
    plan = plan_run(request_)
    assert plan.total_steps == 3 * 768 // 64  # repeated augmentation: an epoch is a multiple of 256
    assert plan.rate == 0.5 * 19.5e12
    assert plan.time.arithmetic == pytest.approx(plan.total_flops / plan.total_steps / (4 * plan.rate))
    assert plan.fits
    assert plan.largest_micro_batch == 4096
    found = json.loads(json.dumps(plan.as_json()))
    assert found["memory"]["peak"] == plan.memory.peak
    assert found["bill"]["depths"] == [2, 4]


def test_the_largest_micro_batch_is_the_last_that_fits(request_: Request) -> None:
    device = replace(request_.device, memory_bytes=2_300_000_000)
    largest = plan_run(replace(request_, device=device, depths=())).largest_micro_batch
    assert 0 < largest < 4096
    for micro, fits in ((largest, True), (largest + largest // 50 + 1, False)):
        config = replace(request_.config, train=replace(request_.config.train, global_batch=4 * micro))
        ds = resolve_deepspeed_config({"zero_optimization": {"stage": 1}}, config, 4)
        assert plan_run(replace(request_, config=config, ds=ds, device=device, depths=())).fits == fits


def test_a_bill_needs_an_auxiliary_model(request_: Request) -> None:
    config = replace(request_.config, model=replace(request_.config.model, schedule=(1, 1)))
    with pytest.raises(ValueError, match="--depths: sws_vit is no auxiliary model"):
        plan_run(replace(request_, config=config))
