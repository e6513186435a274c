"""`make gpu`, tried without one: at toy sizes on the CPU and on the stand-in, every cell a figure or a reason."""

import ast
import json
import subprocess
import sys
import time

import pytest
import torch

from dualspeed.method.model import DualSpeedModel
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode
from measurements import gpu_packing, gpu_parts
from measurements.gpu import PARTS, main, measured
from measurements.gpu_cells import Bench, Reason
from measurements.gpu_models import REAL, batch_of, build, toy
from measurements.gpu_steps import through_line
from measurements.gpu_tables import tables, with_tables
from measurements.older_transformers import let_take_features
from tests.support.paths import REPOSITORY
from tests.support.stand_in import NAME, stand_in
from tests.support.varlen import STAND_IN, attention_by_lengths, by_lengths

# What a machine with a GPU has; numpy and tokenizers come with transformers.
ALLOWED = {"torch", "transformers", "safetensors", "PIL", "numpy", "tokenizers"}
OURS = ("dualspeed", "measurements", "tests")
REASONS_OF_A_CPU = ("counts no memory of its own", "no data-sheet rate known of", "torch reports no waits for")
REASONS_OF_A_CPU += ("no larger at the second depth",)  # of a toy model, beside other work
REASONS_OF_A_CPU += ("flex_attention has no backward pass on a CPU", "flash-attn is not installed")
BY_NAME = {part.name: part for part in PARTS}


def imports_of(module: str) -> set[str]:
    """Modules that a module of the repository imports when it is loaded."""
    path = REPOSITORY / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.exists():
        return set()  # a name from a package
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_it_imports_no_more_than_a_machine_with_a_gpu_has():
    seen, ahead = set(), {"measurements.gpu"}
    while ahead:
        module = ahead.pop()
        seen.add(module)
        if module.split(".")[0] in OURS:
            ahead |= imports_of(module) - seen
    outside = {module.split(".")[0] for module in seen} - set(OURS) - set(sys.stdlib_module_names)
    assert "torch" in outside
    assert outside <= ALLOWED


@pytest.mark.slow
def test_every_cell_has_a_figure_or_a_reason_on_the_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "measurements.gpu", "--toy", "--minutes", "30", "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["machine"]["torch"] == torch.__version__
    assert result["shortcomings"] == []
    for part in PARTS:
        assert set(result["parts"][part.name]) == set(part.rows)
        for row, cells in result["parts"][part.name].items():
            assert tuple(cells) == part.columns
            for column, cell in cells.items():
                if isinstance(cell, dict):
                    assert any(text in cell["reason"] for text in REASONS_OF_A_CPU), (part.name, row, column, cell)
                else:
                    assert isinstance(cell, str) or cell > 0, (part.name, row, column)
    # The toy memory holds all models but this one.
    assert result["parts"]["steps"]["Qwen3-VL-8B, full"]["layers"] == "1 and 2, for 4"
    assert result["parts"]["steps"]["Qwen2.5-VL-7B, full"]["layers"] == "4"


@pytest.mark.slow
def test_it_runs_on_an_accelerator():
    with stand_in() as device:
        bench = Bench(device=device, is_toy=True)
        deadline = time.monotonic() + 600
        steps = measured(bench, BY_NAME["steps"], "LLaVA-1.5-7B, LoRA", deadline)
        assert {values.device.type for values in bench.held["LLaVA-1.5-7B"].parameters()} == {NAME}
        selection = measured(bench, BY_NAME["selection"], "divprune", deadline)
        pruner = measured(bench, BY_NAME["pruners"], "divprune, 16x576x4096", deadline)
    assert all(isinstance(steps[f"{mode} s"], float) for mode in ("Baseline", "fast", "slow")), steps
    assert all(isinstance(cell, float) for cell in selection.values()), selection
    assert isinstance(pruner["ms"], float) and isinstance(pruner["published ms"], float), pruner
    assert pruner["MiB"] == Reason(f"{NAME} counts no memory of its own")


def test_packed_steps_are_measured(monkeypatch):
    """With attention that reads lengths on a CPU."""
    monkeypatch.setitem(gpu_packing.WAYS, "flex", STAND_IN)
    bench = Bench(device=torch.device("cpu"), is_toy=True)
    with attention_by_lengths():
        cells = measured(bench, BY_NAME["packing"], "Qwen3-VL-8B", time.monotonic() + 600)
        # Three steps of each: to warm up, and timed, in micro-batches; checkpointed layers run twice.
        assert by_lengths.calls >= 2 * 2 * 4
    assert all(
        isinstance(cells[f"{mode} {way} s"], float) for mode in ("Baseline", "fast") for way in ("padded", "flex")
    )
    assert cells["fast flash s"] == Reason("flash-attn is not installed")
    assert 0 < cells["Baseline padding"] < cells["fast padding"] < 1


def test_a_line_through_two_depths_needs_a_slope():
    shallow, deep = {"fast s": 1.0, "pruner": 0.1, "peak": Reason("none")}, {"fast s": 1.5, "pruner": 0.1, "peak": 3.0}
    assert through_line([1, 2], [shallow, deep], 4) == {"fast s": 2.5, "pruner": 0.1, "peak": Reason("none")}
    assert isinstance(through_line([1, 2], [deep, shallow], 4)["fast s"], Reason)


def test_a_row_that_fails_or_lasts_leaves_its_reason_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def fail(bench, row, cells):
        cells["ms"] = 1.0
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench = Bench(device=torch.device("cpu"), is_toy=True)
    part = BY_NAME["pruners"]
    broken = type(part)(**{**vars(part), "measure": fail})
    late = type(part)(**{**vars(part), "measure": lambda *_: time.sleep(60), "seconds": 0.1})
    out_of_memory = {"ms": 1.0, "published ms": Reason("out of memory"), "MiB": Reason("out of memory")}
    assert measured(bench, broken, "divprune, 16x576x4096", time.monotonic() + 60) == out_of_memory
    assert set(measured(bench, late, "any", time.monotonic() + 60).values()) == {Reason("took longer than 1 s")}
    monkeypatch.setattr("measurements.gpu.order", lambda: iter([(part, "divprune, 16x576x4096")]))
    main(["--toy", "--minutes", "0", "--out", str(tmp_path / "gpu.json")])
    cells = json.loads((tmp_path / "gpu.json").read_text())["parts"]["pruners"]["divprune, 16x576x4096"]
    assert cells["ms"] == {"reason": "the time of the whole measurement was over"}


@pytest.mark.parametrize("name", ["LLaVA-1.5-7B", "LLaVA-NeXT-7B", "Qwen2.5-VL-7B"])
def test_the_forward_for_older_transformers_gives_the_same_losses(name):
    shape = toy(REAL[name])
    vlm = build(shape, shape.depth, torch.device("cpu"), torch.float32)
    model = DualSpeedModel(vlm, DualSpeedConfig(prune_budget="tile" if shape.tiles > 1 else "image"))
    batch = batch_of(shape, torch.device("cpu"))
    batch["pixel_values"] = batch["pixel_values"].float()
    with torch.no_grad():
        stock = [model(**batch, mode=mode).loss.item() for mode in (Mode.FAST, Mode.SLOW)]
        let_take_features(vlm)
        calls = []
        monitored = vlm.forward
        vlm.forward = lambda **inputs: calls.append(1) or monitored(**inputs)
        assert [model(**batch, mode=mode).loss.item() for mode in (Mode.FAST, Mode.SLOW)] == stock
    assert len(calls) == 3  # fast, the teacher of slow, slow


def test_waits_are_told_apart_by_the_innermost_frame_outside_torch(monkeypatch):
    import warnings

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    with gpu_parts.cuda_syncs() as files:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another matter", stacklevel=1)
    assert files == [__file__]


def test_the_tables_of_the_page_are_those_of_the_json():
    page, file = REPOSITORY / "docs/speed.md", REPOSITORY / "measurements/gpu.json"
    measured_here = json.loads(file.read_text()) if file.exists() else None
    assert with_tables(page.read_text(), measured_here) == page.read_text(), "python -m measurements.gpu_tables"


def test_tables_hold_figures_and_lettered_reasons():
    cells = {"fast, ours": 2.0, "fast, others'": 17.0, "slow, ours": {"reason": "out of memory"}}
    machine = {"device": "NVIDIA H200", "cuda": None}
    result = {"machine": machine, "is_toy": False, "shortcomings": [], "seconds": 461.2}
    text = tables(result | {"parts": {"syncs": {"LLaVA-1.5-7B": cells}}})
    assert "`make gpu` took 461 s on this machine: device NVIDIA H200." in text
    assert "| LLaVA-1.5-7B | 2 | 17 | (a) | not measured yet |" in text
    assert "\n\n(a) out of memory." in text
