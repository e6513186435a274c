"""The two stages of training. State to resume from lies under results/state, for Snakemake deletes declared outputs.

`exec`: Snakemake passes SIGTERM on to the job's shell, which would die of it before the training it started.
"""


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
    threads: 1
    resources:
        gpu=lambda wildcards: gpus_of(PRETRAININGS[wildcards.pretraining].model),
        mem_mb=8000,
        runtime=1440,
    params:
        settings=lambda wildcards: as_json(pretrain_settings(PROJECT, PRETRAININGS[wildcards.pretraining]).to_dict()),
    message:
        "Pretrain {wildcards.pretraining} (progress: {log})"
    shell:
        "exec dualspeed train --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --state {STATE} --out {output.checkpoint} --tracking {TRACKING:q} > {log} 2>&1"


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
    threads: 1
    resources:
        gpu=lambda wildcards: gpus_of(EXPERIMENTS[wildcards.experiment].model),
        mem_mb=8000,
        runtime=2880,
    params:
        settings=lambda wildcards: as_json(finetune_settings(PROJECT, EXPERIMENTS[wildcards.experiment]).to_dict()),
        parent=lambda wildcards: as_json(jobs.parent_run(PROJECT, EXPERIMENTS[wildcards.experiment])),
    message:
        "Finetune {wildcards.experiment} (progress: {log})"
    shell:
        "exec dualspeed train --settings {params.settings:q} --model {input.model} --data {input.data}"
        " --state {STATE} --out {output.checkpoint} --tracking {TRACKING:q} --parent {params.parent:q} > {log} 2>&1"


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
        gpu=lambda wildcards: gpus_of(SPEEDS[wildcards.speed].model),
        mem_mb=8000,
        runtime=60,
    params:
        settings=lambda wildcards: as_json(jobs.speed_settings(PROJECT, SPEEDS[wildcards.speed])),
    message:
        "Time the steps of {wildcards.speed}, alone on this machine"
    shell:
        "dualspeed speed --settings {params.settings:q} --model {input.model}"
        " --data {input.data} --out {output.times} > {log} 2>&1"
