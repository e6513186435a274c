"""The two stages of training. State to resume from lies under results/state, for Snakemake deletes declared outputs.

`exec`: Snakemake passes SIGTERM on to the job's shell, which would die of it before the training it started. A retry
goes on where the last job ended, so its time doesn't grow.
"""


rule pretrain:
    input:
        model=lambda wildcards: base_model(model_of_pretraining(wildcards)),
        data=lambda wildcards: LAYOUT.prepared(model_of_pretraining(wildcards), "pretrain"),
        store=ancient(LAYOUT.store_ready),
    output:
        checkpoint=directory(LAYOUT.pretraining("{pretraining}")),
    log:
        LAYOUT.log("pretrain/{pretraining}"),
    benchmark:
        LAYOUT.job_time("pretrain/{pretraining}")
    priority: 2  # trainings first: whatever else there is to do fits in beside the last of them
    threads: lambda wildcards: wanted(model_of_pretraining(wildcards), "pretrain").cpus
    resources:
        **scheduled(model_of_pretraining, "pretrain"),
        launch=lambda wildcards: launch_options(model_of_pretraining(wildcards), "pretrain"),
    params:
        settings=lambda wildcards: settings_file(PROJECT.pretrain_settings(PRETRAININGS[wildcards.pretraining])),
        state=lambda wildcards, input: os.path.dirname(input.store),
        parent="",
    message:
        "Pretrain {wildcards.pretraining} (progress: {log})"
    shell:
        "exec dualspeed train --settings {params.settings:q} --model {input.model:q} --data {input.data:q}"
        ' --state {params.state:q} --out {output.checkpoint:q} --tracking "$DUALSPEED_TRACKING" {params.parent}'
        " --time-limit {resources.runtime} --gpus {resources.gpu} {resources.launch} > {log:q} 2>&1"


use rule pretrain as finetune with:
    input:
        model=start_of_row,
        data=lambda wildcards: LAYOUT.prepared(model_of_row(wildcards), "finetune"),
        store=ancient(LAYOUT.store_ready),
    output:
        checkpoint=directory(LAYOUT.model("{experiment}")),
    log:
        LAYOUT.log("finetune/{experiment}"),
    benchmark:
        LAYOUT.job_time("finetune/{experiment}")
    priority: 1
    threads: lambda wildcards: wanted(model_of_row(wildcards), "finetune").cpus
    resources:
        **scheduled(model_of_row, "finetune"),
        launch=lambda wildcards: launch_options(model_of_row(wildcards), "finetune"),
    params:
        settings=lambda wildcards: settings_file(PROJECT.finetune_settings(ROWS[wildcards.experiment])),
        state=lambda wildcards, input: os.path.dirname(input.store),
        parent=parent_option,
    message:
        "Finetune {wildcards.experiment} (progress: {log})"


# Takes the whole machine: a step's time says something only if nothing else runs beside it.
rule measure_speed:
    input:
        model=lambda wildcards: base_model(SPEEDS[wildcards.speed].model),
        data=lambda wildcards: LAYOUT.prepared(SPEEDS[wildcards.speed].model, "finetune"),
    output:
        times=LAYOUT.speed("{speed}"),
    log:
        LAYOUT.log("measure_speed/{speed}"),
    benchmark:
        LAYOUT.job_time("measure_speed/{speed}")
    threads: workflow.cores or 1
    resources:
        **scheduled(lambda wildcards: SPEEDS[wildcards.speed].model, "speed"),
        share=share_options,
    params:
        settings=lambda wildcards: settings_file(PROJECT.speed_settings(SPEEDS[wildcards.speed])),
    message:
        "Time the steps of {wildcards.speed}, alone on this machine"
    shell:
        "dualspeed speed --settings {params.settings:q} --model {input.model:q}"
        " --data {input.data:q} --out {output.times:q} --gpus {resources.gpu} {resources.share} > {log:q} 2>&1"
