"""From data to tables: what to run is in config/<name>/, what reruns after an edit in config/README.md."""

from snakemake.utils import min_version

min_version("9.27")


# Another configuration (--configfile) replaces the demo's; Snakemake would merge the two.
if "models" not in config:

    configfile: "config/demo/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/tables.smk"


rule all:
    default_target: True
    input:
        TABLE_FILES,
        FIGURE_FILES,
        CHECKPOINTS,
        SCORES,
        SUBMISSIONS,
    message:
        "All of the sheet {PROJECT.sheet} is there"
