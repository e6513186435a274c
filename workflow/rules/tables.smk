"""Tables, figures and the page of the selected sheet, from every score, step time and training.json of its rows."""


rule tables:
    input:
        scores=SCORES,
        speed=[LAYOUT.speed(key) for key in SPEEDS],
        pretraining=[LAYOUT.pretraining(key) for key in PRETRAININGS],
        checkpoints=CHECKPOINTS,
        store=ancient(LAYOUT.store_ready),
    output:
        tidy=TIDY_FILES,
        tables=[shown(path) for path in TABLE_FILES],
        figures=[shown(path) for path in FIGURE_FILES],
    log:
        LAYOUT.log(f"tables/{PROJECT.sheet_name}"),
    benchmark:
        LAYOUT.job_time(f"tables/{PROJECT.sheet_name}")
    threads: 1
    resources:
        mem_mb=4000,
        runtime=growing(30),
    params:
        settings=settings_file(PROJECT.sheet),
        tables=lambda wildcards, output: os.path.dirname(output.tables[0]),
        figures=lambda wildcards, output: os.path.dirname(output.figures[0]),
    message:
        "Write tables and figures of the sheet {PROJECT.sheet_name}"
    shell:
        "dualspeed tables --settings {params.settings:q} --out {params.tables:q} --figures {params.figures:q}"
        ' --tracking "$DUALSPEED_TRACKING" > {log:q} 2>&1'


# The sheet's first model shows it, for all methods alike.
rule draw_kept_tokens:
    input:
        model=LAYOUT.model(PROJECT.rows[0].id),
        questions=made_from(jobs.kept_tokens_settings(PROJECT).folder),
    output:
        figures=[shown(f"{FIGURES}/kept_tokens.{kind}") for kind in ("png", "svg")],
    log:
        LAYOUT.log(f"draw_kept_tokens/{PROJECT.sheet_name}"),
    benchmark:
        LAYOUT.job_time(f"draw_kept_tokens/{PROJECT.sheet_name}")
    threads: 1
    resources:
        **scheduled(lambda wildcards: PROJECT.rows[0].model, "answer"),
    params:
        settings=settings_file(jobs.kept_tokens_settings(PROJECT)),
        path=lambda wildcards, output: os.path.splitext(output.figures[0])[0],
    message:
        "Draw which tokens each pruning method keeps"
    shell:
        "dualspeed kept-tokens --settings {params.settings:q} --model {input.model:q} --out {params.path:q} > {log:q} 2>&1"


rule report:
    input:
        tables=rules.tables.output.tables,
        figures=[*rules.tables.output.figures, *rules.draw_kept_tokens.output.figures],
        answers=ANSWERS,
        questions=questions_of(PROJECT.benchmarks),
    output:
        page=REPORT,
    log:
        LAYOUT.log(f"report/{PROJECT.sheet_name}"),
    benchmark:
        LAYOUT.job_time(f"report/{PROJECT.sheet_name}")
    threads: 1
    resources:
        mem_mb=4000,
        runtime=growing(30),
    params:
        settings=settings_file(jobs.report_settings(PROJECT, COMMAND)),
        figures=lambda wildcards, input: os.path.dirname(input.figures[0]),
    message:
        "Write the page that shows the sheet {PROJECT.sheet_name}: {output.page}"
    shell:
        "dualspeed report --settings {params.settings:q} --figures {params.figures:q} --out {output.page:q}"
        " > {log:q} 2>&1"
