"""The two stages of training. State to resume from lies under results/state, for Snakemake deletes declared outputs.

`exec`: Snakemake passes SIGTERM on to the job's shell, which would die of it before the training it started. A retry
goes on where the last job ended, so its time doesn't grow.
"""


def model_of_pretraining(wildcards):
    """Model that a pretraining trains."""
    return PRETRAININGS[wildcards.pretraining].model


def model_of_experiment(wildcards):
    """Model that a row trains."""
    return EXPERIMENTS[wildcards.experiment].model


def launch(model, stage):
    """Options of `dualspeed train` for its processes."""
    return wanted(model, stage).launch_options(recipe_of(model, stage).accelerate_config)


rule pretrain:
    input:
        model=lambda wildcards: base_model(PRETRAININGS[wildcards.pretraining].model),
        data=lambda wildcards: f"{RESULTS}/prepared/{PRETRAININGS[wildcards.pretraining].model}/pretrain",
        store=ancient(TRACKING_READY),
    output:
        checkpoint=directory(f"{RESULTS}/pretrain/{{pretraining}}"),
    log:
        f"{LOGS}/pretrain/{{pretraining}}.log",
    benchmark:
        f"{TIMES}/pretrain/{{pretraining}}.tsv"
    priority: 2  # trainings first: whatever else there is to do fits in beside the last of them
    threads: lambda wildcards: wanted(model_of_pretraining(wildcards), "pretrain").cpus
    resources:
        **scheduled(model_of_pretraining, "pretrain"),
        launch=lambda wildcards: launch(model_of_pretraining(wildcards), "pretrain"),
    params:
        settings=lambda wildcards: as_json(pretrain_settings(PROJECT, PRETRAININGS[wildcards.pretraining]).to_dict()),
    message:
        "Pretrain {wildcards.pretraining} (progress: {log})"
    shell:
        "exec dualspeed train --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --state {STATE} --out {output.checkpoint} --tracking {TRACKING:q}"
        " --time-limit {resources.runtime} --gpus {resources.gpu} {resources.launch} > {log} 2>&1"


rule finetune:
    input:
        model=lambda wildcards: f"{RESULTS}/pretrain/{pretrain_key(PROJECT, EXPERIMENTS[wildcards.experiment])}",
        data=lambda wildcards: f"{RESULTS}/prepared/{EXPERIMENTS[wildcards.experiment].model}/finetune",
        store=ancient(TRACKING_READY),
    output:
        checkpoint=directory(f"{RESULTS}/models/{{experiment}}"),
    log:
        f"{LOGS}/finetune/{{experiment}}.log",
    benchmark:
        f"{TIMES}/finetune/{{experiment}}.tsv"
    priority: 1
    threads: lambda wildcards: wanted(model_of_experiment(wildcards), "finetune").cpus
    resources:
        **scheduled(model_of_experiment, "finetune"),
        launch=lambda wildcards: launch(model_of_experiment(wildcards), "finetune"),
    params:
        settings=lambda wildcards: as_json(finetune_settings(PROJECT, EXPERIMENTS[wildcards.experiment]).to_dict()),
        parent=lambda wildcards: as_json(jobs.parent_run(PROJECT, EXPERIMENTS[wildcards.experiment])),
    message:
        "Finetune {wildcards.experiment} (progress: {log})"
    shell:
        "exec dualspeed train --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --state {STATE} --out {output.checkpoint} --tracking {TRACKING:q} --parent {params.parent:q}"
        " --time-limit {resources.runtime} --gpus {resources.gpu} {resources.launch} > {log} 2>&1"


# Takes the whole machine: a step's time says something only if nothing else runs beside it.
rule measure_speed:
    input:
        model=lambda wildcards: base_model(SPEEDS[wildcards.speed].model),
        data=lambda wildcards: f"{RESULTS}/prepared/{SPEEDS[wildcards.speed].model}/finetune",
    output:
        times=f"{RESULTS}/speed/{{speed}}.json",
    log:
        f"{LOGS}/measure_speed/{{speed}}.log",
    benchmark:
        f"{TIMES}/measure_speed/{{speed}}.tsv"
    threads: workflow.cores or 1
    resources:
        **scheduled(lambda wildcards: SPEEDS[wildcards.speed].model, "speed"),
    params:
        settings=lambda wildcards: as_json(jobs.speed_settings(PROJECT, SPEEDS[wildcards.speed])),
    message:
        "Time the steps of {wildcards.speed}, alone on this machine"
    shell:
        "dualspeed speed --settings {params.settings:q} --model {input.model}"
        " --data {input.data} --out {output.times} --gpus {resources.gpu} > {log} 2>&1"
