KEPT = (lambda path: path) if PLAN.config["keep_weights"] else temp


rule compress:
    """One cell: all layers of a model by one method at one target. A layer is a row of the table, not a job."""
    input:
        model="results/models/{model}.json",
        tokens="results/tokens/{model}/calibration-{calib}.safetensors",
        checked=CHECKED,
        gram=branch(
            lambda wildcards: wildcards.mode == "shared",
            then="results/calibration/{model}/{calib}/gram.json",
            otherwise=[],
        ),
        fisher=lambda wildcards: cell_input(JOBS.fisher, wildcards),
        levels=lambda wildcards: cell_input(JOBS.levels, wildcards),
        # The worker also evaluates ahead. What it imports for that decides no output of this rule, and has code of its
        # own in the store of evaluations.
        code=lambda wildcards: CODE.of(
            "layerwise.compression.cell", alone="layerwise.cli.compress", files=JOBS.method_sources(wildcards)
        ),
    output:
        weights=KEPT("results/cells/{model}/{calib}/{mode}/{cell}/weights.safetensors"),
        layers="results/cells/{model}/{calib}/{mode}/{cell}/layers.parquet",
        trace="results/cells/{model}/{calib}/{mode}/{cell}/trace.parquet",
        record="results/cells/{model}/{calib}/{mode}/{cell}/cell.json",
    log:
        "logs/cells/{model}/{calib}/{mode}/{cell}/compress.log",
    benchmark:
        "results/cells/{model}/{calib}/{mode}/{cell}/benchmark.tsv"
    resources:
        mem_mb=model_mb,
        runtime=runtime_min,
        device="cpu",
    params:
        model=model_json,
        cell=lambda wildcards: cell_of(wildcards).params,
        gram=lambda wildcards, input: ["--gram", input.gram] if wildcards.mode == "shared" else [],
        fisher=lambda wildcards, input: ["--fisher", *input.fisher] if input.fisher else [],
        levels=lambda wildcards, input: ["--levels", *input.levels] if input.levels else [],
        dtype=JOBS.forward_dtype,
        folders=JOBS.method_folders,
        out=lambda wildcards, output: str(Path(output.record).parent),
        requested=REQUESTED,
    shell:
        "HF_HUB_OFFLINE=1 {WORKER} compress --cell {params.cell:q} --model {params.model:q}"
        " --fingerprint {input.model:q} --tokens {input.tokens:q} --code {input.code:q} {params.gram:q}"
        " {params.fisher:q} {params.levels:q} {params.dtype:q} {params.folders:q} --requested {params.requested:q} --threads {threads} --device {resources.device}"
        " --out {params.out:q} 2> >(tee {log:q} >&2)"


rule allocate:
    """The level of each layer, from one budget for all of them."""
    input:
        model="results/models/{model}.json",
        gram=lambda wildcards: cell_input(JOBS.allocation_gram, wildcards),
        tokens=lambda wildcards: cell_input(JOBS.allocation_tokens, wildcards),
        code=lambda wildcards: CODE.of(
            "layerwise.compression.allocate", files=cell_input(JOBS.allocator_sources, wildcards)
        ),
    output:
        "results/allocations/{model}/{calib}/{allocation}.parquet",
    log:
        "logs/allocations/{model}/{calib}/{allocation}.log",
    resources:
        mem_mb=model_mb,
        runtime=runtime_min,
        device="cpu",
    params:
        model=model_json,
        allocation=as_json(JOBS.allocation),
        columns=as_json(JOBS.allocation_columns),
        gram=lambda wildcards, input: ["--gram", *input.gram] if input.gram else [],
        tokens=lambda wildcards, input: ["--tokens", *input.tokens] if input.tokens else [],
        folders=JOBS.allocator_folders,
    shell:
        "{WORKER} allocate --columns {params.columns:q} --allocation {params.allocation:q}"
        " --model {params.model:q} --fingerprint {input.model:q} {params.gram:q} {params.tokens:q}"
        " {params.folders:q} --threads {threads} --device {resources.device} --out {output:q} 2> >(tee {log:q} >&2)"


rule certificate:
    """For every layer the error that no mask of a target's pattern can beat, from the Grams that all methods share."""
    input:
        model="results/models/{model}.json",
        gram="results/calibration/{model}/{calib}/gram.json",
        code=CODE.of("layerwise.compression.certificate"),
    output:
        "results/certificates/{model}/{calib}/{bound}.parquet",
    log:
        "logs/certificates/{model}/{calib}/{bound}.log",
    resources:
        mem_mb=model_mb,
        runtime=runtime_min,
    params:
        model=model_json,
        target=as_json(lambda wildcards: JOBS.certified(wildcards).spec["target"]),
        columns=as_json(
            lambda wildcards: {key: JOBS.certified(wildcards).columns[key] for key in ("model", "calibration", "seed")}
        ),
    shell:
        "{WORKER} certificate --columns {params.columns:q} --target {params.target:q}"
        " --model {params.model:q} --fingerprint {input.model:q} --gram {input.gram:q} --threads {threads}"
        " --out {output:q} 2> >(tee {log:q} >&2)"
