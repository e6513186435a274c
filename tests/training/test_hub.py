"""Pushing to the Hub: what a stand-in of its client gets has the isolator and the method's settings."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualspeed import DualSpeedTrainer
from tests.support.stock import FAST, make

OURS = {"mode_isolator.safetensors", "dualspeed.json"}


class Hub:
    """Records the uploads; each has the names of the files that were in the folder."""

    def __init__(self) -> None:
        self.created: dict[str, Any] = {}
        self.uploads: list[dict[str, Any]] = []

    def create_repo(self, name: str, **arguments: Any) -> SimpleNamespace:
        self.created = {"name": name} | arguments
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, folder_path: str, run_as_future: bool = False, **arguments: Any) -> Any:
        files = {path.name for path in Path(folder_path).iterdir() if path.is_file()}
        self.uploads.append({"files": files} | arguments)
        done: Future = Future()
        done.set_result(None)
        return done if run_as_future else SimpleNamespace(oid="0")


@pytest.fixture
def hub(monkeypatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: stand_in)
    return stand_in


def pushing(folder: Path, **given: Any) -> DualSpeedTrainer:
    saving = {"save_strategy": "steps", "save_steps": 2}
    named = {"push_to_hub": True, "hub_model_id": "me/fast", "hub_token": "secret", "hub_private_repo": True}
    return make(DualSpeedTrainer, folder, dualspeed=FAST, **(saving | named | given))


@pytest.mark.parametrize(
    ("strategy", "paths"),
    [
        ("end", []),
        ("every_save", [None, None]),
        ("checkpoint", [None, "last-checkpoint"] * 2),
        ("all_checkpoints", [None, "checkpoint-2", None, "checkpoint-4"]),
    ],
)
def test_each_strategy_pushes_the_isolator(tmp_path, hub, strategy, paths):
    trainer = pushing(tmp_path, hub_strategy=strategy, hub_always_push=True, hub_revision="tried")
    trainer.train()
    assert hub.created == {"name": "me/fast", "token": "secret", "private": True, "exist_ok": True}
    assert [upload.get("path_in_repo") for upload in hub.uploads] == paths
    assert all(OURS | {"model.safetensors"} <= upload["files"] for upload in hub.uploads)
    assert {upload["revision"] for upload in hub.uploads} <= {"tried"}


def test_push_to_hub_uploads_the_whole_model(tmp_path, hub):
    trainer = pushing(tmp_path, save_strategy="no")
    trainer.push_to_hub()
    (upload,) = hub.uploads
    assert OURS | {"model.safetensors", "config.json", "training_args.bin", "README.md"} <= upload["files"]
    trainer.save_model(str(tmp_path / "out"))
    assert len(hub.uploads) == 2
