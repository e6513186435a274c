"""Answers, then scores. Jobs are few and fat: one for a row and a way of inference answers all benchmarks."""

ANSWERS = f"{RESULTS}/answers/{{experiment}}/{{inference}}"
# Where a row's questions are divided, shards leave their answers in the state folder, and generate_answers merges them.
SHARDS = PROJECT.inference.shards


def all_answers(name, benchmarks):
    """A file of each benchmark beside a row's answers."""
    return [f"{ANSWERS}/{name.format(benchmark=benchmark)}" for benchmark in benchmarks]


rule answer_shard:
    input:
        model=f"{RESULTS}/models/{{experiment}}",
        questions=sorted({made_from(benchmark.folder) for benchmark in PROJECT.benchmarks.values()}),
    output:
        touch(f"{ANSWERS}/shard{{shard}}of{SHARDS}.done"),
    log:
        f"{LOGS}/answer_shard/{{experiment}}/{{inference}}/{{shard}}.log",
    benchmark:
        f"{TIMES}/answer_shard/{{experiment}}/{{inference}}/{{shard}}.tsv"
    wildcard_constraints:
        shard="[0-9]+",
    threads: 1
    resources:
        **scheduled(lambda wildcards: EXPERIMENTS[wildcards.experiment].model, "answer"),
    params:
        settings=lambda wildcards: as_json(
            jobs.answer_settings(PROJECT, EXPERIMENTS[wildcards.experiment], wildcards.inference)
        ),
        folder=ANSWERS,
    message:
        "Answer part {wildcards.shard} of {SHARDS} with {wildcards.experiment}, {wildcards.inference} tokens (progress: {log})"
    shell:
        "exec dualspeed answer --settings {params.settings:q} --model {input.model} --state {STATE}"
        " --out {params.folder} --shard {wildcards.shard}/{SHARDS} --gpus {resources.gpu} > {log} 2>&1"


rule generate_answers:
    input:
        model=f"{RESULTS}/models/{{experiment}}",
        questions=rules.answer_shard.input.questions,
        shards=[f"{ANSWERS}/shard{number}of{SHARDS}.done" for number in range(1, SHARDS + 1) if SHARDS > 1],
        store=ancient(TRACKING_READY),
    output:
        answers=all_answers("{benchmark}.jsonl", PROJECT.benchmarks),
        throughput=all_answers("{benchmark}.throughput.json", PROJECT.benchmarks),
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
        answers=all_answers("{benchmark}.jsonl", PROJECT.scored),
        questions=rules.generate_answers.input.questions,
    output:
        scores=expand(f"{RESULTS}/scores/{{{{experiment}}}}/{{{{inference}}}}/{{name}}.json", name=PROJECT.scored),
    log:
        f"{LOGS}/score/{{experiment}}/{{inference}}.log",
    benchmark:
        f"{TIMES}/score/{{experiment}}/{{inference}}.tsv"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=growing(30),
    params:
        benchmarks=PROJECT.scored,
        folders=[PROJECT.benchmarks[name].folder for name in PROJECT.scored],
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


rule submission:
    input:
        answers=f"{RESULTS}/answers/{{experiment}}/full/{{name}}.jsonl",
        questions=lambda wildcards: made_from(PROJECT.benchmarks[wildcards.name].folder),
    output:
        f"{RESULTS}/submissions/{{experiment}}/{{name}}.{{kind}}",
    log:
        f"{LOGS}/submission/{{experiment}}/{{name}}.{{kind}}.log",
    benchmark:
        f"{TIMES}/submission/{{experiment}}/{{name}}.{{kind}}.tsv"
    wildcard_constraints:
        name=one_of(PROJECT.submitted),
        kind="json|xlsx",
    threads: 1
    resources:
        mem_mb=2000,
        runtime=growing(30),
    params:
        folder=lambda wildcards: PROJECT.benchmarks[wildcards.name].folder,
    message:
        "Write what the server of {wildcards.name} takes from {wildcards.experiment}"
    shell:
        "dualspeed submit {wildcards.name} --data {params.folder:q} --answers {input.answers} --out {output}"
        " > {log} 2>&1"


# Not part of `all`: needs lmms-eval, its own data from the Hub, and a GPU. `snakemake evaluate_lmms` runs it for all.
rule evaluate_lmms:
    input:
        expand(f"{RESULTS}/lmms_eval/{{experiment}}.csv", experiment=EXPERIMENTS),
    message:
        "lmms-eval's numbers stand beside ours"


rule compare_lmms:
    input:
        model=f"{RESULTS}/models/{{experiment}}",
        scores=expand(f"{RESULTS}/scores/{{{{experiment}}}}/full/{{name}}.json", name=PROJECT.scored),
    output:
        f"{RESULTS}/lmms_eval/{{experiment}}.csv",
    log:
        f"{LOGS}/lmms_eval/{{experiment}}.log",
    benchmark:
        f"{TIMES}/lmms_eval/{{experiment}}.tsv"
    threads: 1
    resources:
        **scheduled(lambda wildcards: EXPERIMENTS[wildcards.experiment].model, "answer"),
    params:
        scores=f"{RESULTS}/scores/{{experiment}}/full",
        work=f"{STATE}/lmms_eval/{{experiment}}",
    message:
        "Score {wildcards.experiment} with lmms-eval (progress: {log})"
    shell:
        "dualspeed lmms --model {input.model} --scores {params.scores} --work {params.work} --out {output}"
        " > {log} 2>&1"
