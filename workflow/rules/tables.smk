"""Tables, figures and the page of the selected sheet, from every score, step time and training.json of its rows."""

TABLES, FIGURES = (
    f"{RESULTS}/tables/{PROJECT.sheet}",
    f"{RESULTS}/figures/{PROJECT.sheet}",
)
TIDY_FILES = expand(f"{TABLES}/{{name}}.csv", name=["scores", "scores_detail", "scores_by_type", "speed", "costs"])
TABLE_FILES = expand(
    f"{TABLES}/{{name}}.{{kind}}",
    name=["table1", "table2", "table3", "table_speed"],
    kind=["csv", "md", "tex"],
)
FIGURE_FILES = expand(
    f"{FIGURES}/{{name}}.{{kind}}",
    name=[
        *["figure4", "figure5"],
        *["figure_mismatch", "figure_speedup", "figure_question_types", "figure_learning_curves"],
    ],
    kind=["png", "svg"],
)

# The sheet's own, so that another one's page stays, as its tables do: report-paper.html. The demo's are report.html and
# report-full.html, for it is what runs where nothing else is named.
REPORT = f"{RESULTS}/report" + f"-{PROJECT.sheet}".removeprefix("-demo") + ".html"
# What makes this sheet again; the page says so.
COMMAND = " ".join(
    ["snakemake"]
    + [f"--configfile {path}" for path in workflow.configfiles if Path(path) != Path("config/demo/config.yaml")]
    + [f"--config experiments={config['experiments']}"]
)


def shown(path):
    """Mark what the HTML report shows, with the caption of the same name."""
    name, kind = Path(path).stem, Path(path).suffix
    if kind not in (".csv", ".svg") or path in TIDY_FILES:
        return path
    category = "Figures" if kind == ".svg" else "Tables"
    return report(
        path,
        caption=f"../report/{name}.rst",
        category=category,
        labels={"sheet": PROJECT.sheet, "is": name},
    )


rule tables:
    input:
        scores=SCORES,
        speed=expand(f"{RESULTS}/speed/{{speed}}.json", speed=SPEEDS),
        pretraining=expand(f"{RESULTS}/pretrain/{{pretraining}}", pretraining=PRETRAININGS),
        checkpoints=CHECKPOINTS,
        store=ancient(TRACKING_READY),
    output:
        tidy=TIDY_FILES,
        tables=[shown(path) for path in TABLE_FILES],
        figures=[shown(path) for path in FIGURE_FILES],
    log:
        f"{LOGS}/tables/{PROJECT.sheet}.log",
    benchmark:
        f"{TIMES}/tables/{PROJECT.sheet}.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=growing(30),
    params:
        settings=as_json(jobs.table_settings(PROJECT)),
        tables=TABLES,
        figures=FIGURES,
    message:
        "Write tables and figures of the sheet {PROJECT.sheet}"
    shell:
        "dualspeed tables --settings {params.settings:q} --out {params.tables} --figures {params.figures}"
        " --tracking {TRACKING:q} > {log} 2>&1"


# The sheet's first model shows it, for all methods alike.
rule draw_kept_tokens:
    input:
        model=f"{RESULTS}/models/{PROJECT.experiments[0].id}",
        questions=made_from(jobs.kept_tokens_settings(PROJECT)["folder"]),
    output:
        figures=[shown(f"{FIGURES}/kept_tokens.{kind}") for kind in ("png", "svg")],
    log:
        f"{LOGS}/draw_kept_tokens/{PROJECT.sheet}.log",
    benchmark:
        f"{TIMES}/draw_kept_tokens/{PROJECT.sheet}.tsv"
    threads: 1
    resources:
        **scheduled(lambda wildcards: PROJECT.experiments[0].model, "answer"),
    params:
        settings=as_json(jobs.kept_tokens_settings(PROJECT)),
        path=f"{FIGURES}/kept_tokens",
    message:
        "Draw which tokens each pruning method keeps"
    shell:
        "dualspeed kept-tokens --settings {params.settings:q} --model {input.model} --out {params.path} > {log} 2>&1"


rule report:
    input:
        tables=rules.tables.output.tables,
        figures=[*rules.tables.output.figures, *rules.draw_kept_tokens.output.figures],
        answers=[path.replace(f"{RESULTS}/scores/", f"{RESULTS}/answers/") + "l" for path in SCORES],
        questions=sorted({made_from(benchmark.folder) for benchmark in PROJECT.benchmarks.values()}),
    output:
        page=REPORT,
    log:
        f"{LOGS}/report/{PROJECT.sheet}.log",
    benchmark:
        f"{TIMES}/report/{PROJECT.sheet}.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=growing(30),
    params:
        settings=as_json(jobs.report_settings(PROJECT, COMMAND)),
        figures=FIGURES,
    message:
        "Write the page that shows the sheet {PROJECT.sheet}: {output.page}"
    shell:
        "dualspeed report --settings {params.settings:q} --figures {params.figures} --out {output.page} > {log} 2>&1"
