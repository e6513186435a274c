"""`dualspeed <command>`: one command for each job of the workflow, so that every job also runs by hand.

The settings of a job lie in a file that is named by their hash (dualspeed.settings.jobs). Each command imports what
it needs inside its own function: `--help` answers at once, and a job that only counts answers loads no torch.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualspeed.cluster.gpus import take_gpus
from dualspeed.cluster.heartbeat import watch_nodes
from dualspeed.cluster.launch import add_hosts, launch, must_launch, one_of_several, place_of
from dualspeed.errors import DualSpeedError, sentence_of
from dualspeed.layout import Layout
from dualspeed.settings.command_line import PARENT, STORE, read_shard, settings_file
from dualspeed.settings.jobs import read_settings
from dualspeed.settings.project import load_project

if TYPE_CHECKING:
    from dualspeed.tracking.delivery import ParentRun
    from dualspeed.tracking.store import Store

DEMO = "config/demo/config.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; an error that the user can act on is one line on stderr and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(arguments)
    options.arguments = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        if "gpus" in options:
            take_gpus(options.gpus)
        with one_of_several():
            options.run(options)
    except DualSpeedError as error:
        print(f"dualspeed {options.command}: {sentence_of(error)}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Arguments of every command."""
    parser = argparse.ArgumentParser(prog="dualspeed", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, run: Callable[[argparse.Namespace], None], *folders: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        for folder in folders:
            command.add_argument(f"--{folder}", type=Path, required=True)
        return command

    add_own(commands, add("generate", run_generate, "model"))
    add_settings(add("demo-data", run_demo_data, "out"))
    add_settings(add("base-model", run_base_model, "data", "out"))
    add_settings(add("assemble", run_assemble, "out"))
    download = add_settings(add("download", run_download, "lock", "out"))
    download.add_argument("source", help="name of the source, as the lock has it")
    download.add_argument("--workers", type=int, default=4, help="files that are fetched at once")
    prepare = add_settings(add("prepare", run_prepare, "model", "out"))
    prepare.add_argument("--workers", type=int, default=1, help="processes that check images")
    train = add_settings(add("train", run_train, "model", "data", "state", "out"))
    train.add_argument("--time-limit", type=float, help="minutes that the job has: it ends in time, with a checkpoint")
    train.add_argument("--nodes", type=int, default=1, help="nodes that train together")
    train.add_argument("--processes", type=int, default=1, help="training processes on each node")
    train.add_argument("--accelerate-config", help="file for `accelerate launch`: how processes share the model")
    train.add_argument("--cache-features", help="folder that keeps what the frozen vision tower makes of each image")
    train.add_argument("--cpus", type=int, default=1, help="CPU cores on each node, shared by its processes")
    add_hosts(train)
    add_gpus(train)
    add_tracking(train)
    answer = add_gpus(add_settings(add("answer", run_answer, "model", "state", "out")))
    answer.add_argument("--shard", type=read_shard, metavar="K/N", help="answer the K-th of N parts; then run without")
    add_tracking(answer)
    score = add("score", run_score, "data", "answers", "out")
    score.add_argument("benchmark", help="name of the benchmark")
    submit = add("submit", run_submit, "data", "answers", "out")
    submit.add_argument("benchmark", help="name of the test split")
    lmms = add("lmms", run_lmms, "model", "scores", "work", "out")
    lmms.add_argument("--batch-size", type=int, default=1, help="lmms-eval's batch size")
    speed = add_gpus(add_settings(add("speed", run_speed, "model", "data", "out")))
    speed.add_argument("--processes", type=int, default=1, help="processes of the training; one's steps are timed")
    speed.add_argument("--sharded", action="store_true", help="they share the model: each updates its part of it")
    tables = add_settings(add("tables", run_tables, "out", "figures"))
    tables.add_argument("--tracking", type=STORE, help="JSON: MLflow uri and experiment")
    comparison = add("compare", run_compare)
    comparison.add_argument("rows", nargs=2, metavar="row", help="id of a row in the sheet")
    comparison.add_argument("--configfile", default=DEMO, help=f"the project's configuration; default {DEMO}")
    comparison.add_argument("--experiments", help="another sheet than the one that the configuration names")
    add("end-jobs", run_end_jobs)
    plan = add("plan", run_plan, "config")
    plan.add_argument("--experiments", type=Path, help="another sheet than the configuration's")
    add_settings(add("kept-tokens", run_kept_tokens, "model", "out"))
    add_settings(add("report", run_report, "figures", "out"))
    add("track", run_track).add_argument("action", choices=["init", "sync"])
    track = commands.choices["track"]
    track.add_argument("--configfile", default=DEMO, help=f"names store and results; default {DEMO}")
    track.add_argument("--tracking", type=STORE, help="JSON: MLflow uri and experiment, instead of a configfile's")
    track.add_argument("--state", type=Path, help="state folder, likewise")
    return parser


def add_own(commands: Any, generate: argparse.ArgumentParser) -> None:
    """Add `finetune`, and the arguments of `generate`: the commands that need no workflow."""
    # All that follows `finetune` is read by the command's own parser: "\0" begins no argument.
    alone = commands.add_parser("finetune", help=run_finetune.__doc__, add_help=False, prefix_chars="\0")
    alone.set_defaults(run=run_finetune)
    alone.add_argument("options", nargs="*")
    generate.add_argument("--image", type=Path, help="picture that the prompt is about")
    generate.add_argument("--prompt", required=True, help="question or instruction")
    generate.add_argument("--mode", choices=["slow", "fast"], default="slow", help="read all tokens, or pruned ones")
    generate.add_argument("--max-new-tokens", type=int, default=256, help="longest answer; default 256")


def add_settings(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a command its settings."""
    command.add_argument("--settings", type=settings_file, required=True, help="JSON file, as the workflow writes it")
    return command


def add_gpus(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a command its share of this machine's GPUs, where a profile shares them out."""
    command.add_argument("--gpus", type=int, default=0, help="GPUs to take, where DUALSPEED_NUM_GPUS are shared out")
    return command


def add_tracking(command: argparse.ArgumentParser) -> None:
    """Give a command that logs its MLflow store, and the row that its run belongs to."""
    command.add_argument("--tracking", type=STORE, help="JSON: MLflow uri and experiment; none: local file only")
    command.add_argument("--parent", type=PARENT, help="JSON: row and settings_hash of the experiment's run")


def store_of(options: argparse.Namespace) -> "Store | None":
    """MLflow store that `--tracking` names; None without the option."""
    from dualspeed.tracking.store import Store

    return Store(**options.tracking) if options.tracking else None


def parent_of(options: argparse.Namespace) -> "ParentRun | None":
    """Run that `--parent` names; None without the option."""
    from dualspeed.tracking.delivery import ParentRun

    return ParentRun(**options.parent) if options.parent else None


def run_finetune(options: argparse.Namespace) -> None:
    """Train a VLM on your data, without a workflow; run again, it resumes."""
    from dualspeed.settings.finetune import read_options

    settings = read_options(options.options)
    from dualspeed.training.finetune import finetune

    finetune(settings)


def run_generate(options: argparse.Namespace) -> None:
    """Answer a prompt about a picture with a trained model."""
    from dualspeed.evaluation.chat import stream_answer
    from dualspeed.settings.modes import Mode

    stream_answer(options.model, options.image, options.prompt, Mode(options.mode), options.max_new_tokens)


def run_demo_data(options: argparse.Namespace) -> None:
    """Draw the demo's pictures, conversations and benchmarks."""
    from dualspeed.demo.scenes import write_demo_data
    from dualspeed.settings.demo import SceneSettings

    write_demo_data(read_settings(SceneSettings, options.settings), options.out)


def run_base_model(options: argparse.Namespace) -> None:
    """Make the demo's base model."""
    from dualspeed.demo.base_model import make_base_model
    from dualspeed.settings.demo import BaseModelSettings

    make_base_model(read_settings(BaseModelSettings, options.settings), options.data, options.out)


def run_assemble(options: argparse.Namespace) -> None:
    """Put a base model together from a language model and a vision tower."""
    from dualspeed.base_models.assemble import assemble
    from dualspeed.settings.model import ModelParts

    assemble(read_settings(ModelParts, options.settings), options.out)


def run_download(options: argparse.Namespace) -> None:
    """Fetch, check and unpack a source of the configuration; goes on where a killed run stopped."""
    from dualspeed.data.download import download
    from dualspeed.data.lock import DataLock
    from dualspeed.files import write_json
    from dualspeed.settings.sources import Source

    source = read_settings(Source, options.settings)
    write_json(options.out, download(options.source, source, DataLock(options.lock), options.workers))


def run_prepare(options: argparse.Namespace) -> None:
    """Check conversations and images of a stage and make its dataset."""
    from dualspeed.data.prepare import prepare_dataset
    from dualspeed.settings.recipe import DataRecipe

    prepare_dataset(read_settings(DataRecipe, options.settings), options.model, options.out, options.workers)


def run_train(options: argparse.Namespace) -> None:
    """Train one stage; resumes from its state."""
    from dualspeed.settings.stage import StageSettings
    from dualspeed.training.start import check_start

    inputs = read_settings(StageSettings, options.settings), options.model, options.data, options.state
    check_start(*inputs, options.nodes, options.processes, options.accelerate_config)
    if must_launch(options.nodes, options.processes, options.accelerate_config):
        resources = options.nodes, options.processes, options.cpus, options.accelerate_config
        launch(options.arguments, *resources, place_of(options))
    from dualspeed.training.stage import train

    with watch_nodes():
        train(*inputs, options.out, store_of(options), parent_of(options), options.time_limit, options.cache_features)


def run_answer(options: argparse.Namespace) -> None:
    """Answer the benchmarks' questions with a trained model."""
    from dualspeed.evaluation.answering import generate_answers
    from dualspeed.settings.jobs import AnswerSettings

    generate_answers(
        read_settings(AnswerSettings, options.settings),
        options.model,
        options.state,
        options.out,
        tracking=store_of(options),
        parent=parent_of(options),
        shard=options.shard,
    )


def run_score(options: argparse.Namespace) -> None:
    """Score the answers to one benchmark."""
    from dualspeed.evaluation.scoring import score

    score(options.benchmark, options.data, options.answers, options.out)


def run_submit(options: argparse.Namespace) -> None:
    """Write the file of answers that a test split's server takes."""
    from dualspeed.evaluation.scoring import submit

    submit(options.benchmark, options.data, options.answers, options.out)


def run_lmms(options: argparse.Namespace) -> None:
    """Score a checkpoint with lmms-eval, and set its numbers beside ours."""
    from dualspeed.evaluation.lmms_eval import evaluate_lmms

    evaluate_lmms(options.model, options.scores, options.work, options.out, options.batch_size)


def run_speed(options: argparse.Namespace) -> None:
    """Measure the time of a step in each mode."""
    from dualspeed.settings.speed import SpeedSettings
    from dualspeed.training.step_times import measure_speed

    settings = read_settings(SpeedSettings, options.settings)
    measure_speed(options.model, options.data, options.out, settings, options.processes, options.sharded)


def run_tables(options: argparse.Namespace) -> None:
    """Write the tables and figures of a sheet of experiments."""
    from dualspeed.reporting.figures.figures import write_figures
    from dualspeed.reporting.tables import write_tables
    from dualspeed.settings.sheet import Sheet

    sheet = read_settings(Sheet, options.settings)
    write_tables(sheet, options.out)
    write_figures(sheet, options.figures)
    if store := store_of(options):
        from dualspeed.reporting.mlflow_runs import log_results

        log_results(sheet, store, options.out, options.figures)


def run_compare(options: argparse.Namespace) -> None:
    """Show two rows side by side: settings, scores, time and memory."""
    from dualspeed.reporting.compare import compare

    project = load_project(options.configfile, experiments=options.experiments)
    print(compare(project.sheet, *options.rows))


def run_end_jobs(options: argparse.Namespace) -> None:
    """End the Slurm jobs that a killed snakemake left over in this folder."""
    from dualspeed.cluster.orphaned_jobs import end_jobs

    end_jobs(Path.cwd())


def run_plan(options: argparse.Namespace) -> None:
    """Print what a sheet's rows would cost: tokens, FLOPs, memory, hours, disk."""
    from dualspeed.plan.report import plan

    print(plan(options.config, options.experiments))


def run_kept_tokens(options: argparse.Namespace) -> None:
    """Draw which tokens of a picture each pruning method keeps."""
    from dualspeed.reporting.figures.kept_tokens import draw_kept_tokens
    from dualspeed.settings.jobs import KeptTokensSettings

    draw_kept_tokens(options.model, options.out, read_settings(KeptTokensSettings, options.settings))


def run_report(options: argparse.Namespace) -> None:
    """Write the page that shows a sheet's tables, figures and examples."""
    from dualspeed.reporting.report import write_report
    from dualspeed.settings.jobs import ReportSettings

    write_report(read_settings(ReportSettings, options.settings), options.figures, options.out)


def run_track(options: argparse.Namespace) -> None:
    """Create the MLflow store (init), or deliver what it lacks (sync)."""
    from dualspeed.reporting import mlflow_runs
    from dualspeed.tracking import metric_log
    from dualspeed.tracking import store as mlflow_store

    store, state = store_of(options), options.state
    if store is None or state is None:
        project = load_project(options.configfile)
        store = store or mlflow_store.Store(project.tracking.uri, project.tracking.experiment)
        state = state or Path(Layout(project.results).state)
    if options.action == "init":
        metric_log.init(store)
        return
    mlflow_store.be_patient()
    num_sent = mlflow_runs.sync(state, store)
    print(f"{num_sent} metrics were missing; they are at {mlflow_store.redact(store.uri)} now.")


if __name__ == "__main__":
    sys.exit(main())
