rule export:
    """One cell as a folder for other tools; not part of `all`. Computes the cell where its weights are gone."""
    input:
        model="results/models/{model}.json",
        weights="results/cells/{model}/{calib}/{mode}/{cell}/weights.safetensors",
        record="results/cells/{model}/{calib}/{mode}/{cell}/cell.json",
        code=CODE.of("layerwise.export.save"),
    output:
        directory("results/exports/{format}/{model}/{calib}/{mode}/{cell}"),
    log:
        "logs/exports/{format}/{model}/{calib}/{mode}/{cell}.log",
    wildcard_constraints:
        format="dense|packed|compressed-tensors",
    resources:
        mem_mb=model_mb,
        runtime=runtime_min,
    params:
        model=model_json,
        cell=lambda wildcards, input: str(Path(input.record).parent),
    shell:
        "{WORKER} export --cell {params.cell:q} --format {wildcards.format} --model {params.model:q}"
        " --out {output:q} 2> >(tee {log:q} >&2)"
