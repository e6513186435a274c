"""Promises of the stock Trainer that people rely on, kept by DualSpeedTrainer; a Baseline's numbers are stock's."""

import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from torch.utils.data import IterableDataset
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LabelSmoother

from dualspeed import DualSpeedConfig, DualSpeedModel, DualSpeedTrainer
from dualspeed.errors import ConfigError, ModelError
from tests.support import tiny
from tests.support.batches import IMAGE_TOKEN
from tests.support.stock import (
    BASELINE,
    FAST,
    NOT_LOGITS,
    assert_same_logs,
    assert_same_weights,
    both,
    collate_rows,
    logged,
    make,
    rows,
    weights,
)


def test_a_baseline_has_the_stock_trainers_log_and_weights(tmp_path):
    stock, ours = both(tmp_path, eval_strategy="steps", eval_steps=2, gradient_accumulation_steps=2, max_steps=2)
    stock.train()
    ours.train()
    assert_same_logs(stock, ours)
    assert_same_weights(stock, ours)


def test_positional_arguments_are_those_of_the_stock_trainer(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = DualSpeedTrainer(tiny.llava(), args, collate_rows, rows(), rows(7))
    assert trainer.data_collator is collate_rows
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (16, 7)
    assert trainer.dualspeed == DualSpeedConfig()


# Losses


def test_label_smoothing_is_that_of_the_stock_smoother(tmp_path):
    """The stock Trainer smooths a VLM's loss against labels that it forgets to shift; this is what it means."""
    smoothed = make(DualSpeedTrainer, tmp_path, label_smoothing_factor=0.3, per_device_train_batch_size=16, max_steps=1)
    smoothed.train()
    batch, model = collate_rows(list(rows())), tiny.llava()
    outputs = model(**{name: values for name, values in batch.items() if name != "labels"})
    expected = LabelSmoother(epsilon=0.3)(outputs, batch["labels"], shift_labels=True)
    assert logged(smoothed)[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() != pytest.approx(model(**batch).loss.item(), rel=1e-3)


def test_label_smoothing_acts_in_fast_mode(tmp_path):
    plain, smoothed = (
        make(DualSpeedTrainer, tmp_path, dualspeed=FAST, label_smoothing_factor=factor, max_steps=1)
        for factor in (0.0, 0.3)
    )
    plain.train()
    smoothed.train()
    assert logged(plain)[0]["loss"] != pytest.approx(logged(smoothed)[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_scale_of_the_loss_is_stocks_on_ranks_that_share_a_batch(tmp_path, monkeypatch, tensor_parallel):
    monkeypatch.setattr(Trainer, "get_tp_size", lambda self: tensor_parallel)
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 4)
    batch, losses = collate_rows(list(rows(4))), []
    for trainer in both(tmp_path):
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(20)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    alone = trainer.model(**batch, num_items_in_batch=20).loss.item()
    assert losses[1] == pytest.approx(4 / tensor_parallel * alone, rel=1e-5)


def half_the_loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch / 2


def test_compute_loss_func_makes_the_loss(tmp_path):
    stock, ours = both(tmp_path, compute_loss_func=half_the_loss, gradient_accumulation_steps=2, max_steps=2)
    stock.train()
    ours.train()
    assert_same_logs(stock, ours)
    assert_same_weights(stock, ours)


def test_compute_loss_func_gets_the_pruned_sequences_in_fast_mode(tmp_path):
    lengths = []

    def loss(outputs, labels, num_items_in_batch=None):
        lengths.append((outputs["logits"].shape[1], labels.shape[1]))
        return half_the_loss(outputs, labels, num_items_in_batch)

    fast = make(DualSpeedTrainer, tmp_path, dualspeed=FAST, compute_loss_func=loss)
    fast.train()
    longest = collate_rows(list(rows()))["input_ids"].shape[1]
    assert lengths and all(one == other < longest for one, other in lengths)


def test_compute_loss_func_beside_distillation_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"compute_loss_func.*valid: DualSpeedConfig\(distillation_weight=0\)"):
        make(DualSpeedTrainer, tmp_path, dualspeed=DualSpeedConfig(), compute_loss_func=half_the_loss)
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        make(DualSpeedTrainer, tmp_path, compute_loss_func=half_the_loss, label_smoothing_factor=0.1)


def test_labels_of_image_placeholders_are_ignored_and_said_once(tmp_path, caplog):
    def with_image_labels(batch):
        made = collate_rows(batch)
        is_image = made["input_ids"] == IMAGE_TOKEN
        return made | {"labels": torch.where(is_image, made["input_ids"], made["labels"])}

    settings = DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.7)
    one = make(DualSpeedTrainer, tmp_path, dualspeed=settings)
    other = make(DualSpeedTrainer, tmp_path, dualspeed=settings, data_collator=with_image_labels)
    one.train()
    other.train()
    said = [record.message for record in caplog.records if "image placeholders" in record.message]
    assert len(said) == 1
    assert_same_logs(one, other, rel=1e-6)
    assert one.evaluate()["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"], rel=1e-6)


# Optimizers


def test_the_optimizer_class_that_is_asked_for_trains(tmp_path):
    stock, ours = both(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}))
    stock.train()
    ours.train()
    assert isinstance(ours.optimizer.optimizer, torch.optim.SGD)
    assert_same_logs(stock, ours)
    assert_same_weights(stock, ours)


def test_a_given_optimizer_trains_as_it_is(tmp_path):
    trainers = []
    for kind in (Trainer, DualSpeedTrainer):
        model = tiny.llava()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        trainers.append(make(kind, tmp_path / kind.__name__, model, optimizers=(optimizer, None)))
        trainers[-1].train()
    assert_same_logs(*trainers)
    assert_same_weights(*trainers)
    assert trainers[1].state.log_history[0]["learning_rate/0"] == 0.1


def test_learning_rates_without_an_effect_are_refused(tmp_path):
    model = tiny.llava()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="projector_learning_rate: has no effect on the optimizer"):
        make(DualSpeedTrainer, tmp_path, model, optimizers=(optimizer, None), projector_learning_rate=0.1)
    model.model.multi_modal_projector.requires_grad_(False)
    no_isolator = DualSpeedConfig(num_virtual_tokens=0)
    with pytest.raises(ConfigError, match=r"projector_learning_rate: 0\.1 has no effect, since no parameter"):
        make(DualSpeedTrainer, tmp_path, model, dualspeed=no_isolator, projector_learning_rate=0.1)


def test_the_tower_is_frozen_unless_it_has_a_learning_rate(tmp_path):
    model = tiny.llava().requires_grad_(True)
    tower = model.model.vision_tower
    make(DualSpeedTrainer, tmp_path, model)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    make(DualSpeedTrainer, tmp_path, model, vision_learning_rate=0.0)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    trainer = make(DualSpeedTrainer, tmp_path, model, vision_learning_rate=1e-2)
    before = {name: values.clone() for name, values in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, values in trainer.model.named_parameters() if not torch.equal(values, before[name])}
    trained = {name for name, values in trainer.model.named_parameters() if values.requires_grad}
    assert changed == trained - {"mode_isolator.weight"}
    assert any("vision_tower" in name for name in changed)


# Evaluation


def test_predictions_have_the_stock_form(tmp_path):
    seen = []

    def metrics(predicted):
        seen.append(predicted)
        return {"rows": len(predicted.predictions)}

    # Stock predictions of batches with and without an image don't fit together.
    one_image = Dataset.from_list([{"seed": seed, "num_images": 1} for seed in range(7)])
    stock, ours = both(tmp_path, compute_metrics=metrics, eval_dataset=one_image)
    stock_metrics, our_metrics = (trainer.evaluate(ignore_keys=NOT_LOGITS) for trainer in (stock, ours))
    assert our_metrics["eval_loss"] == pytest.approx(stock_metrics["eval_loss"], rel=1e-5)
    stock_logits = seen[0].predictions[0] if isinstance(seen[0].predictions, tuple) else seen[0].predictions
    real = seen[0].label_ids != -100
    real[:, :-1] |= real[:, 1:]  # the positions that predict
    assert seen[1].predictions.shape == stock_logits.shape
    np.testing.assert_array_equal(seen[1].label_ids, seen[0].label_ids)
    np.testing.assert_allclose(seen[1].predictions[real], stock_logits[real], atol=1e-4)
    predicted = ours.predict(one_image)
    np.testing.assert_allclose(predicted.predictions[real], stock_logits[real], atol=1e-4)
    assert predicted.metrics["test_rows"] == 7


def test_predicting_without_labels_gives_logits(tmp_path):
    def without_labels(batch):
        return {name: values for name, values in collate_rows(batch).items() if name != "labels"}

    ours = make(DualSpeedTrainer, tmp_path, data_collator=without_labels)
    predicted = ours.predict(rows(7))
    assert predicted.predictions.shape[::2] == (7, 64)
    assert predicted.label_ids is None


def test_evaluation_on_pruned_tokens_has_names_of_its_own(tmp_path):
    settings = DualSpeedConfig(pruning_ratio=0.7)
    trainer = make(DualSpeedTrainer, tmp_path, dualspeed=settings, eval_mode="both")
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] != pytest.approx(metrics["eval_fast_loss"], rel=1e-4)
    fast = make(DualSpeedTrainer, tmp_path, dualspeed=settings, eval_mode="fast").evaluate()
    assert "eval_loss" not in fast
    assert fast["eval_fast_loss"] == pytest.approx(metrics["eval_fast_loss"], rel=1e-6)
    with pytest.raises(ConfigError, match="eval_mode: 'quick' is unknown; valid: slow, fast, both"):
        make(DualSpeedTrainer, tmp_path, eval_mode="quick")


def test_a_dict_of_evaluation_sets_is_evaluated_as_stock_does(tmp_path):
    sets = {"few": rows(3), "more": rows(7)}
    stock, ours = both(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=2)
    stock.train()
    ours.train()
    assert_same_logs(stock, ours)
    rates = [entry["samples_per_second"] for entry in ours.state.log_history if "samples_per_second" in entry]
    assert len(rates) == 4 and min(rates) > 0


def test_an_evaluation_moves_no_random_state(tmp_path):
    def noisy(batch):
        random.random(), np.random.rand(), torch.rand(())
        return collate_rows(batch)

    trainer = make(DualSpeedTrainer, tmp_path, data_collator=noisy)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trainer.evaluate()
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert (after[:2], after[2].tolist()) == (before[:2], before[2].tolist())


# Checkpoints


@pytest.mark.parametrize("settings", [BASELINE, FAST])
def test_the_best_model_is_loaded_at_the_end(tmp_path, settings):
    trainer = make(
        DualSpeedTrainer,
        tmp_path,
        dualspeed=settings,
        greater_is_better=True,  # the best model is then the first
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(losses, key=losses.get)
    assert best < max(losses), "the last step is the best one, so that the test shows nothing"
    saved = DualSpeedModel.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert_close(trainer.model.state_dict(), saved.state_dict(), atol=0, rtol=0)
    assert trainer.evaluate()["eval_loss"] == losses[best]


def test_a_folder_that_lost_its_isolator_is_refused(tmp_path):
    trainer = make(DualSpeedTrainer, tmp_path, dualspeed=FAST, max_steps=1)
    trainer.save_model(str(tmp_path / "out"))
    (tmp_path / "out" / "mode_isolator.safetensors").unlink()
    with pytest.raises(ModelError, match=r"out: mode_isolator.safetensors is missing"):
        DualSpeedModel.from_pretrained(tmp_path / "out")


def test_the_files_of_a_saved_model_are_those_of_the_stock_trainer_and_ours(tmp_path):
    stock, ours = both(tmp_path)
    stock.save_model(str(tmp_path / "a"))
    ours.save_model(str(tmp_path / "b"))
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[1] - files[0] == {"dualspeed.json", "mode_isolator.safetensors"}
    assert files[0] <= files[1]


# Everything else


def test_neftune_adds_noise_to_the_embeddings_as_stock_does(tmp_path):
    stock, ours = both(tmp_path, neftune_noise_alpha=5.0)
    plain = make(DualSpeedTrainer, tmp_path / "plain")
    for trainer in (stock, ours, plain):
        set_seed(0)
        trainer.train()
    assert_same_logs(stock, ours)
    assert logged(plain)[0]["loss"] != pytest.approx(logged(ours)[0]["loss"], rel=1e-3)


def test_model_init_makes_the_model_of_each_training(tmp_path):
    stock, ours = both(tmp_path, model_init=lambda: tiny.llava())
    for trainer in (stock, ours):
        trainer.train()
    assert isinstance(ours.model, DualSpeedModel)
    assert_same_logs(stock, ours)
    assert_same_weights(stock, ours)
    first = {name: values.clone() for name, values in ours.model.state_dict().items()}
    ours.train()
    assert_close(ours.model.state_dict(), first, atol=0, rtol=0)


def test_a_search_chooses_settings_of_the_method(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = []

    class Recording(DualSpeedTrainer):
        def create_optimizer(self, model=None):
            config = self.inner_model.dualspeed
            settings.append((config.pruning_ratio, config.slow_mode_ratio, self.args.learning_rate))
            return super().create_optimizer(model)

    trainer = make(Recording, tmp_path, model_init=lambda: tiny.llava(), dualspeed=FAST, eval_strategy="epoch")

    def space(trial):
        return {
            "pruning_ratio": trial.suggest_float("pruning_ratio", 0.5, 0.9),
            "slow_mode_ratio": trial.suggest_float("slow_mode_ratio", 0.0, 1.0),
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2),
        }

    best = trainer.hyperparameter_search(space, n_trials=3, direction="minimize", backend="optuna")
    assert len(set(settings)) == 3
    names = ("pruning_ratio", "slow_mode_ratio", "learning_rate")
    assert tuple(best.hyperparameters[name] for name in names) in settings


def test_the_first_record_after_a_smaller_batch_is_found_holds_that_attempt_alone(tmp_path, monkeypatch):
    trainer = make(DualSpeedTrainer, tmp_path, auto_find_batch_size=True, dualspeed=FAST, logging_steps=4)
    stock = DualSpeedTrainer.training_step
    calls = []

    def failing(self, model, inputs, num_items_in_batch=None):
        calls.append(len(inputs["input_ids"]))
        loss = stock(self, model, inputs, num_items_in_batch)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory. (in a test)")
        return loss

    monkeypatch.setattr(DualSpeedTrainer, "training_step", failing)
    trainer.train()
    assert calls[:3] == [4, 4, 3]
    record = trainer.state.log_history[0]
    assert record["fast/ce_loss"] == pytest.approx(record["loss"], rel=1e-5)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"seed": seed, "num_images": 2} for seed in range(16)])


def test_streams_of_samples_with_two_images_train(tmp_path):
    stream = make(DualSpeedTrainer, tmp_path / "a", train_dataset=Stream(), dualspeed=FAST)
    listed = Dataset.from_list(list(Stream()))
    whole = make(
        DualSpeedTrainer, tmp_path / "b", train_dataset=listed, dualspeed=FAST, train_sampling_strategy="sequential"
    )
    stream.train()
    whole.train()
    assert stream.args.accelerator_config.dispatch_batches is False
    assert_same_logs(whole, stream, rel=1e-6)


def test_mixed_dtypes_without_mixed_precision_are_refused(tmp_path):
    model = tiny.llava()
    model.model.vision_tower.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"weights are in bfloat16 and float32.*bf16=True"):
        make(DualSpeedTrainer, tmp_path, model)
    make(DualSpeedTrainer, tmp_path, model, bf16=True).train()


def test_a_bfloat16_checkpoint_trains_as_it_is(tmp_path):
    trainer = make(DualSpeedTrainer, tmp_path, tiny.llava().to(torch.bfloat16), dualspeed=FAST)
    trainer.train()
    assert {values.dtype for values in trainer.model.state_dict().values()} == {torch.bfloat16}
    trainer.save_model(str(tmp_path / "out"))
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ConfigError, match=r"2 GPUs in one process.*torchrun"):
        make(DualSpeedTrainer, tmp_path)


def test_weights_are_unchanged_by_being_compared(tmp_path):
    """The helper compares something: another seed gives other weights."""
    stock, ours = both(tmp_path)
    other = make(DualSpeedTrainer, tmp_path / "other", tiny.llava(seed=1))
    assert_same_weights(stock, ours)
    assert not torch.equal(weights(other)["lm_head.weight"], weights(ours)["lm_head.weight"])
