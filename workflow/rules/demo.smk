rule demo_model:
    """The recipe of the embedded model; not part of `all`: its weights are committed."""
    input:
        expand("results/text/{split}.txt", split=("train", "validation", "test")),
        code=CODE.of("layerwise.demo.train"),
    output:
        expand(
            "results/demo/{file}",
            file=("model.safetensors", "config.json", "tokenizer.json", "curve.csv", "curve.svg", "training.json"),
        ),
    log:
        "logs/demo_model.log",
    threads: os.cpu_count() or 1  # as many as --cores allows; a cluster is given no --cores
    shell:
        "{WORKER} train --text results/text --out results/demo 2> >(tee {log:q} >&2)"
