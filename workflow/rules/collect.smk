rule tables:
    """All cells in tidy tables, and the main table for reading."""
    input:
        [path for cell in PLAN.cells for path in JOBS.results(cell)],
        list(dict.fromkeys(cell.overlap(text) for cell in PLAN.cells for text in PLAN.evaluations)),
        list(PLAN.certificates),
        list(PLAN.allocations),
        code=CODE.of("layerwise.results.collect"),
    output:
        [
            report(table, caption="../report/main_table.rst", category="Tables") if table.endswith(".md") else table
            for table in TABLES
        ],
    log:
        "logs/tables.log",
    localrule: True
    params:
        study=whole_study,
    shell:
        "{WORKER} tables --study {params.study:q} --out results/tables 2> >(tee {log:q} >&2)"


rule published:
    """The study's perplexities beside the published ones, the dense model first."""
    input:
        cells="results/tables/cells.parquet",
        numbers=from_here(ROOT / f"resources/published.csv"),
        code=CODE.of("layerwise.comparison.published"),
    output:
        [
            report(table, caption="../report/published.rst", category="Tables") if table.endswith(".md") else table
            for table in PUBLISHED
        ],
    log:
        "logs/published.log",
    localrule: True
    params:
        study=whole_study,
    shell:
        "{WORKER} published --study {params.study:q} --tables results/tables" " 2> >(tee {log:q} >&2)"


rule report_page:
    """The study as one HTML page that needs no network; not part of `all`. `--report` gives Snakemake's own."""
    input:
        TABLES,
        published="results/tables/published.parquet",
        figures=[f"figures/{figure}.svg" for figure in DRAWN],
        code=CODE.of("layerwise.report.page"),
        page=PAGE,
    output:
        "results/report.html",
    log:
        "logs/report_page.log",
    localrule: True
    params:
        study=whole_study,
    shell:
        "{WORKER} report-page --study {params.study:q} --tables results/tables"
        " --figures {input.figures:q} --out {output:q} 2> >(tee {log:q} >&2)"


for figure, drawing in DRAWN.items():  # a rule each, because the path of a caption knows no wildcards

    rule:
        name:
            f"figure_{figure}"
        input:
            [f"results/tables/{table}.parquet" for table in drawing.tables],
            code=CODE.of("layerwise.figures.plot", drawing.module),
        output:
            f"figures/{figure}.pdf",
            report(f"figures/{figure}.svg", caption=f"../report/{figure}.rst", category="Figures"),
            f"figures/{figure}.png",
        log:
            f"logs/figures/{figure}.log",
        localrule: True
        params:
            figure=figure,
            folders=method_paths,
            looks=card_looks,
        shell:
            "{WORKER} figure {params.figure} --tables results/tables {params.folders:q} --out {output:q}"
            " 2> >(tee {log:q} >&2)"
