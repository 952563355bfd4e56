rule dense_states:
    """The dense model's hidden states after its last block, for the divergence of every cell from it."""
    input:
        model="results/models/{model}.json",
        tokens="results/tokens/{model}/evaluation-{evaluation}.safetensors",
        code=CODE.of("layerwise.evaluation.dense_states"),
    output:
        record="results/dense/{model}/{evaluation}.json",
        values="results/dense/{model}/{evaluation}.bin",
    log:
        "logs/dense/{model}/{evaluation}.log",
    priority: 1  # before the cells, which evaluate what they have in memory
    threads: MODEL_THREADS
    resources:
        mem_mb=model_mb,
        runtime=runtime_min,
        device="cpu",
    params:
        model=model_json,
    shell:
        "{WORKER} dense-states --model {params.model:q} --fingerprint {input.model:q}"
        " --tokens {input.tokens:q} --threads {threads} --device {resources.device} --out {output.record:q}"
        " 2> >(tee {log:q} >&2)"


rule perplexity:
    """Perplexity of one cell on one text, and its divergence from the dense model. Both are read if the job that
    compressed the cell has left them (evaluation/cache.py)."""
    input:
        model="results/models/{model}.json",
        tokens="results/tokens/{model}/evaluation-{evaluation}.safetensors",
        dense="results/dense/{model}/{evaluation}.json",
        values="results/dense/{model}/{evaluation}.bin",
        weights="results/cells/{model}/{calib}/{mode}/{cell}/weights.safetensors",
        code=CODE.of(KINDS["perplexity"], "layerwise.evaluation.cache", "layerwise.evaluation.dense_states"),
    output:
        "results/cells/{model}/{calib}/{mode}/{cell}/perplexity-{evaluation}.json",
    log:
        "logs/cells/{model}/{calib}/{mode}/{cell}/perplexity-{evaluation}.log",
    resources:
        mem_mb=model_mb,
        runtime=runtime_min,
        device="cpu",
    params:
        model=model_json,
        name=lambda wildcards: "{label} {target} {mode}".format(**cell_of(wildcards).columns),
    shell:
        "{WORKER} evaluate perplexity --model {params.model:q} --fingerprint {input.model:q}"
        " --weights {input.weights:q} --data {input.tokens:q} --dense {input.dense:q} --name {params.name:q} --threads {threads}"
        " --device {resources.device} --out {output:q} 2> >(tee {log:q} >&2)"


rule docstring_tasks:
    """The tasks of the embedded model, from its test text."""
    input:
        text="results/text/test.txt",
        definitions=[from_here(ROOT / f"resources/demo/tasks/{task}.yaml") for task in DOCSTRING_TASKS],
        code=CODE.of("layerwise.demo.docstring_tasks"),
    output:
        expand("results/tasks/docstrings/{task}.{kind}", task=DOCSTRING_TASKS, kind=("yaml", "jsonl")),
    log:
        "logs/docstring_tasks.log",
    localrule: True
    params:
        definitions=lambda wildcards, input: str(Path(input.definitions[0]).parent),
        out=lambda wildcards, output: str(Path(output[0]).parent),
    shell:
        "{WORKER} docstring-tasks --text {input.text:q} --definitions {params.definitions:q}"
        " --out {params.out:q} 2> >(tee {log:q} >&2)"


rule task_data:
    """Load the data of a set of tasks once, so that missing data stops the run early and nothing is fetched twice."""
    input:
        JOBS.task_files,
        code=CODE.of("layerwise.evaluation.zero_shot"),
    output:
        "results/tasks/{tasks}.json",
    log:
        "logs/tasks/{tasks}.log",
    priority: 1
    localrule: True
    params:
        tasks=tasks_json,
    shell:
        "{WORKER} tasks data --tasks {params.tasks:q} --out {output:q} 2> >(tee {log:q} >&2)"


rule zero_shot:
    """One cell on one set of zero-shot tasks, by lm-eval. A result that exists already is read."""
    input:
        JOBS.task_files,
        model="results/models/{model}.json",
        tasks="results/tasks/{tasks}.json",
        weights="results/cells/{model}/{calib}/{mode}/{cell}/weights.safetensors",
        code=CODE.of(KINDS["tasks"], "layerwise.evaluation.cache"),
    output:
        "results/cells/{model}/{calib}/{mode}/{cell}/tasks-{tasks}.json",
    log:
        "logs/cells/{model}/{calib}/{mode}/{cell}/tasks-{tasks}.log",
    resources:
        mem_mb=model_mb,
        runtime=runtime_min,
        device="cpu",
    params:
        model=model_json,
        tasks=tasks_json,
    shell:
        "{WORKER} evaluate tasks --model {params.model:q} --fingerprint {input.model:q}"
        " --weights {input.weights:q} --data {input.tasks:q} --tasks {params.tasks:q}"
        " --threads {threads} --device {resources.device} --out {output:q} 2> >(tee {log:q} >&2)"
