"""Answers, then scores. Jobs are few and fat: one for a row and a way of inference answers all benchmarks."""


rule answer_shard:
    input:
        model=LAYOUT.model("{experiment}"),
        questions=questions_of(PROJECT.benchmarks),
    output:
        touch(f"{LAYOUT.answers('{experiment}', '{inference}')}/shard{{shard}}of{SHARDS}.done"),
    log:
        LAYOUT.log("answer_shard/{experiment}/{inference}/{shard}"),
    benchmark:
        LAYOUT.job_time("answer_shard/{experiment}/{inference}/{shard}")
    wildcard_constraints:
        shard="[0-9]+",
    threads: 1
    resources:
        **scheduled(model_of_row, "answer"),
    params:
        settings=answer_settings,
        state=STATE,
        folder=LAYOUT.answers("{experiment}", "{inference}"),
        options=lambda wildcards: f"--shard {wildcards.shard}/{SHARDS}",
    message:
        "Answer part {wildcards.shard} of {SHARDS} with {wildcards.experiment}, {wildcards.inference} tokens (progress: {log})"
    shell:
        "exec dualspeed answer --settings {params.settings:q} --model {input.model:q} --state {params.state:q}"
        ' --out {params.folder:q} --tracking "$DUALSPEED_TRACKING" {params.options}'
        " --gpus {resources.gpu} > {log:q} 2>&1"


use rule answer_shard as generate_answers with:
    input:
        model=LAYOUT.model("{experiment}"),
        questions=questions_of(PROJECT.benchmarks),
        shards=[
            f"{LAYOUT.answers('{experiment}', '{inference}')}/shard{number}of{SHARDS}.done"
            for number in range(1, SHARDS + 1)
            if SHARDS > 1
        ],
        store=ancient(LAYOUT.store_ready),
    output:
        answers=all_answers("{benchmark}.jsonl", PROJECT.benchmarks),
        throughput=all_answers("{benchmark}.throughput.json", PROJECT.benchmarks),
    log:
        LAYOUT.log("generate_answers/{experiment}/{inference}"),
    benchmark:
        LAYOUT.job_time("generate_answers/{experiment}/{inference}")
    params:
        settings=answer_settings,
        state=lambda wildcards, input: os.path.dirname(input.store),
        folder=LAYOUT.answers("{experiment}", "{inference}"),
        options=parent_option,
    message:
        "Answer the benchmarks with {wildcards.experiment}, {wildcards.inference} tokens (progress: {log})"


rule score:
    input:
        answers=all_answers("{benchmark}.jsonl", PROJECT.scored),
        questions=questions_of(PROJECT.benchmarks),
    output:
        scores=[LAYOUT.score("{experiment}", "{inference}", name) for name in PROJECT.scored],
    log:
        LAYOUT.log("score/{experiment}/{inference}"),
    benchmark:
        LAYOUT.job_time("score/{experiment}/{inference}")
    threads: 1
    resources:
        mem_mb=2000,
        runtime=growing(30),
    params:
        benchmarks=PROJECT.scored,
        folders=[QUESTIONS_FOLDERS[name] for name in PROJECT.scored],
    message:
        "Score {wildcards.experiment}, {wildcards.inference} tokens"
    shell:
        """
        exec >{log:q} 2>&1
        benchmarks=({params.benchmarks:q}) folders=({params.folders:q})
        answers=({input.answers:q}) scores=({output.scores:q})
        for i in "${{!benchmarks[@]}}"; do
            dualspeed score "${{benchmarks[i]}}" --data "${{folders[i]}}" --answers "${{answers[i]}}" --out "${{scores[i]}}"
        done
        """


rule submission:
    input:
        answers=LAYOUT.answer_file("{experiment}", "full", "{name}"),
        questions=lambda wildcards: made_from(QUESTIONS_FOLDERS[wildcards.name]),
    output:
        LAYOUT.submission("{experiment}", "{name}", "{kind}"),
    log:
        LAYOUT.log("submission/{experiment}/{name}.{kind}"),
    benchmark:
        LAYOUT.job_time("submission/{experiment}/{name}.{kind}")
    wildcard_constraints:
        name=one_of(PROJECT.submitted),
        kind="json|xlsx",
    threads: 1
    resources:
        mem_mb=2000,
        runtime=growing(30),
    params:
        folder=lambda wildcards: QUESTIONS_FOLDERS[wildcards.name],
    message:
        "Write what the server of {wildcards.name} takes from {wildcards.experiment}"
    shell:
        "dualspeed submit {wildcards.name:q} --data {params.folder:q} --answers {input.answers:q} --out {output:q}"
        " > {log:q} 2>&1"


# Not part of `all`: needs lmms-eval, its own data from the Hub, and a GPU. `snakemake evaluate_lmms` runs it for all.
rule evaluate_lmms:
    input:
        [LAYOUT.lmms_eval(row) for row in ROWS],
    message:
        "lmms-eval's numbers stand beside ours"


rule compare_lmms:
    input:
        model=LAYOUT.model("{experiment}"),
        scores=[LAYOUT.score("{experiment}", "full", name) for name in PROJECT.scored],
    output:
        LAYOUT.lmms_eval("{experiment}"),
    log:
        LAYOUT.log("lmms_eval/{experiment}"),
    benchmark:
        LAYOUT.job_time("lmms_eval/{experiment}")
    threads: 1
    resources:
        **scheduled(model_of_row, "answer"),
    params:
        scores=lambda wildcards, input: os.path.dirname(input.scores[0]),
        work=f"{STATE}/lmms_eval/{{experiment}}",
    message:
        "Score {wildcards.experiment} with lmms-eval (progress: {log})"
    shell:
        "dualspeed lmms --model {input.model:q} --scores {params.scores:q} --work {params.work:q} --out {output:q}"
        " > {log:q} 2>&1"
