rule code:
    """A file named after the content of the code that a job depends on; see Code in study/job_inputs.py."""
    output:
        "results/code/{code}",
    localrule: True
    params:
        files=lambda wildcards: json.dumps(CODE.files[wildcards.code]),
    shell:
        "echo {params.files:q} > {output:q}"


rule docstrings:
    """The text of the embedded study, from the installed packages."""
    input:
        hashes=from_here(ROOT / f"resources/demo/text.sha256"),
        code=CODE.of("layerwise.demo.docstrings"),
    output:
        expand("results/text/{split}.txt", split=("train", "validation", "test")),
    log:
        "logs/docstrings.log",
    localrule: True
    shell:
        "{WORKER} docstrings --hashes {input.hashes:q} --out results/text 2> >(tee {log:q} >&2)"


rule model:
    """Fetch a model once, and hash its weights for the provenance of every row."""
    input:
        JOBS.model_files,
        code=CODE.of("layerwise.sources.fingerprint"),
    output:
        "results/models/{model}.json",
    log:
        "logs/models/{model}.log",
    localrule: True
    params:
        model=model_json,
    shell:
        "{WORKER} fingerprint --model {params.model:q} --out {output:q} 2> >(tee {log:q} >&2)"


rule calibration_tokens:
    """Draw the calibration sequences once: both modes and all methods see the same."""
    input:
        JOBS.text_files(JOBS.calibration_text),
        model="results/models/{model}.json",
        code=CODE.of("layerwise.sources.tokens"),
    output:
        "results/tokens/{model}/calibration-{calib}.safetensors",
    log:
        "logs/tokens/{model}/calibration-{calib}.log",
    params:
        model=model_json,
        text=as_json(JOBS.calibration_text),
        spec=as_json(lambda wildcards: PLAN.calibrations[wildcards.calib]),
    shell:
        "{WORKER} tokens calibration --model {params.model:q} --text {params.text:q}"
        " --calibration {params.spec:q} --out {output:q} 2> >(tee {log:q} >&2)"


rule evaluation_tokens:
    """Cut the evaluation text into windows."""
    input:
        JOBS.text_files(JOBS.evaluation_text),
        model="results/models/{model}.json",
        code=CODE.of("layerwise.sources.tokens"),
    output:
        "results/tokens/{model}/evaluation-{evaluation}.safetensors",
    log:
        "logs/tokens/{model}/evaluation-{evaluation}.log",
    priority: 1  # before the cells, which evaluate what they have in memory
    params:
        model=model_json,
        text=as_json(JOBS.evaluation_text),
        spec=as_json(lambda wildcards: PLAN.evaluations[wildcards.evaluation]),
    shell:
        "{WORKER} tokens evaluation --model {params.model:q} --text {params.text:q}"
        " --evaluation {params.spec:q} --out {output:q} 2> >(tee {log:q} >&2)"


rule check_model:
    """Check, before any calibration, that the model run block by block equals the model itself on a window of text."""

    # Jobs that calibrate wait for it. It has no inputs and parameters but theirs, so that it never makes them run again;
    # by other code they check the model themselves (evaluation/checked.py).
    input:
        model="results/models/{model}.json",
        tokens="results/tokens/{model}/calibration-{calib}.safetensors",
    output:
        CHECKED,
    log:
        "logs/models/{model}-check-{calib}.log",
    threads: MODEL_THREADS
    resources:
        mem_mb=model_mb,
        runtime=runtime_min,
        device="cpu",
    params:
        model=model_json,
    shell:
        "{WORKER} check-model --model {params.model:q} --fingerprint {input.model:q}"
        " --tokens {input.tokens:q} --threads {threads} --device {resources.device} --out {output:q}"
        " 2> >(tee {log:q} >&2)"


rule check_tasks:
    """Check that the model's tokenizer has the tokens that the study's tasks need."""
    input:
        model="results/models/{model}.json",
        tokens=f"results/tokens/{{model}}/calibration-{next(iter(PLAN.calibrations))}.safetensors",
        tasks=expand("results/tasks/{tasks}.json", tasks=PLAN.tasks),
        code=CODE.of("layerwise.evaluation.model_check"),
    output:
        TASKS_CHECKED,
    log:
        "logs/models/{model}-check-tasks.log",
    priority: 1
    localrule: True
    params:
        model=model_json,
    shell:
        "{WORKER} check-model --model {params.model:q} --fingerprint {input.model:q}"
        " --tokens {input.tokens:q} --tasks {input.tasks:q} --out {output:q} 2> >(tee {log:q} >&2)"


rule overlap:
    """How much of an evaluation a calibration set has seen, by content."""
    input:
        calibration="results/tokens/{model}/calibration-{calib}.safetensors",
        evaluation="results/tokens/{model}/evaluation-{evaluation}.safetensors",
        code=CODE.of("layerwise.sources.overlap"),
    output:
        "results/tokens/{model}/overlap/{calib}/{evaluation}.json",
    log:
        "logs/tokens/{model}/overlap/{calib}/{evaluation}.log",
    priority: 1  # before the cells: who reads the warning may end the run
    localrule: True
    shell:
        "{WORKER} overlap --calibration {input.calibration:q} --evaluation {input.evaluation:q}"
        " --out {output:q} 2> >(tee {log:q} >&2)"


rule gram:
    """The dense model's Gram of every tap, block by block, for all cells in shared mode."""
    input:
        model="results/models/{model}.json",
        tokens="results/tokens/{model}/calibration-{calib}.safetensors",
        checked=CHECKED,
        code=CODE.of("layerwise.calibration.calibrate", alone="layerwise.cli.calibrate"),
    output:
        "results/calibration/{model}/{calib}/gram.json",
    log:
        "logs/calibration/{model}/{calib}.log",
    benchmark:
        "results/calibration/{model}/{calib}/benchmark.tsv"
    threads: MODEL_THREADS
    resources:
        mem_mb=model_mb,
        runtime=runtime_min,
        device="cpu",
    params:
        model=model_json,
        dtype=JOBS.forward_dtype,
    shell:
        "{WORKER} calibrate --model {params.model:q} --fingerprint {input.model:q}"
        " --tokens {input.tokens:q} --code {input.code:q} {params.dtype:q} --threads {threads}"
        " --device {resources.device} --out {output:q} 2> >(tee {log:q} >&2)"


rule fisher:
    """For each layer the mean squared gradients of the dense model's loss by rows, for cells whose method needs them."""
    input:
        model="results/models/{model}.json",
        tokens="results/tokens/{model}/calibration-{calib}.safetensors",
        checked=CHECKED,
        code=CODE.of("layerwise.calibration.fisher", alone="layerwise.cli.fisher"),
    output:
        "results/calibration/{model}/{calib}/fisher.safetensors",
    log:
        "logs/calibration/{model}/{calib}-fisher.log",
    threads: MODEL_THREADS
    resources:
        mem_mb=model_mb,
        runtime=runtime_min,
        device="cpu",
    params:
        model=model_json,
    shell:
        "{WORKER} fisher --model {params.model:q} --fingerprint {input.model:q}"
        " --tokens {input.tokens:q} --code {input.code:q} --threads {threads}"
        " --device {resources.device} --out {output:q} 2> >(tee {log:q} >&2)"
