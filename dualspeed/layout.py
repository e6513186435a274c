"""Every path under a project's results folder, for the rules and for Python alike.

Arguments may be wildcards: `Layout("results").model("{experiment}")` is `results/models/{experiment}`.
"""

from dataclasses import dataclass

TRAINING_RECORD = "training.json"
"""In a checkpoint: what its stage was, and what it cost."""
METRICS_FILE = "metrics.jsonl"
"""In a state folder and in a checkpoint: one line a logged step."""
VALIDATION_FOLDER = "validation"
"""In a prepared dataset: the held-out samples."""
METHOD_FILE = "dualspeed.json"
"""In a checkpoint: settings of the method."""


@dataclass(frozen=True)
class Layout:
    """Paths under `root`, as text."""

    root: str

    @property
    def state(self) -> str:
        """Folder of all that jobs resume from; no rule's output, since Snakemake deletes outputs."""
        return f"{self.root}/state"

    @property
    def settings(self) -> str:
        """Folder of the jobs' settings, each in a file named by its hash."""
        return f"{self.state}/settings"

    @property
    def snapshots(self) -> str:
        """Folder of the configurations that running workflows were started with."""
        return f"{self.state}/snapshots"

    @property
    def store_ready(self) -> str:
        """File that says that the MLflow store is there."""
        return f"{self.state}/tracking.ready"

    @property
    def demo_data(self) -> str:
        """Pictures, conversations and benchmarks of the demo."""
        return f"{self.root}/data/demo"

    def receipt(self, source: str) -> str:
        """File that says that a download is whole."""
        return f"{self.root}/downloads/{source}.json"

    def base_model(self, model: str) -> str:
        """Checkpoint that a model's training starts from, where the workflow makes it."""
        return f"{self.root}/models/base/{model}"

    def prepared(self, model: str, stage: str) -> str:
        """Dataset of a stage."""
        return f"{self.root}/prepared/{model}/{stage}"

    def pretraining(self, key: str) -> str:
        """Checkpoint of a pretraining."""
        return f"{self.root}/pretrain/{key}"

    def model(self, row: str) -> str:
        """Checkpoint of a row's finetuning."""
        return f"{self.root}/models/{row}"

    def speed(self, key: str) -> str:
        """Step times."""
        return f"{self.root}/speed/{key}.json"

    def answers(self, row: str, inference: str) -> str:
        """Folder of a row's answers."""
        return f"{self.root}/answers/{row}/{inference}"

    def answer_file(self, row: str, inference: str, benchmark: str) -> str:
        """Answers of a row to one benchmark."""
        return f"{self.answers(row, inference)}/{benchmark}.jsonl"

    def score(self, row: str, inference: str, benchmark: str) -> str:
        """Score of a row on one benchmark."""
        return f"{self.root}/scores/{row}/{inference}/{benchmark}.json"

    def submission(self, row: str, benchmark: str, kind: str) -> str:
        """File of answers that a benchmark's server takes."""
        return f"{self.root}/submissions/{row}/{benchmark}.{kind}"

    def lmms_eval(self, row: str) -> str:
        """Scores by lmms-eval beside ours."""
        return f"{self.root}/lmms_eval/{row}.csv"

    def tables(self, sheet: str) -> str:
        """Folder of a sheet's tables."""
        return f"{self.root}/tables/{sheet}"

    def figures(self, sheet: str) -> str:
        """Folder of a sheet's figures."""
        return f"{self.root}/figures/{sheet}"

    def report(self, sheet: str) -> str:
        """Page of a sheet. The demo's own are report.html and report-full.html: it runs where nothing else is named."""
        return f"{self.root}/report" + f"-{sheet}".removeprefix("-demo") + ".html"

    def log(self, job: str) -> str:
        """Log of a job."""
        return f"{self.root}/logs/{job}.log"

    def job_time(self, job: str) -> str:
        """Time and memory of a job, as Snakemake measures them."""
        return f"{self.root}/job_times/{job}.tsv"
