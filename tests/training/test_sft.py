"""DualSpeedSFTTrainer: with a Baseline's settings TRL's numbers, else the method's; from TRL's data and arguments."""

import os
import subprocess
import sys
from dataclasses import replace

import datasets
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments
from trl import SFTTrainer

import dualspeed.trl
from dualspeed import ConversationCollator, DualSpeedConfig, DualSpeedModel
from dualspeed.errors import ConfigError, MissingPackageError
from dualspeed.trl import DualSpeedSFTTrainer
from tests.support.paths import REPOSITORY
from tests.support.sft import FAMILY, both_sft, make_sft, rows, said
from tests.support.stock import FAST, assert_same_logs, assert_same_weights, logged, weights
from tests.support.tiny_chat import tiny_chat, tiny_parts

MIXED = DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.7)
TRLS = ("entropy", "mean_token_accuracy", "num_tokens")
KINDS = ("messages", "prompt and completion")


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_has_trls_log_and_weights(tmp_path, kind):
    stock, ours = both_sft(
        tmp_path, kind, eval_dataset=rows(kind).select(range(3)), eval_strategy="steps", eval_steps=2
    )
    stock.model.model.vision_model.requires_grad_(False)
    before = {name: values.clone() for name, values in weights(ours).items()}
    stock.train()
    ours.train()
    assert set(TRLS) <= set(logged(ours)[0])
    assert_same_logs(stock, ours, rel=1e-5)
    assert_same_weights(stock, ours)
    assert sum(not torch.equal(values, before[name]) for name, values in weights(ours).items()) > 10


def test_a_baseline_of_a_qwen_vl_has_trls_log_and_weights(tmp_path):
    """TRL's collator gives no 3-D positions. Without accumulation, since stock Qwen-VLs take no counts of tokens."""
    batch = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    stock, ours = both_sft(tmp_path, "messages", family="qwen3_vl", **batch)
    for name, parameter in ours.model.vlm.named_parameters():
        stock.model.get_parameter(name).requires_grad_(parameter.requires_grad)
    stock.train()
    ours.train()
    assert_same_logs(stock, ours, rel=1e-5)
    assert_same_weights(stock, ours)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    command = [*launcher, "-m", "tests.support.sft_worker", str(folder), *KINDS]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_on_two_ranks_has_trls_log_and_weights(two_ranks, kind):
    stock, ours = (torch.load(two_ranks / kind / f"{name}.pt", weights_only=True) for name in ("stock", "ours"))
    assert stock["world"] == ours["world"] == 2
    for one, other in zip(stock["log"], ours["log"], strict=True):
        assert {key: other[key] for key in one} == pytest.approx(one, rel=1e-5, abs=1e-6)
    assert_close(ours["weights"], stock["weights"], atol=1e-5, rtol=1e-4)


def test_rows_without_images_go_through_trls_pipeline(tmp_path):
    texts = [{"messages": [said("user", f"What is {n}?"), said("assistant", "no " * n)]} for n in range(1, 9)]
    stock, ours = both_sft(tmp_path, "messages", train_dataset=datasets.Dataset.from_list(texts))
    stock.model.model.vision_model.requires_grad_(False)
    stock.train()
    ours.train()
    assert "labels" in ours.train_dataset.column_names  # TRL tokenized them
    assert_same_logs(stock, ours, rel=1e-5)
    assert_same_weights(stock, ours)


def test_a_fast_step_reads_pruned_tokens_and_logs_their_metrics(tmp_path):
    slow = make_sft(DualSpeedSFTTrainer, tmp_path / "slow", max_steps=1)
    fast = make_sft(
        DualSpeedSFTTrainer,
        tmp_path / "fast",
        dualspeed=replace(FAST, num_virtual_tokens=1),
        max_steps=16,
        lr_scheduler_type="constant",
        eval_dataset=rows("messages"),
        eval_mode="both",
    )
    lengths = []
    fast.model.vlm.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    slow.train()
    fast.train()
    full = fast.data_collator(list(fast.train_dataset))["input_ids"].shape[1]
    assert len(lengths) == 32 and max(lengths) == full - 10
    assert logged(fast)[0]["entropy"] != pytest.approx(logged(slow)[0]["entropy"], rel=1e-6)
    assert logged(fast)[15]["loss"] < logged(fast)[0]["loss"] / 2
    metrics = fast.evaluate()
    logs = {key: value for entry in fast.state.log_history for key, value in entry.items()}
    assert metrics["eval_loss"] != metrics["eval_fast_loss"]
    assert logs["eval_entropy"] != logs["eval_fast_entropy"]


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    save = {"dualspeed": MIXED, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_sft(DualSpeedSFTTrainer, tmp_path / "whole", **save)
    whole.train()
    resumed = make_sft(DualSpeedSFTTrainer, tmp_path / "resumed", **save)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_close(weights(resumed), weights(whole), atol=0, rtol=0)
    assert logged(resumed)[:4] == logged(whole)[:4]  # the last record is stock's mean over the steps of this start


def test_the_saved_model_is_stock_and_its_forward_its_own(tmp_path):
    trainer = make_sft(DualSpeedSFTTrainer, tmp_path, dualspeed=FAST)
    vlm = trainer.model.vlm
    assert "forward" not in vars(vlm) and vlm.forward.__func__ is type(vlm).forward
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert_close(loaded.state_dict(), weights(trainer), atol=0, rtol=0)
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template
    assert DualSpeedModel.from_pretrained(tmp_path / "out").dualspeed == FAST


def test_a_forward_of_the_model_before_trl_comes_back(tmp_path):
    model, _ = tiny_parts(FAMILY)
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before = model.forward
    assert make_sft(DualSpeedSFTTrainer, tmp_path, model=model).model.vlm.forward is before


def test_a_models_name_and_training_arguments_are_enough(tmp_path):
    folder = tiny_chat(FAMILY, tmp_path / "base")
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[], max_steps=1, disable_tqdm=True)
    trainer = DualSpeedSFTTrainer(folder, args, train_dataset=rows(KINDS[1]), dualspeed=FAST)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert type(trainer.processing_class).__name__ == "Idefics3Processor"


def test_our_collator_reads_rows_in_any_format(tmp_path):
    _, processor = tiny_parts(FAMILY)
    pairs = [{"conversations": [{"from": "human", "value": f"<image>\nWhat is {n}?"}, {"from": "gpt", "value": "no"}],
              "images": row["images"]} for n, row in enumerate(rows("messages"))]  # fmt: skip
    trainer = make_sft(
        DualSpeedSFTTrainer,
        tmp_path,
        dualspeed=MIXED,
        train_dataset=datasets.Dataset.from_list(pairs),
        data_collator=ConversationCollator(processor, with_num_images=True),
        slow_batch_size=1,
        assistant_only_loss=False,
    )
    trainer.train()
    assert trainer.state.global_step == 3


REFUSED = {
    "packing": ({"packing": True}, "packing: pruning needs each sample in a row of its own; valid: False"),
    "padding-free rows": ({"padding_free": True}, "padding_free: pruning needs each sample"),
    "packed evaluation": ({"eval_packing": True}, "eval_packing: pruning needs each sample"),
    "another loss": ({"loss_type": "dft"}, "loss_type: 'dft', .*valid: 'nll'"),
    "offloading": ({"activation_offloading": True}, "activation_offloading: .*valid: False"),
    "selective recomputing": ({"gradient_checkpointing_kwargs": {"selective": True}}, "'selective'.*valid: without"),
    "a pruner that reads questions": ({"dualspeed": DualSpeedConfig(pruner="cdpruner")}, "pruner 'cdpruner': needs"),
    "smaller slow batches": ({"slow_batch_size": 1}, "slow_batch_size: needs .*ConversationCollator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_goes_with_trl_alone_is_refused_at_the_start(tmp_path, name):
    given, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as raised:
        make_sft(DualSpeedSFTTrainer, tmp_path, **given)
    assert "\n" not in str(raised.value)


def test_losses_of_the_experts_balance_are_refused(tmp_path):
    def experts(model):
        model.config.get_text_config().output_router_logits = False
        model.config.get_text_config().router_aux_loss_coef = 0.01
        return model

    with pytest.raises(ConfigError, match=r"router_aux_loss_coef: 0\.01, .*valid: SFTConfig\(router_aux_loss_coef=0"):
        make_sft(DualSpeedSFTTrainer, tmp_path, model=experts)
    make_sft(DualSpeedSFTTrainer, tmp_path, model=experts, router_aux_loss_coef=0.0)


def test_a_dualspeed_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="valid: its stock model"):
        make_sft(DualSpeedSFTTrainer, tmp_path, model=lambda model: DualSpeedModel(model, FAST))


def test_missing_trl_is_one_sentence(monkeypatch):
    monkeypatch.setattr(dualspeed.trl, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"needs trl, which is not installed; valid: pip install") as raised:
        dualspeed.trl.DualSpeedSFTTrainer  # noqa: B018  # it is imported at its first use
    assert "\n" not in str(raised.value) and isinstance(raised.value, ImportError)
    assert "trl" in sys.modules  # SFTTrainer is there
    assert issubclass(DualSpeedSFTTrainer, SFTTrainer)
