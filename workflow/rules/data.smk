"""Tracking store, downloads, the demo's data, base models, and each stage's dataset."""


# The database itself is nobody's output: Snakemake deletes outputs before it makes them anew.
rule init_tracking:
    output:
        ready=touch(LAYOUT.store_ready),
    log:
        LAYOUT.log("init_tracking"),
    benchmark:
        LAYOUT.job_time("init_tracking")
    threads: 1
    resources:
        mem_mb=2000,
        runtime=growing(10),
    params:
        store=TRACKING,
    message:
        "Make sure of the MLflow store"
    shell:
        "dualspeed track init --tracking {params.store:q} > {log:q} 2>&1"


# For after a server was away: `snakemake track_sync`. Nothing asks for it, so nothing else runs with it.
rule track_sync:
    log:
        LAYOUT.log("track_sync"),
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        store=TRACKING,
        state=STATE,
    message:
        "Deliver to MLflow what it lacks"
    shell:
        "dualspeed track sync --tracking {params.store:q} --state {params.state:q} 2>&1 | tee {log:q}"


# On the machine that Snakemake runs on: compute nodes often have no way out.
rule download:
    output:
        receipt=RECEIPT,
    log:
        LAYOUT.log("download/{source}"),
    benchmark:
        LAYOUT.job_time("download/{source}")
    localrule: True
    threads: 4
    params:
        settings=lambda wildcards: settings_file(PROJECT.downloads[wildcards.source]),
        lock=DATA_LOCK,
    message:
        "Download {wildcards.source} (progress: {log})"
    shell:
        "exec dualspeed download {wildcards.source:q} --settings {params.settings:q} --lock {params.lock:q}"
        " --out {output.receipt:q} --workers 4 > {log:q} 2>&1"


rule downloads:
    input:
        expand(RECEIPT, source=PROJECT.downloads),
    message:
        "Everything is downloaded"


rule make_demo_data:
    output:
        data=directory(LAYOUT.demo_data),
    log:
        LAYOUT.log("make_demo_data"),
    benchmark:
        LAYOUT.job_time("make_demo_data")
    threads: 1
    resources:
        mem_mb=4000,
        runtime=growing(30),
    params:
        settings=settings_file(PROJECT.data),
    message:
        "Draw the demo's pictures and questions (progress: {log})"
    shell:
        "dualspeed demo-data --settings {params.settings:q} --out {output.data:q} > {log:q} 2>&1"


rule make_base_model:
    input:
        data=LAYOUT.demo_data,
    output:
        model=directory(LAYOUT.base_model("{model}")),
    log:
        LAYOUT.log("make_base_model/{model}"),
    benchmark:
        LAYOUT.job_time("make_base_model/{model}")
    wildcard_constraints:
        model=one_of(DEMO_MODELS),
    threads: 2
    resources:
        mem_mb=4000,
        runtime=growing(60),
    params:
        settings=settings_file(PROJECT.base_model),
    message:
        "Make the base model {wildcards.model} (progress: {log})"
    shell:
        "exec dualspeed base-model --settings {params.settings:q} --data {input.data:q} --out {output.model:q}"
        " > {log:q} 2>&1"


rule assemble_base_model:
    input:
        parts=lambda wildcards: sorted({made_from(part) for part in PROJECT.models[wildcards.model].parts.inputs}),
    output:
        model=directory(LAYOUT.base_model("{model}")),
    log:
        LAYOUT.log("assemble_base_model/{model}"),
    benchmark:
        LAYOUT.job_time("assemble_base_model/{model}")
    wildcard_constraints:
        model=one_of(ASSEMBLED_MODELS),
    threads: 2
    resources:
        mem_mb=80000,
        runtime=growing(120),
    params:
        settings=lambda wildcards: settings_file(PROJECT.models[wildcards.model].parts),
    message:
        "Put the base model {wildcards.model} together (progress: {log})"
    shell:
        "dualspeed assemble --settings {params.settings:q} --out {output.model:q} > {log:q} 2>&1"


# A download's folder is no rule's output, and these links to its files are.
rule link_base_model:
    input:
        receipt=lambda wildcards: made_from(PROJECT.models[wildcards.model].source),
    output:
        model=directory(LAYOUT.base_model("{model}")),
    log:
        LAYOUT.log("link_base_model/{model}"),
    benchmark:
        LAYOUT.job_time("link_base_model/{model}")
    wildcard_constraints:
        model=one_of(DOWNLOADED_MODELS),
    localrule: True
    threads: 1
    params:
        source=lambda wildcards: Path(PROJECT.models[wildcards.model].source).absolute(),
    message:
        "Take the downloaded base model {wildcards.model}"
    shell:
        "mkdir {output.model:q} 2> {log:q} && ln -s {params.source:q}/* {output.model:q} 2>> {log:q}"


rule prepare_data:
    input:
        model=lambda wildcards: base_model(wildcards.model),
        annotations=lambda wildcards: data_from(recipe_of(wildcards.model, wildcards.stage)),
        images=lambda wildcards: images_from(recipe_of(wildcards.model, wildcards.stage)),
        validation=lambda wildcards: validation_from(recipe_of(wildcards.model, wildcards.stage)),
    output:
        data=directory(LAYOUT.prepared("{model}", "{stage}")),
    log:
        LAYOUT.log("prepare_data/{model}/{stage}"),
    benchmark:
        LAYOUT.job_time("prepare_data/{model}/{stage}")
    threads: lambda wildcards: 1 if PROJECT.models[wildcards.model].source == "demo" else 16
    resources:
        mem_mb=8000,
        runtime=growing(240),
    params:
        settings=lambda wildcards: settings_file(recipe_of(wildcards.model, wildcards.stage).preparation()),
    message:
        "Check and prepare the {wildcards.stage} data of {wildcards.model} (progress: {log})"
    shell:
        "dualspeed prepare --settings {params.settings:q} --model {input.model:q} --out {output.data:q}"
        " --workers {threads} > {log:q} 2>&1"
