rule perplexity:
    """Perplexity of one cell on one text."""
    input:
        model="results/models/{model}.json",
        tokens="results/tokens/{model}/evaluation-{evaluation}.safetensors",
        weights="results/cells/{model}/{calib}/{mode}/{cell}/weights.safetensors",
        sources=scripts("evaluate", "models", "packed", "accounting"),
    output:
        "results/cells/{model}/{calib}/{mode}/{cell}/perplexity-{evaluation}.json",
    log:
        "logs/cells/{model}/{calib}/{mode}/{cell}/perplexity-{evaluation}.log",
    resources:
        mem_mb=model_mb,
    params:
        model=model_json,
        name=lambda wildcards: "{label} {target} {mode}".format(**cell_of(wildcards).columns),
    shell:
        "{PYTHON} -m workflow.scripts.evaluate --model {params.model:q} --weights {input.weights:q}"
        " --tokens {input.tokens:q} --name {params.name:q} --threads {threads} --out {output:q}"
        " 2> >(tee {log:q} >&2)"
