"""The tests that `make test` leaves to `make battery`: whole runs, and variants of what a quicker test holds.

A change waits for `make test`, some minutes; `.ci/run` runs both. A test with the mark `long` is in neither.
"""

import pytest

# What the id of a test begins with.
BATTERY = (
    "tests/checks/",
    "tests/cli/",
    "tests/workflow/",  # whole runs of the DAG, their faults, and strangers' input
    "tests/allocators/test_allocators.py::test_levels_hold",
    "tests/calibration/test_experts.py",
    "tests/calibration/test_calibrate.py",
    "tests/comparison/test_folders.py",
    "tests/comparison/test_published.py::test_a_dry_run",
    "tests/comparison/test_regression.py",
    "tests/compression/test_allocate.py",
    "tests/compression/test_cell.py",
    "tests/compression/test_certificate.py",
    "tests/compression/test_compute_dtype.py",
    "tests/compression/test_dishonest_methods.py",
    "tests/compression/test_lower_bound.py",
    "tests/compression/test_tune.py",
    "tests/evaluation/test_cache.py",
    "tests/evaluation/test_generated.py",
    "tests/evaluation/test_zero_shot.py",
    "tests/export/test_save.py",
    "tests/figures/test_plot.py::test_every_figure",
    "tests/figures/test_plot.py::test_no_texts_overlap",
    "tests/figures/test_plot.py::test_the_same_table",
    "tests/methods/test_awp_grids.py::test_descent_on_a_kept",
    "tests/methods/test_awp_grids.py::test_is_never_worse",
    "tests/methods/test_code_swaps.py::test_both_paths",
    "tests/methods/test_code_swaps.py::test_every_change",
    "tests/methods/test_contract.py::test_promise[4",
    "tests/methods/test_contract.py::test_promise[5",
    "tests/methods/test_contract.py::test_promise[6",
    "tests/methods/test_dsnot_admm_alps.py::test_alps_is_the_algorithm",
    "tests/methods/test_frank_wolfe.py::test_exchanges",
    "tests/methods/test_frank_wolfe.py::test_the_compiled_steps",
    "tests/methods/test_gptq.py::test_agrees_with_plain",
    "tests/methods/test_gpu.py::test_no_method_mixes",
    "tests/methods/test_hard_layers.py",
    "tests/methods/test_quantease.py::test_compiled_passes",
    "tests/methods/test_sparse_swaps.py::test_both_paths",
    "tests/methods/test_sums.py::test_3basil_has_the_released_error",
    "tests/methods/test_unfolded.py::test_counts_are_exact",
    "tests/methods/test_unfolded.py::test_every_form",
    "tests/kernels/test_columns.py::test_both_paths",
    "tests/models/test_families.py::test_a_family",
    "tests/models/test_streaming.py",
    "tests/report/",
    "tests/results/test_collect.py::test_the_check_of_columns",
    "tests/results/test_protocol.py::test_a_cell_of_another",
    "tests/results/test_protocol.py::test_no_number_that_is_not_finite",
    "tests/runtime/test_checkpoint.py",
    "tests/sources/test_gguf_wheels.py",
    "tests/storage/test_packing.py::test_stored_tensors",
    "tests/study/test_estimate.py::test_a_run_that_cannot_fit",
    "tests/study/test_speeds.py::test_the_command",
    "tests/support/",
    "tests/test_library.py::test_a_model",
    "tests/website/",
)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(BATTERY):
            item.add_marker(pytest.mark.battery)
