"""Fields of TrainingArguments for programs and hardware that this machine lacks: they reach stock code, or are refused.

What isn't here (GaLore, Liger, a GPU with TF32) is replaced by a stand-in that records what it gets.
"""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch._dynamo import OptimizedModule
from transformers import Trainer, set_seed, training_args

from dualspeed import DualSpeedConfig, DualSpeedTrainer
from dualspeed.errors import ConfigError
from tests.support import tiny
from tests.support.stock import BASELINE, FAST, assert_same_logs, assert_same_weights, both, make

MIXED = DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.7)
WITHOUT_TEACHER = replace(MIXED, distillation_weight=0)  # which takes most of the time to compile
LOW_RANK = {"optim": "galore_adamw", "optim_target_modules": [r".*language_model.*q_proj"], "optim_args": "rank=7"}


@pytest.fixture
def galore(monkeypatch):
    """Stand-in of GaLore, whose optimizers are AdamW."""
    module = ModuleType("galore_torch")
    for name in ("GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor"):
        setattr(module, name, type(name, (torch.optim.AdamW,), {}))
    monkeypatch.setitem(sys.modules, "galore_torch", module)
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)


def ranks(trainer: Trainer) -> dict[str, int | None]:
    """Rank of each trained parameter in the optimizer, by the parameter's stock name."""
    names = {parameter: name.removeprefix("vlm.") for name, parameter in trainer.model.named_parameters()}
    return {
        names[parameter]: group.get("rank")
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }


def test_low_rank_optimizers_get_the_models_modules(tmp_path, galore):
    def with_frozen_tower():
        return tiny.frozen_tower(tiny.llava())

    stock, ours = both(tmp_path, with_frozen_tower, **LOW_RANK)
    for trainer in (stock, ours):
        trainer.train()
    expected, found = ranks(stock), ranks(ours)
    assert set(expected.values()) == {None, 7}
    assert {name: found[name] for name in expected} == expected
    assert found["mode_isolator.weight"] is None
    names = [group["name"] for group in ours.optimizer.param_groups]
    assert len(set(names)) == len(names)
    assert_same_logs(stock, ours)
    assert_same_weights(stock, ours)
    make(DualSpeedTrainer, tmp_path, dualspeed=FAST, projector_learning_rate=1e-3, **LOW_RANK).train()


LAYERWISE = LOW_RANK | {"optim": "galore_adamw_layerwise"}


def test_layerwise_optimizers_train_where_the_isolator_stays_as_it_is(tmp_path, galore):
    stock, ours = both(tmp_path, lambda: tiny.frozen_tower(tiny.llava()), **LAYERWISE)
    for trainer in (stock, ours):
        trainer.train()
    assert_same_logs(stock, ours)
    assert_same_weights(stock, ours)
    with pytest.raises(ConfigError, match=r"optim: 'galore_adamw_layerwise' updates inside.*valid: 'galore_adamw'"):
        make(DualSpeedTrainer, tmp_path, dualspeed=MIXED, **LAYERWISE)
    with pytest.raises(ConfigError, match="projector_learning_rate: optim 'galore_adamw_layerwise' has one"):
        make(DualSpeedTrainer, tmp_path, dualspeed=FAST, projector_learning_rate=1e-3, **LAYERWISE)


@pytest.mark.slow
def test_a_compiled_model_trains_as_one_that_is_not(tmp_path):
    """By the backend `eager`: what is compiled is the same as with others, but no C++ compiler is needed."""
    trainers = []
    try:
        for given in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
            trainers.append(make(DualSpeedTrainer, tmp_path, dualspeed=WITHOUT_TEACHER, max_steps=2, **given))
            set_seed(0)
            trainers[-1].train()
    finally:
        torch._dynamo.reset()
    plain, compiled = trainers
    assert isinstance(compiled.model_wrapped, OptimizedModule)
    assert not isinstance(plain.model_wrapped, OptimizedModule)
    assert {"fast/ce_loss", "slow/ce_loss"} <= {name for record in plain.state.log_history for name in record}
    assert_same_logs(plain, compiled)
    assert_same_weights(plain, compiled)


def test_the_mode_of_compilation_reaches_accelerate(tmp_path):
    trainer = make(DualSpeedTrainer, tmp_path, torch_compile_mode="max-autotune", torch_compile_backend="eager")
    plugin = trainer.accelerator.state.dynamo_plugin
    assert (plugin.backend.value, plugin.mode) == ("EAGER", "max-autotune")


@pytest.fixture
def liger(monkeypatch) -> list[dict]:
    """Stand-in of Liger; the arguments of its calls."""
    calls: list[dict] = []
    module, package = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel")
    module._apply_liger_kernel_to_instance = lambda **arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    return calls


@pytest.mark.parametrize("settings", [BASELINE, FAST])
def test_liger_gets_the_stock_model(tmp_path, liger, settings):
    given = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}}
    trainer = make(DualSpeedTrainer, tmp_path, dualspeed=settings, max_steps=1, **given)
    trainer.train()
    assert liger == [{"model": trainer.model.vlm, "rope": False, "fused_linear_cross_entropy": False}]
    with pytest.raises(ConfigError, match="liger_kernel_config: fused_linear_cross_entropy replaces the forward"):
        make(
            DualSpeedTrainer,
            tmp_path,
            use_liger_kernel=True,
            liger_kernel_config={"fused_linear_cross_entropy": True},
        )


def test_tf32_reaches_torch(tmp_path, monkeypatch):
    switched = []
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(training_args, "enable_tf32", switched.append)
    make(DualSpeedTrainer, tmp_path, dualspeed=FAST, tf32=True, max_steps=1).train()
    make(DualSpeedTrainer, tmp_path, tf32=False)
    assert switched == [True, False]


def test_streams_that_one_process_would_cut_up_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"accelerator_config: dispatch_batches=True collates.*valid: None or False"):
        make(DualSpeedTrainer, tmp_path, accelerator_config={"dispatch_batches": True})
