"""From data to tables: what to run is in config/<name>/, what reruns after an edit in config/README.md."""

from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from dualspeed.errors import ConfigError
from dualspeed.settings.snapshot import freeze, read_frozen
from dualspeed.settings.yaml_file import read_yaml

min_version("9.27")

# A job that a cluster runs later takes the settings that its DAG was built from, whatever became of the files.
if not workflow.is_main_process and (frozen := read_frozen()):
    config.clear()
    config.update(frozen)


# Our errors name file, line and column, Snakemake's own neither; and it takes the last of two equal keys. A file of
# --configfile that is no YAML at all never comes here: `dualspeed plan --config` says what is wrong with it.
if workflow.is_main_process:
    try:
        for file in [*workflow.configfiles, *([] if "models" in config else ["config/demo/config.yaml"])]:
            read_yaml(Path(file))
    except ConfigError as error:
        raise WorkflowError(error) from None


# Another configuration (--configfile) replaces the demo's; Snakemake would merge the two.
if "models" not in config:

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
