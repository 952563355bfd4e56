# Two commands do everything: `make reproduce` and `make test`. Each makes .venv if it is missing.
# UNTIL, in seconds since 1970, is when `make test-long` and `make mutants` begin no more; they name what they leave out.
# STUDY=pruning (smollm2-small, smollm2, baselines, quantisation, gqsa) runs, checks, accepts or shows config/pruning.yaml instead of the embedded study.
PYTHON ?= python3
CORES ?= all
PIP_FLAGS ?=
STUDY ?= embedded
SIZES ?=
UNTIL ?=
THREADS ?= 2
CONFIG := $(if $(filter embedded,$(STUDY)),,--configfile config/$(STUDY).yaml)
# Snakemake runs Python in a config that asks for it, and shows a traceback for a file that it cannot decode.
CHECK = $(RUN) python -m layerwise check-study $(STUDY)
export OMP_WAIT_POLICY ?= PASSIVE
BIN := $(CURDIR)/.venv/bin
RUN := PATH="$(BIN):$$PATH"
COVERAGE_DATA := $(CURDIR)/.venv/coverage

.PHONY: reproduce test battery test-long coverage mutants slurm smoke lint audit lock regression estimate report accept gallery \
	decode benchmark clean clean-cache site

reproduce: .venv/installed
	$(CHECK)
	$(RUN) snakemake --cores $(CORES) $(CONFIG)

test: .venv/installed
	$(RUN) python -m pytest

battery: .venv/installed  # the rest of what a change is held to: whole runs, their faults, variants
	$(RUN) python -m pytest -m "battery and not long" --durations=30

test-long: .venv/installed  # rarer: faults of whole runs, killed studies, a cluster, 10,000 configs, rarer variants
	$(RUN) python -m pytest -m long $(if $(UNTIL),--no-loadscope-reorder --until=$(UNTIL))

coverage: .venv/installed  # `make test` and `make battery`, and that they run 95 % of the lines of methods/ and layerwise/
	rm -rf $(COVERAGE_DATA) && mkdir -p $(COVERAGE_DATA)
	COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml COVERAGE_DATA=$(COVERAGE_DATA) $(MAKE) test battery
	export COVERAGE_DATA=$(COVERAGE_DATA); $(RUN) coverage combine --quiet && $(RUN) coverage report --fail-under 95

mutants: .venv/installed  # plants faults, one at a time, that the tests must catch; docs/testing.md
	$(RUN) python -m tests.support.mutants $(if $(UNTIL),--until=$(UNTIL))

slurm: .venv/slurm  # what profiles/slurm needs

smoke: .venv/installed  # a small real run of the DAG in a folder of its own
	$(RUN) python -m tests.support.smoke

lint: .venv/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright --threads
	$(RUN) snakefmt --check Snakefile workflow
	$(RUN) python -m tests.support.lint_workflow

estimate: .venv/installed  # memory, disk and time of the study, before it starts
	$(RUN) python -m layerwise estimate $(STUDY)

regression: reproduce
	$(RUN) python -m layerwise regression $(STUDY)

report: reproduce  # the study as one page, results/report.html
	$(RUN) snakemake --cores $(CORES) $(CONFIG) report_page

accept: reproduce
	$(RUN) python -m layerwise accept $(STUDY)

gallery: reproduce  # the figures and tables that the README shows
	mkdir -p figures/gallery/$(STUDY)
	cp figures/*.png results/tables/main.md figures/gallery/$(STUDY)/

site: .venv/installed .venv/site/installed  # the documentation as HTML, site/html/index.html
	$(RUN) python -m website site
	NO_MKDOCS_2_WARNING=1 .venv/site/bin/python -m mkdocs build --strict --config-file site/mkdocs.yml

decode: .venv/installed  # times products with packed weights; see docs/decode.md for a quiet machine
	$(RUN) python -m layerwise decode --shape 1024x1024 --shape 2048x2048 --shape 4096x4096 --shape 11008x4096 --threads 1 \
		--out results/decode.csv
	$(RUN) python -m layerwise.figures.decode --table results/decode.csv --out figures/gallery/decode.png

benchmark: .venv/installed  # every method against the published loop and the products it needs; SIZES="512 1024" for some
	mkdir -p results/benchmarks
	$(RUN) python -m pytest -o addopts= -q -rs tests/benchmarks/bench_suite.py --sizes "$(SIZES)" --threads $(THREADS) \
		--benchmark-json results/benchmarks/run.json --benchmark-quiet
	$(RUN) python -m tests.benchmarks.summary results/benchmarks/run.json \
		--command 'make benchmark$(if $(SIZES), SIZES="$(SIZES)")$(if $(filter-out 2,$(THREADS)), THREADS=$(THREADS))' \
		--table $(if $(SIZES),results/benchmarks/table,docs/benchmark) \
		--figure $(if $(SIZES),results/benchmarks,figures/gallery)/benchmark.png
	$(RUN) python -m tests.benchmarks.bench_swaps 2048
	$(RUN) python -m tests.benchmarks.bench_iterative 1024 2048 --only product awp
	$(RUN) python -m tests.benchmarks.bench_iterative 1024 --errors
	$(RUN) python -m tests.benchmarks.bench_calibrate resources/demo

clean-cache: .venv/installed  # Grams and converted GGUF files that no other study uses; says what it frees
	$(RUN) python -m layerwise clean-cache

clean:  # everything that can be computed again
	rm -rf results/text results/tokens results/models results/checks results/calibration results/grams results/gguf results/cells \
		results/evaluations results/exports results/tasks results/certificates results/demo \
		results/code results/requested.json results/tables results/partial results/benchmarks results/report.html
	rm -rf figures/*.pdf figures/*.svg figures/*.png logs .snakemake site

.venv/slurm: .venv/installed requirements-slurm.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --requirement requirements-slurm.lock
	@touch $@

# Everything but torch by the hashes of its files; of torch the index that PIP_FLAGS names may have a build of its own.
# The project itself is a link to this folder, built with what requirements-build.lock pins; nothing else is fetched.
.venv/installed: requirements.lock requirements-hashed.lock requirements-build.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed. Got %s instead: make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --require-hashes \
		--requirement requirements-hashed.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --requirement requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --require-hashes \
		--requirement requirements-build.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index --no-build-isolation --editable .
	@touch $@

lock:  # hashes of requirements.lock's versions and of what `make site` needs, from the package index; needs uv
	uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate --python-version 3.11 --universal \
		--no-emit-package torch requirements.lock --output-file requirements-hashed.lock
	uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 --universal \
		requirements-site.in --output-file requirements-site.lock

audit: .venv/audit/bin/pip-audit  # known vulnerabilities of the locked versions, where the package index tells them
	@$< --disable-pip --no-deps --requirement requirements-hashed.lock > .venv/audit.log 2>&1; status=$$?; \
	unknown=$$(grep -c 'could not be audited' .venv/audit.log); \
	if grep -q '^Found ' .venv/audit.log; then cat .venv/audit.log; exit 1; fi; \
	if [ $$unknown -gt 0 ] || grep -q 'ConnectionError\|ServiceError' .venv/audit.log; then \
		echo "No whole audit: the package index here tells nothing of $$unknown of the locked packages."; \
	elif [ $$status -ne 0 ]; then cat .venv/audit.log; exit 1; fi

# MkDocs reads the code as text and imports none of it: an environment of its own, which cannot disturb the other.
.venv/site/installed: requirements-site.lock
	$(PYTHON) -m venv .venv/site
	.venv/site/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --require-hashes \
		--requirement requirements-site.lock
	@touch $@

.venv/audit/bin/pip-audit: | .venv/installed
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) pip-audit
