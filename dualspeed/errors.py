"""Errors that a person can act on: the command line prints their message and ends with exit status 1.

Each also derives from the built-in that Python code would catch. An error of any other class is a bug, and keeps its
traceback.
"""


class DualSpeedError(Exception):
    """Base class; the message names what is wrong, where, and what would be valid."""


def sentence_of(error: DualSpeedError) -> str:
    """Message of an error; of one in a data loader's worker, without the traceback that torch puts before it."""
    return str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].rstrip("\n")


class ConfigError(DualSpeedError, ValueError):
    """Invalid setting: the message names file, key and value, and what would be valid."""


class PlanError(DualSpeedError, ValueError):
    """Rows that don't fit their GPUs; the message names each, and what would fit."""


class GpuError(DualSpeedError, ValueError):
    """More GPUs asked for than there are to share out."""


class RunIsLiveError(DualSpeedError, RuntimeError):
    """Another job writes into this state folder."""


class ProgramError(DualSpeedError, RuntimeError):
    """Program of others that is missing, or that failed; the message names it and repeats its last line."""


class MissingPackageError(DualSpeedError, ImportError):
    """Optional package that is not installed; the message says how to install it."""


class SnakemakeIsLiveError(DualSpeedError, RuntimeError):
    """The snakemake process whose jobs are to be ended is still running."""


class OrphanedJobsError(DualSpeedError, TimeoutError):
    """Orphaned Slurm jobs that don't end after they were cancelled."""


class DownloadError(DualSpeedError, RuntimeError):
    """Failed download; the message names the address, what happened and what to do."""


class LockError(DualSpeedError, RuntimeError):
    """Downloaded content that differs from data.lock; the message names the file and what to do."""


class ArchiveError(DualSpeedError, RuntimeError):
    """Archive that can't be unpacked; the message names it and the reason."""


class AnnotationsError(DualSpeedError, ValueError):
    """Unusable file of annotations; the message names the file and, where there is one, the line."""


class RecordError(DualSpeedError, ValueError):
    """Unusable entry: `args` are the reason, the same for all such entries, and the detail of this one."""


class ImageError(DualSpeedError, ValueError):
    """Unusable image; the message names the file and the reason."""


class PreparationError(DualSpeedError, ValueError):
    """Data that can't be prepared; the message says what is wrong and what to do."""


class SampleError(DualSpeedError, ValueError):
    """Sample or batch that can't be trained on; the message names the sample or the input."""


class SupervisionError(SampleError):
    """Chat template, or a conversation in it, whose supervised tokens can't be found; the message says why."""


class BaseModelError(DualSpeedError, ValueError):
    """Parts that make no base model; the message names the part and what is wrong with it."""


class DivergenceError(DualSpeedError, FloatingPointError):
    """Loss that is no longer finite; the message names the training and the step."""


class FeatureCacheError(DualSpeedError, RuntimeError):
    """Folder of kept features that can't be used, read or written; the message names it and says what to do."""


class ModelError(DualSpeedError, ValueError):
    """Model or checkpoint that doesn't fit the settings; the message says why and what would."""


class UnknownInputError(DualSpeedError, TypeError):
    """Model input that neither the language model nor the vision tower takes."""


class UnknownPrunerError(DualSpeedError, KeyError):
    """Name of no pruner; the message lists the valid names."""

    __str__ = Exception.__str__  # KeyError would quote the message


class PrunerInputError(DualSpeedError, ValueError):
    """Field of VisualTokens that a pruner needs and was not given."""


class CheckpointError(DualSpeedError, FileNotFoundError):
    """Missing file of a checkpoint or of prepared data."""


class WorldSizeError(DualSpeedError, ValueError):
    """Run resumed on another number of processes than it was started with."""


class ShardingError(DualSpeedError, ValueError):
    """Sharding that isn't in force, or that can't read what another sharding wrote; the message says what would."""


class IncompleteModelError(DualSpeedError, RuntimeError):
    """Saved model that lacks a part, or whose weights are not finite; the message names it."""


class InterruptedTrainingError(DualSpeedError, RuntimeError):
    """Training stopped before its last step, with a checkpoint that the next job resumes from."""


class TrackingError(DualSpeedError, RuntimeError):
    """MLflow store that can't be reached, or that lacks points after a delivery."""


class BenchmarkError(ConfigError):
    """Invalid file of a benchmark or of answers; the message says where, what and what would be valid."""


class UnknownAnswerError(BenchmarkError):
    """Answer to no question of the benchmark: the answers belong to another question file."""

    def __init__(self, question_id: str, message: str) -> None:
        super().__init__(message)
        self.question_id = question_id


class ResultsError(DualSpeedError, ValueError):
    """Broken file of the results tree, or one that was scored on other questions than the rest."""
