# The cost of a run, printed before its first job, and refused where it does not fit.
from layerwise.study.estimate import Limits, computed_wider, disks, estimate_jobs, limit_errors
from layerwise.study.estimate import short, together
from layerwise.study.speeds import at_hand
from layerwise.runtime.memory import machine_memory
from layerwise.runtime.provenance import read_clone


def preflight():
    """Print what the jobs take together and refuse what cannot fit, before the first one starts."""
    if workflow.touch:
        return
    results = Path("results" if os.path.isdir("results") else ".")
    if not os.access(results, os.W_OK):  # Snakemake would end in a traceback
        raise WorkflowError(
            f"{results.absolute()} cannot be written: the disk is mounted read-only, or permission is denied."
        )
    if unread := read_clone().unread:
        logger.warning(f"warning: {unread}")
    planned = list(workflow.dag.needrun_jobs())
    jobs = [Job(job.rule.name, job.wildcards_dict) for job in planned]
    asked = workflow.global_resources.get("mem_mb").value
    limits = [(asked * 1e6, "--resources allow")] if asked else []
    if workflow.local_exec:  # elsewhere what this machine has says nothing
        limits.append((machine_memory(), "this machine has"))
    memory, whose = min(limits, default=(None, ""))
    told = workflow.resource_settings.overwrite_resources
    told = {rule: own["mem_mb"] for rule, own in told.items() if "mem_mb" in own}
    given = {rule: None if own.is_evaluable() else own.value * 1e6 for rule, own in told.items()}
    limits = Limits(memory, whose, *disks(), given)
    cores = workflow.resource_settings.cores or workflow.nodes
    totals = estimate_jobs(COSTS, jobs, cores, at_hand() if workflow.local_exec else None)
    if totals.largest or totals.unknown:
        logger.info(short(COSTS, totals, limits, timed=workflow.local_exec))
    for sentence in computed_wider(COSTS, jobs) if workflow.local_exec else ():
        logger.info(sentence)
    sentences = list(limit_errors(COSTS, jobs, totals, limits))
    devices = {job.resources.get("device") for job in planned if job.rule.name in ("gram", "fisher", "compress")}
    if devices and "cuda" not in devices and workflow.local_exec and workflow.global_resources.get("gpu").value:
        sentences.append(
            "The run counts gpu, but its jobs would run on the processor: --set-resources takes the place of all such "
            "lines of a profile, so repeat those of profiles/gpu with yours."
        )
    if sentences:
        raise WorkflowError(" ".join(sentences))
    if workflow.local_exec and not asked and (sentence := together(COSTS, planned, cores, machine_memory())):
        logger.warning(f"warning: {sentence}")


onstart:
    preflight()
    write_atomic(Path(REQUESTED), json.dumps(JOBS.requested, indent=1) + "\n")
    if workflow.local_exec:  # elsewhere a scheduler counts what a job takes
        warm_workers.start()
