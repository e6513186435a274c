"""Trackers of `report_to`: TensorBoard's files, MLflow's runs and a callback hold the same metrics of each step."""

import struct
from numbers import Real

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from dualspeed import DualSpeedConfig, DualSpeedTrainer
from tests.support.stock import make

mlflow = pytest.importorskip("mlflow")
event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")


class Recording(TrainerCallback):
    """Metrics of each record: (name, step) -> value."""

    def __init__(self):
        self.metrics = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.metrics |= {(name, state.global_step): value for name, value in logs.items() if isinstance(value, Real)}


def tensorboard_metrics(folder) -> dict:
    """Scalars of the event files below a folder: records of length, checksum, event, checksum."""
    found = {}
    for file in folder.rglob("events.out.tfevents.*"):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found |= {
                (value.tag, event.step): value.simple_value
                for value in event.summary.value
                if value.HasField("simple_value")
            }
    return found


def mlflow_metrics(uri) -> dict:
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(["0"])
    history = [point for name in run.data.metrics for point in client.get_metric_history(run.info.run_id, name)]
    return {(point.key, point.step): point.value for point in history}


@pytest.mark.slow
def test_every_tracker_holds_the_same_metrics(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    recording = Recording()
    trainer = make(
        DualSpeedTrainer,
        tmp_path / "out",
        dualspeed=DualSpeedConfig(slow_mode_ratio=0.5, mode_schedule="stratified", pruning_ratio=0.7),
        report_to=["tensorboard", "mlflow"],
        eval_strategy="steps",
        eval_steps=2,
        callbacks=[recording],
    )
    trainer.train()
    mlflow.end_run()
    names = {name for name, _ in recording.metrics}
    assert {"loss", "fast/ce_loss", "slow/distillation_loss", "eval_loss", "tokens_per_second"} <= names
    assert {step for _, step in recording.metrics} == {1, 2, 3, 4}
    expected = {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in recording.metrics.items()}
    assert mlflow_metrics(uri) == expected
    written = tensorboard_metrics(tmp_path / "out")
    assert written == {(*rewrite_logs({name: 0}), step): value for (name, step), value in expected.items()}
