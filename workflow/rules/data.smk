"""What everything starts from: the tracking store, the demo's data and base model, and each stage's dataset."""

if SQLITE:

    # No params and no inputs: nothing but its absence ever makes this run, for it would begin with an empty store.
    rule init_tracking:
        message:
            "Create the MLflow store {output.store}"
        output:
            store=SQLITE,
        log:
            f"{LOGS}/init_tracking.log",
        benchmark:
            f"{TIMES}/init_tracking.tsv"
        resources:
            mem_mb=2000,
            runtime=10,
        threads: 1
        shell:
            "dualspeed track init --tracking {TRACKING:q} > {log} 2>&1"


rule make_demo_data:
    message:
        "Draw the demo's pictures and questions (progress: {log})"
    output:
        data=directory(DEMO_DATA),
    params:
        settings=as_json(jobs.demo_data_settings(PROJECT)),
    log:
        f"{LOGS}/make_demo_data.log",
    benchmark:
        f"{TIMES}/make_demo_data.tsv"
    resources:
        mem_mb=4000,
        runtime=30,
    threads: 1
    shell:
        "dualspeed demo-data --settings {params.settings:q} --out {output.data} > {log} 2>&1"


rule make_base_model:
    message:
        "Make the base model {wildcards.model} (progress: {log})"
    wildcard_constraints:
        model=one_of(DEMO_MODELS),
    input:
        data=DEMO_DATA,
    output:
        model=directory(f"{RESULTS}/models/base/{{model}}"),
    params:
        settings=as_json(jobs.base_model_settings(PROJECT)),
    log:
        f"{LOGS}/make_base_model/{{model}}.log",
    benchmark:
        f"{TIMES}/make_base_model/{{model}}.tsv"
    resources:
        mem_mb=4000,
        runtime=60,
    threads: 2
    shell:
        "exec dualspeed base-model --settings {params.settings:q} --data {input.data} --out {output.model} > {log} 2>&1"


rule prepare_data:
    message:
        "Check and prepare the {wildcards.stage} data of {wildcards.model} (progress: {log})"
    input:
        model=lambda wildcards: base_model(wildcards.model),
        annotations=lambda wildcards: made_from(recipe_of(wildcards.model, wildcards.stage).annotations),
    output:
        data=directory(f"{RESULTS}/prepared/{{model}}/{{stage}}"),
    params:
        settings=lambda wildcards: as_json(jobs.preparation_settings(recipe_of(wildcards.model, wildcards.stage))),
    log:
        f"{LOGS}/prepare_data/{{model}}/{{stage}}.log",
    benchmark:
        f"{TIMES}/prepare_data/{{model}}/{{stage}}.tsv"
    resources:
        mem_mb=8000,
        runtime=240,
    threads: 1
    shell:
        "dualspeed prepare --settings {params.settings:q} --model {input.model} --out {output.data}"
        " --workers {threads} > {log} 2>&1"
