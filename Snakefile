import os
import sys
from snakemake.utils import min_version

min_version("9.19")
if os.path.isdir(f"{workflow.basedir}/layerwise"):  # a checkout, which need not be installed; jobs inherit this
    sys.path.insert(0, workflow.basedir)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [workflow.basedir, os.environ.get("PYTHONPATH")]))

# A study of your own (--configfile) takes the place of the embedded one instead of being added to it.
if not workflow.overwrite_configfiles:

    configfile: f"{workflow.basedir}/config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/compress.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/collect.smk"
include: "workflow/rules/export.smk"
include: "workflow/rules/demo.smk"


rule all:
    default_target: True
    input:
        TABLES + PUBLISHED + TASKS_CHECKS,
        expand("figures/{figure}.{format}", figure=DRAWN, format=FORMATS),


onsuccess:
    remove_stale_outputs(DRAWN)


onerror:
    end_unfinished_run()
