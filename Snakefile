"""From data to tables: what to run is in config/<name>/, what reruns after an edit in config/README.md."""

from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from dualspeed.errors import ConfigError
from dualspeed.settings.project import read_yaml
from dualspeed.settings.snapshot import freeze, read_frozen

min_version("9.27")

# A job that a cluster runs later takes the settings that its DAG was built from, whatever became of the files.
if not workflow.is_main_process and (frozen := read_frozen()):
    config.clear()
    config.update(frozen)


# Another configuration (--configfile) replaces the demo's; Snakemake would merge the two.
if "models" not in config:
    try:
        read_yaml(Path("config/demo/config.yaml"))  # its error names file and line, Snakemake's own neither
    except ConfigError as error:
        raise WorkflowError(error) from None

    configfile: "config/demo/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/tables.smk"


onstart:
    freeze(config, SHEET_TEXT, Path(LAYOUT.snapshots))


rule all:
    default_target: True
    input:
        TABLE_FILES,
        FIGURE_FILES,
        rules.draw_kept_tokens.output,
        REPORT,
        CHECKPOINTS,
        SCORES,
        SUBMISSIONS,
    message:
        "All of the sheet {PROJECT.sheet_name} is there"
