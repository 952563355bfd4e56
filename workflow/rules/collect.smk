rule tables:
    """All cells in tidy tables, and the main table for reading."""
    input:
        [f"{cell.folder}/{name}" for cell in PLAN.cells for name in ("layers.parquet", "trace.parquet", "cell.json")],
        [f"{cell.folder}/perplexity-{text}.json" for cell in PLAN.cells for text in PLAN.evaluations],
        list(PLAN.certificates),
        sources=[
            *scripts("collect", "cell_results", "bounds", "comparisons", "significance"),
            *scripts("table_schema", "tables", "grid", "sources"),
            TABLE_SCHEMA,
        ],
    output:
        [
            report(table, caption="../report/main_table.rst", category="Tables") if table.endswith(".md") else table
            for table in TABLES
        ],
    log:
        "logs/tables.log",
    params:
        study=STUDY,
    shell:
        "{PYTHON} -m workflow.scripts.collect --study {params.study:q} --out results/tables 2> >(tee {log:q} >&2)"


for figure, drawing in DRAWN.items():  # a rule each, because the path of a caption knows no wildcards

    rule:
        name:
            f"figure_{figure}"
        input:
            [f"results/tables/{table}.parquet" for table in drawing.tables],
            sources=FIGURE_SCRIPTS,
        output:
            f"figures/{figure}.pdf",
            report(f"figures/{figure}.svg", caption=f"../report/{figure}.rst", category="Figures"),
            f"figures/{figure}.png",
        log:
            f"logs/figures/{figure}.log",
        params:
            figure=figure,
        shell:
            "{PYTHON} -m workflow.scripts.plot {params.figure} --tables results/tables --out {output:q}"
            " 2> >(tee {log:q} >&2)"
