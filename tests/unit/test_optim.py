"""Parameter groups, and the learning rate: a cosine against timm's, and warm-up, stable, decay."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from sws_dist.config.lr_schedule import LRSchedule
from sws_dist.config.schema import OptimConfig
from sws_dist.models import create_model
from sws_dist.optim import hidden_matrices, parameter_groups


def test_biases_norms_and_positions_do_not_decay() -> None:
    model = create_model("sws_aux_tiny_patch16_224", class_token=True)
    decayed, exempt = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for p in exempt["params"]}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias", "blocks.0.attn.qkv.bias"} <= kept
    assert all(n.endswith("bias") or "norm" in n or n in ("pos_embed", "cls_token") for n in kept)
    assert len(decayed["params"]) + len(kept) == len(names)


def test_the_rate_is_timms_cosine_per_step() -> None:
    """Linear warm-up from warmup_lr, then cosine over the steps that are left, as timm with warmup_prefix."""
    config = OptimConfig(lr=1e-3, lr_batch=512, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=5)
    steps_per_epoch, total = 12.5, 625
    ours = LRSchedule(config, global_batch=1024, steps_per_epoch=steps_per_epoch, epochs=50, total_steps=total)
    assert ours.peak == 2e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    theirs = CosineLRScheduler(
        optimizer, t_initial=total - 62, lr_min=1e-5, warmup_t=62, warmup_lr_init=1e-6, warmup_prefix=True,
        t_in_epochs=False,
    )  # fmt: skip
    for step in range(total):
        theirs.step_update(step)
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step


def test_neighbouring_steps_have_their_own_rates() -> None:
    """The released code gives epochs 0 and 1 one rate; here no two steps share one."""
    schedule = LRSchedule(OptimConfig(warmup_epochs=1), 512, 10, 5, 50)
    rates = [schedule(step) for step in range(50)]
    assert len(set(rates)) == 50
    assert rates[10] == schedule.peak == max(rates)


def test_ends() -> None:
    assert LRSchedule(OptimConfig(lr=1e-3, lr_batch=None), 64, 10, 1, 10)(10) == OptimConfig().min_lr
    assert LRSchedule(OptimConfig(lr=1e-6, lr_batch=None, min_lr=1e-5), 64, 10, 1, 10)(10) == 1e-6
    only_warmup = LRSchedule(OptimConfig(warmup_epochs=9), 512, 10, 2, 20)
    assert only_warmup(19) < only_warmup.peak


WSD = OptimConfig(schedule="wsd", lr=1e-3, lr_batch=None, min_lr=1e-5, warmup_lr=0.0, warmup_epochs=1, decay_epochs=2)


def test_wsd_stays_and_then_falls_as_one_minus_a_root() -> None:
    schedule = LRSchedule(WSD, 8, steps_per_epoch=10, epochs=10, total_steps=100)
    assert schedule.decay_start == 80
    assert [schedule(step) for step in (0, 5, 10, 79, 80)] == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-3])
    assert schedule(85) == pytest.approx(1e-5 + 0.99e-3 * (1 - 0.25**0.5))
    assert schedule(100) == 1e-5


def test_a_decay_begins_with_the_checkpoint_of_an_epoch() -> None:
    """Epochs need not end with a step: the last step of epoch 40 of ImageNet is number 100,092 at a batch of 512."""
    steps_per_epoch = 1_281_167 / 512
    config = dataclasses.replace(WSD, decay_epochs=10)
    schedule = LRSchedule(config, 512, steps_per_epoch, epochs=50, total_steps=int(50 * steps_per_epoch))
    assert schedule.decay_start == math.ceil(40 * 1_281_167 / 512) == 100_092


def test_the_length_changes_no_rate_before_the_decay() -> None:
    short, long = (LRSchedule(WSD, 8, 10, epochs, total_steps=10 * epochs) for epochs in (10, 30))
    assert all(short(step) == long(step) for step in range(short.decay_start + 1))
    assert short(short.decay_start + 1) < long(short.decay_start + 1)


def test_muon_takes_the_linear_weights_inside_blocks_and_splits_qkv_by_head() -> None:
    model = create_model("sws_vit", schedule=[2], img_size=16, patch_size=8, embed_dim=24, num_heads=2)
    inside = "blocks.0."
    assert hidden_matrices(model) == {
        f"{inside}attn.qkv.weight": 6,
        f"{inside}attn.proj.weight": 1,
        f"{inside}mlp.fc1.weight": 1,
        f"{inside}mlp.fc2.weight": 1,
    }
    groups = parameter_groups(model, 0.05, hidden_matrices(model))
    assert [(len(group["params"]), group["weight_decay"]) for group in groups][:2] == [(4, 0.05), (2, 0.05)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_muon_takes_both_sets_of_tleg_and_nothing_of_a_convolutional_model() -> None:
    tleg = create_model("tleg_vit", depth=2, img_size=16, patch_size=8, embed_dim=24, num_heads=2)
    assert {name.split(".")[2] for name in hidden_matrices(tleg)} == {"base", "slope"}
    assert hidden_matrices(create_model("test_resnet")) == {}
