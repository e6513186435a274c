"""What everything starts from: the tracking store, the demo's data and base model, and each stage's dataset."""


# The database itself is nobody's output: Snakemake deletes outputs before it makes them anew.
rule init_tracking:
    output:
        ready=touch(TRACKING_READY),
    log:
        f"{LOGS}/init_tracking.log",
    benchmark:
        f"{TIMES}/init_tracking.tsv"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=growing(10),
    params:
        store=TRACKING,
    message:
        "Make sure of the MLflow store"
    shell:
        "dualspeed track init --tracking {params.store:q} > {log} 2>&1"


# For after a server was away: `snakemake track_sync`. Nothing asks for it, so nothing else runs with it.
rule track_sync:
    log:
        f"{LOGS}/track_sync.log",
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        store=TRACKING,
    message:
        "Deliver to MLflow what it lacks"
    shell:
        "dualspeed track sync --tracking {params.store:q} --state {STATE} 2>&1 | tee {log}"


# On the machine that Snakemake runs on: compute nodes often have no way out.
rule download:
    output:
        receipt=RECEIPT,
    log:
        f"{LOGS}/download/{{source}}.log",
    benchmark:
        f"{TIMES}/download/{{source}}.tsv"
    localrule: True
    threads: 4
    params:
        settings=lambda wildcards: as_json(jobs.download_settings(PROJECT.downloads[wildcards.source])),
    message:
        "Download {wildcards.source} (progress: {log})"
    shell:
        "exec dualspeed download {wildcards.source} --settings {params.settings:q} --lock {DATA_LOCK:q}"
        " --out {output.receipt} --workers 4 > {log} 2>&1"


rule downloads:
    input:
        expand(RECEIPT, source=PROJECT.downloads),
    message:
        "Everything is downloaded"


rule make_demo_data:
    output:
        data=directory(DEMO_DATA),
    log:
        f"{LOGS}/make_demo_data.log",
    benchmark:
        f"{TIMES}/make_demo_data.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=growing(30),
    params:
        settings=as_json(jobs.demo_data_settings(PROJECT)),
    message:
        "Draw the demo's pictures and questions (progress: {log})"
    shell:
        "dualspeed demo-data --settings {params.settings:q} --out {output.data} > {log} 2>&1"


rule make_base_model:
    input:
        data=DEMO_DATA,
    output:
        model=directory(f"{RESULTS}/models/base/{{model}}"),
    log:
        f"{LOGS}/make_base_model/{{model}}.log",
    benchmark:
        f"{TIMES}/make_base_model/{{model}}.tsv"
    wildcard_constraints:
        model=one_of(DEMO_MODELS),
    threads: 2
    resources:
        mem_mb=4000,
        runtime=growing(60),
    params:
        settings=as_json(jobs.base_model_settings(PROJECT)),
    message:
        "Make the base model {wildcards.model} (progress: {log})"
    shell:
        "exec dualspeed base-model --settings {params.settings:q} --data {input.data} --out {output.model} > {log} 2>&1"


rule assemble_base_model:
    input:
        parts=lambda wildcards: sorted({made_from(part) for part in PROJECT.models[wildcards.model].parts.inputs}),
    output:
        model=directory(f"{RESULTS}/models/base/{{model}}"),
    log:
        f"{LOGS}/assemble_base_model/{{model}}.log",
    benchmark:
        f"{TIMES}/assemble_base_model/{{model}}.tsv"
    wildcard_constraints:
        model=one_of(ASSEMBLED_MODELS),
    threads: 2
    resources:
        mem_mb=80000,
        runtime=growing(120),
    params:
        settings=lambda wildcards: as_json(jobs.parts_settings(PROJECT.models[wildcards.model].parts)),
    message:
        "Put the base model {wildcards.model} together (progress: {log})"
    shell:
        "dualspeed assemble --settings {params.settings:q} --out {output.model} > {log} 2>&1"


# A download's folder is no rule's output, and these links to its files are.
rule link_base_model:
    input:
        receipt=lambda wildcards: made_from(PROJECT.models[wildcards.model].source),
    output:
        model=directory(f"{RESULTS}/models/base/{{model}}"),
    log:
        f"{LOGS}/link_base_model/{{model}}.log",
    benchmark:
        f"{TIMES}/link_base_model/{{model}}.tsv"
    wildcard_constraints:
        model=one_of(DOWNLOADED_MODELS),
    localrule: True
    threads: 1
    params:
        source=lambda wildcards: Path(PROJECT.models[wildcards.model].source).absolute(),
    message:
        "Take the downloaded base model {wildcards.model}"
    shell:
        "mkdir {output.model} 2> {log} && ln -s {params.source:q}/* {output.model} 2>> {log}"


rule prepare_data:
    input:
        model=lambda wildcards: base_model(wildcards.model),
        annotations=lambda wildcards: made_from(recipe_of(wildcards.model, wildcards.stage).annotations),
        images=lambda wildcards: images_from(recipe_of(wildcards.model, wildcards.stage).images),
        validation=lambda wildcards: validation_from(recipe_of(wildcards.model, wildcards.stage)),
    output:
        data=directory(f"{RESULTS}/prepared/{{model}}/{{stage}}"),
    log:
        f"{LOGS}/prepare_data/{{model}}/{{stage}}.log",
    benchmark:
        f"{TIMES}/prepare_data/{{model}}/{{stage}}.tsv"
    threads: lambda wildcards: 1 if PROJECT.models[wildcards.model].source == "demo" else 16
    resources:
        mem_mb=8000,
        runtime=growing(240),
    params:
        settings=lambda wildcards: as_json(jobs.preparation_settings(recipe_of(wildcards.model, wildcards.stage))),
    message:
        "Check and prepare the {wildcards.stage} data of {wildcards.model} (progress: {log})"
    shell:
        "dualspeed prepare --settings {params.settings:q} --model {input.model} --out {output.data}"
        " --workers {threads} > {log} 2>&1"
