"""Every argument of `Trainer.__init__` and every public method: as in the stock Trainer at a Baseline's settings."""

import inspect
import json
import shutil

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from dualspeed import DualSpeedConfig, DualSpeedTrainer
from tests.support.stock import (
    BASELINE,
    FAST,
    NOT_LOGITS,
    Recorder,
    assert_same_logs,
    assert_same_weights,
    both,
    collate_rows,
    logged,
    make,
    rows,
    weights,
)

PROMISES = "tests/training/test_stock_promises.py"
ARGUMENTS = {
    "model": PROMISES,
    "args": "tests/training/test_training_arguments.py",
    "data_collator": PROMISES,
    "train_dataset": PROMISES,
    "eval_dataset": PROMISES,
    "processing_class": "tests/training/test_ten_lines.py",
    "model_init": PROMISES,
    "compute_loss_func": PROMISES,
    "compute_metrics": PROMISES,
    "callbacks": "test_callbacks_see_the_same_events",
    "optimizers": PROMISES,
    "optimizer_cls_and_kwargs": PROMISES,
    "preprocess_logits_for_metrics": "test_preprocessed_predictions_are_the_same",
}
METHODS = {
    "add_callback": "test_callbacks_come_and_go",
    "autocast_smart_context_manager": "stock",
    "call_model_init": PROMISES,
    "compute_loss": "test_a_subclass_may_wrap_the_loss",
    "compute_loss_context_manager": "stock",
    "create_accelerator_and_postprocess": "tests/training/test_sharding.py",
    "create_model_card": "tests/training/test_hub.py",
    "create_optimizer": "test_a_subclass_may_make_the_optimizer",
    "create_optimizer_and_scheduler": "test_a_subclass_may_make_the_optimizer",
    "create_scheduler": "stock",
    "end": "stock",
    "evaluate": PROMISES,
    "evaluation_loop": "stock",
    "floating_point_ops": PROMISES,
    "get_batch_samples": PROMISES,
    "get_cp_size": "stock",
    "get_decay_parameter_names": "stock",
    "get_learning_rates": "stock",
    "get_num_trainable_parameters": "stock",
    "get_optimizer_group": "stock",
    "log_metrics": "stock",
    "metrics_format": "stock",
    "save_metrics": "stock",
    "save_state": "stock",
    "get_eval_dataloader": "stock",
    "get_optimizer_cls_and_kwargs": "stock",
    "get_sp_size": "stock",
    "get_test_dataloader": "stock",
    "get_total_train_batch_size": "stock",
    "get_tp_size": "stock",
    "get_train_dataloader": "test_a_subclass_may_make_the_data_loader",
    "hyperparameter_search": PROMISES,
    "init_hf_repo": "tests/training/test_hub.py",
    "is_local_process_zero": "stock",
    "is_world_process_zero": "stock",
    "log": PROMISES,
    "num_examples": "stock",
    "pop_callback": "test_callbacks_come_and_go",
    "predict": PROMISES,
    "prediction_step": PROMISES,
    "push_to_hub": "tests/training/test_hub.py",
    "remove_callback": "test_callbacks_come_and_go",
    "save_model": PROMISES,
    "set_initial_training_values": "stock",
    "store_flos": "stock",
    "train": "test_each_way_of_resuming",
    "training_step": PROMISES,
}


def test_every_argument_and_method_has_a_row():
    assert set(inspect.signature(Trainer.__init__).parameters) - {"self"} == ARGUMENTS.keys()
    public = {name for name, value in vars(Trainer).items() if callable(value) or isinstance(value, staticmethod)}
    assert {name for name in public if not name.startswith("_")} == METHODS.keys()
    here = {name for name in globals() if name.startswith("test_")}
    assert {place for place in (ARGUMENTS | METHODS).values() if place.startswith("test_")} <= here


def test_preprocessed_predictions_are_the_same(tmp_path):
    def most_probable(logits, labels):
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    seen = []

    def metrics(predicted):
        real = predicted.label_ids[:, 1:] != -100
        seen.append((predicted.predictions[:, :-1][real].tolist(), predicted.label_ids.tolist()))
        return {"right": 1.0}

    for trainer in both(tmp_path, compute_metrics=metrics, preprocess_logits_for_metrics=most_probable):
        assert trainer.evaluate(ignore_keys=NOT_LOGITS)["eval_right"] == 1.0
    assert seen[0] == seen[1]


def test_callbacks_see_the_same_events(tmp_path):
    stock, ours = Recorder(), Recorder()
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make(Trainer, tmp_path / "a", callbacks=[stock], gradient_accumulation_steps=2, max_steps=2, **options).train()
    make(
        DualSpeedTrainer, tmp_path / "b", callbacks=[ours], gradient_accumulation_steps=2, max_steps=2, **options
    ).train()
    assert ours.events == stock.events
    assert {"on_init_end", "on_substep_end", "on_pre_optimizer_step", "on_save", "on_evaluate"} <= set(ours.events)


def test_callbacks_come_and_go(tmp_path):
    trainer, recorder = make(DualSpeedTrainer, tmp_path), Recorder()
    trainer.add_callback(recorder)
    assert trainer.pop_callback(Recorder) is recorder
    trainer.add_callback(recorder)
    trainer.remove_callback(Recorder)
    trainer.train()
    assert recorder.events == []


class Seen(TrainerCallback):
    """Classes of what callbacks get."""

    def on_step_end(self, args, state, control, **kwargs):
        self.found = {name: type(value).__name__ for name, value in kwargs.items()}


def test_callbacks_get_what_stock_ones_get(tmp_path):
    seen = []
    for kind in (Trainer, DualSpeedTrainer):
        seen.append(Seen())
        make(kind, tmp_path, callbacks=[seen[-1]]).train()
    assert seen[1].found == seen[0].found | {"model": "DualSpeedModel"}


def test_a_subclass_may_wrap_the_loss(tmp_path):
    def doubled(kind):
        class Doubled(kind):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                assert outputs["logits"].dim() == 3
                return (2 * loss, outputs) if return_outputs else 2 * loss

        return Doubled

    trainers = [make(doubled(kind), tmp_path / kind.__name__) for kind in (Trainer, DualSpeedTrainer)]
    for trainer in trainers:
        trainer.train()
    assert_same_logs(*trainers)
    assert_same_weights(*trainers)


def test_a_subclass_may_make_the_optimizer(tmp_path):
    def with_sgd(kind):
        class WithSgd(kind):
            def create_optimizer(self, model=None):
                if self.optimizer is None:
                    self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.2)
                return self.optimizer

        return WithSgd

    trainers = [make(with_sgd(kind), tmp_path / kind.__name__) for kind in (Trainer, DualSpeedTrainer)]
    for trainer in trainers:
        trainer.train()
    assert_same_logs(*trainers)
    assert_same_weights(*trainers)


def test_a_subclass_may_make_the_data_loader(tmp_path):
    def in_order(kind):
        class InOrder(kind):
            def get_train_dataloader(self):
                loader = DataLoader(self.train_dataset, batch_size=3, collate_fn=self.data_collator)
                return self.accelerator.prepare(loader)

        return InOrder

    trainers = [make(in_order(kind), tmp_path / kind.__name__) for kind in (Trainer, DualSpeedTrainer)]
    for trainer in trainers:
        trainer.train()
    assert_same_logs(*trainers)


SAVING = {"save_strategy": "steps", "save_steps": 2}
MIXED = DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.7)


@pytest.mark.parametrize("how", ["path", "last"])
@pytest.mark.parametrize("settings", [BASELINE, MIXED])
def test_each_way_of_resuming(tmp_path, how, settings):
    whole = make(DualSpeedTrainer, tmp_path, dualspeed=settings, **SAVING)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = make(DualSpeedTrainer, tmp_path, dualspeed=settings, **SAVING)
    resumed.train(resume_from_checkpoint=True if how == "last" else str(tmp_path / "checkpoint-2"))
    assert logged(resumed)[-2]["loss"] == logged(whole)[-2]["loss"]
    for name, values in weights(whole).items():
        assert torch.equal(weights(resumed)[name], values), name


@pytest.mark.parametrize("option", ["save_only_model", "ignore_data_skip"])
def test_resuming_less_is_what_it_is_in_the_stock_trainer(tmp_path, option):
    results = []
    for kind in (Trainer, DualSpeedTrainer):
        folder = tmp_path / kind.__name__
        make(kind, folder, **SAVING, **{option: True}).train()
        shutil.rmtree(folder / "checkpoint-4")
        results.append(make(kind, folder, **SAVING, **{option: True}))
        if kind is Trainer:  # which doesn't find LLaVA's weights by the names that it saves
            continue
        results[-1].train(resume_from_checkpoint=True)
        assert results[-1].state.global_step == 4


def test_resuming_needs_a_checkpoint(tmp_path):
    for trainer in both(tmp_path):
        with pytest.raises(ValueError, match="No valid checkpoint found"):
            trainer.train(resume_from_checkpoint=True)


class Counter(TrainerCallback, ExportableState):
    """Callback with a state that is saved with a checkpoint."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {"steps": self.steps}, "attributes": {}}


def test_states_of_callbacks_are_restored(tmp_path):
    make(DualSpeedTrainer, tmp_path, dualspeed=FAST, callbacks=[Counter()], **SAVING).train()
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["Counter"]["args"] == {"steps": 2}
    resumed = make(
        DualSpeedTrainer,
        tmp_path,
        dualspeed=FAST,
        callbacks=[Counter()],
        restore_callback_states_from_checkpoint=True,
        **SAVING,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (counter,) = [one for one in resumed.callback_handler.callbacks if isinstance(one, Counter)]
    assert counter.steps == 4


def test_workers_of_the_data_loader_give_the_same_batches(tmp_path):
    plain, with_workers = (
        make(DualSpeedTrainer, tmp_path / str(number), dualspeed=MIXED, dataloader_num_workers=number)
        for number in (0, 1)
    )
    plain.train()
    with_workers.train()
    assert_same_logs(plain, with_workers, rel=1e-6)
    assert len(collate_rows(list(rows(4)))["input_ids"]) == 4
