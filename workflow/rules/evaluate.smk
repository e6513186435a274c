"""Answers, then scores. Jobs are few and fat: one for a row and a way of inference answers all benchmarks."""


rule generate_answers:
    input:
        model=f"{RESULTS}/models/{{experiment}}",
        questions=sorted({made_from(benchmark.folder) for benchmark in PROJECT.benchmarks.values()}),
        store=ancient(TRACKING_READY),
    output:
        answers=expand(
            f"{RESULTS}/answers/{{{{experiment}}}}/{{{{inference}}}}/{{name}}.jsonl", name=PROJECT.benchmarks
        ),
        throughput=expand(
            f"{RESULTS}/answers/{{{{experiment}}}}/{{{{inference}}}}/{{name}}.throughput.json", name=PROJECT.benchmarks
        ),
    log:
        f"{LOGS}/generate_answers/{{experiment}}/{{inference}}.log",
    benchmark:
        f"{TIMES}/generate_answers/{{experiment}}/{{inference}}.tsv"
    threads: 1
    resources:
        **scheduled(lambda wildcards: EXPERIMENTS[wildcards.experiment].model, "answer"),
    params:
        settings=lambda wildcards: as_json(
            jobs.answer_settings(PROJECT, EXPERIMENTS[wildcards.experiment], wildcards.inference)
        ),
        parent=lambda wildcards: as_json(jobs.parent_run(PROJECT, EXPERIMENTS[wildcards.experiment])),
        folder=f"{RESULTS}/answers/{{experiment}}/{{inference}}",
    message:
        "Answer the benchmarks with {wildcards.experiment}, {wildcards.inference} tokens (progress: {log})"
    shell:
        "exec dualspeed answer --settings {params.settings:q} --model {input.model} --state {STATE}"
        " --out {params.folder} --tracking {TRACKING:q} --parent {params.parent:q}"
        " --gpus {resources.gpu} > {log} 2>&1"


rule score:
    input:
        answers=rules.generate_answers.output.answers,
        questions=rules.generate_answers.input.questions,
    output:
        scores=expand(f"{RESULTS}/scores/{{{{experiment}}}}/{{{{inference}}}}/{{name}}.json", name=PROJECT.benchmarks),
    log:
        f"{LOGS}/score/{{experiment}}/{{inference}}.log",
    benchmark:
        f"{TIMES}/score/{{experiment}}/{{inference}}.tsv"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=growing(30),
    params:
        benchmarks=list(PROJECT.benchmarks),
        folders=[benchmark.folder for benchmark in PROJECT.benchmarks.values()],
    message:
        "Score {wildcards.experiment}, {wildcards.inference} tokens"
    shell:
        """
        exec >{log} 2>&1
        benchmarks=({params.benchmarks:q}) folders=({params.folders:q})
        answers=({input.answers:q}) scores=({output.scores:q})
        for i in "${{!benchmarks[@]}}"; do
            dualspeed score "${{benchmarks[i]}}" --data "${{folders[i]}}" --answers "${{answers[i]}}" --out "${{scores[i]}}"
        done
        """
