"""Parameter groups and schedules equal the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cellvim.errors import InputError
from cellvim.models.registry import create_model
from cellvim.train.optimization import Optimization, cosine_schedule, parameter_groups

GOLDEN = Path(__file__).parents[1] / "golden"
LAYER_DECAY = json.loads((GOLDEN / "_lr_decay_groups.json").read_text())


@pytest.mark.parametrize("case", [c for c in LAYER_DECAY if isinstance(LAYER_DECAY[c], list)])
def test_layer_decay_steps_every_two_blocks(case):
    depth, decay = int(case.split()[1]), float(case.split()[3])
    model = create_model("fastvim_tiny_patch16", depth=depth, embed_dim=16, image_size=32, num_classes=3)
    choices = Optimization(weight_decay=0.05, layer_decay=decay, decay_positions=False)
    ours = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(model, choices)
        for name in group["names"]
    }
    published = {
        name: (group["lr_scale"], group["weight_decay"]) for group in LAYER_DECAY[case] for name in group["names"]
    }
    assert published.keys() <= ours.keys()  # of the deepest model, the reference contains some names only
    assert len(ours) == sum(group["n"] for group in LAYER_DECAY[case])
    for name, (scale, weight_decay) in published.items():
        assert ours[name] == (pytest.approx(scale, rel=1e-12), weight_decay), name


def test_weight_decay_excludes_biases_and_one_dimensional_parameters():
    golden = json.loads((GOLDEN / "_wd_groups_fastchannelvim.json").read_text())
    model = create_model("fastchannelvim_tiny_patch16", depth=1, embed_dim=16, image_size=32, num_classes=3)
    groups = parameter_groups(model, Optimization(weight_decay=0.04))
    assert {n for g in groups if g["weight_decay"] for n in g["names"]} == set(golden["decayed"])
    assert {n for g in groups if not g["weight_decay"] for n in g["names"]} == set(golden["not_decayed"])


def test_every_trainable_parameter_is_in_one_group():
    model = create_model("vit_tiny_patch16", depth=3, embed_dim=48, image_size=32, num_classes=2)
    model.head.requires_grad_(False)
    grouped = [p for g in parameter_groups(model, Optimization(layer_decay=0.5)) for p in g["params"]]
    assert len(grouped) == len(set(map(id, grouped)))
    assert set(map(id, grouped)) == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_optimiser_is_the_named_one():
    model = torch.nn.Linear(2, 2)
    assert isinstance(Optimization(optimizer="sgd").make(model), torch.optim.SGD)
    adam = Optimization(betas=(0.9, 0.95)).make(model)
    assert isinstance(adam, torch.optim.AdamW)
    assert adam.defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"lr_batch": -1}, {"layer_decay": 0}, {"weight_decay": -1}])
def test_invalid_settings_raise(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Optimization(**wrong)


@pytest.mark.parametrize(
    ("name", "first", "last", "steps", "options"),
    [
        ("lr_linear_bs256_epochs100_warm10_iters7", 1e-3, 1e-6, 700, {"warmup_steps": 70}),
        ("wd_0p04_to_0p4_epochs100_iters7", 0.04, 0.4, 700, {}),
        ("lr_deit_bs1024_epochs300_warm5_iters3", 2e-3, 1e-5, 900, {"warmup_steps": 15, "warmup_from": 1e-6}),
    ],
)
def test_schedules_are_the_published_ones(name, first, last, steps, options):
    np.testing.assert_allclose(
        cosine_schedule(first, last, steps, **options), np.load(GOLDEN / "_schedules.npz")[name], rtol=1e-12
    )


def test_a_warmup_longer_than_the_training_is_cut():
    np.testing.assert_allclose(cosine_schedule(1.0, 0.0, 3, warmup_steps=10), [0.0, 0.5, 1.0])


def test_equal_values_give_a_constant():
    assert set(cosine_schedule(0.05, 0.05, 9)) == {0.05}
