# Everything from a fresh machine that has Python 3.11+, make and git: `make demo`, `make test`.
# Each target sets up .venv by itself; when nothing is missing that takes no time.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
# Remade when the requirements change
READY  := $(VENV)/.ready-$(shell cat requirements.txt requirements-dev.txt | cksum | cut -d' ' -f1)

.PHONY: demo test test-platforms test-versions test-oldest test-newest test-slow test-faults test-slurm test-extra test-browser test-notebook test-gpu same-losses lint format bench bench-gpu record clean setup

demo: setup
	$(PY) demo/run_demo.py

test: setup
	$(PY) -m pytest -n 2 --dist loadfile

# As Windows, a Mac and Linux with Python 3.14 would run it; CI runs SHORT=--short
test-platforms: setup
	$(PY) tests/platforms/run.py $(SHORT)

# On the oldest versions that requirements.txt allows and on the newest, each in a folder of its own (6 GB)
test-versions: test-oldest test-newest

test-oldest test-newest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	sed '$(if $(filter oldest,$*),s/>=/==/)' requirements.txt > .venv-$*/requirements.txt
	sed 's/^-r/#/' requirements-dev.txt > .venv-$*/tools.txt
	.venv-$*/bin/python -m pip install -q --upgrade -r .venv-$*/requirements.txt -r .venv-$*/tools.txt
	.venv-$*/bin/python -m pytest -n 2 --dist loadfile $(TESTS)

test-slow: setup
	$(PY) -m pytest -m slow

test-extra: setup
	$(PY) -m pip install --disable-pip-version-check -q elpv-dataset --no-deps
	$(PY) -m pip install --disable-pip-version-check -q -r requirements-extra.txt
	$(PY) -m pytest -m extra

test-faults: setup
	$(PY) tests/faults.py --runs 10 --kills 5
	$(PY) tests/faults.py --runs 4 --kills 3 --processes 2
	$(PY) tests/faults.py --runs 3 --kills 3 --job finetune
	$(PY) tests/faults.py --runs 3 --kills 3 --job linprobe
	$(PY) tests/faults.py --runs 3 --kills 3 --job linprobe --flags="--cache_features"
	$(PY) tests/faults.py --runs 3 --kills 3 --flags="--accum_iter 3 --repeated_aug 2 --keep_checkpoints 1"
	$(PY) tests/faults.py --runs 10 --kills 5 --data shards
	$(PY) tests/faults.py --runs 3 --kills 3 --data shards --processes 2 --flags="--shuffle near"
	$(PY) tests/faults.py --runs 3 --kills 3 --processes 2 --flags="--accum_iter 2 --repeated_aug 2"
	$(PY) tests/hostile.py --cases 2500

test-slurm: setup
	bash tests/slurm_setup.sh
	SLURM_TEST_REQUIRED=1 $(PY) -m pytest -m slurm

test-browser: setup
	$(PY) -m pip install -q 'gradio>=6' selenium
	command -v chromedriver > /dev/null || { apt-get update -q && apt-get install -y -q chromium chromium-driver; }
	$(PY) -m pytest -m browser

test-notebook: setup
	$(PY) -m pip install -q nbclient ipykernel
	$(PY) -m pytest -m extra tests/demo/test_notebook.py

test-gpu: setup
	$(PY) -m pytest -m gpu

# The losses of the three recipes against those of a commit, bit for bit: make same-losses BASE=REV [HEAD=REV]
same-losses: needs-BASE setup
	$(PY) tests/losses.py --base $(BASE) $(if $(HEAD),--head $(HEAD))

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup
	$(PY) benchmarks/bench_loader.py
	$(PY) benchmarks/bench_logging.py
	$(PY) benchmarks/bench_safety.py
	$(PY) benchmarks/bench_step.py
	$(PY) benchmarks/bench_features.py
	$(PY) benchmarks/bench_card.py
	$(PY) benchmarks/bench_index.py
	$(PY) benchmarks/bench_index.py --archives 100
	$(PY) benchmarks/bench_store.py
	$(PY) benchmarks/bench_startup.py
	$(PY) benchmarks/bench_scaling.py
	$(PY) benchmarks/bench_end_to_end.py --device cpu

# Repeats the present record (records/README.md): make record CELLS=DIR
record: needs-CELLS setup
	OMP_NUM_THREADS=1 $(PY) records/measure.py --cells "$(CELLS)" --json record.json

# Within six minutes on an H100; what matters most comes first, and each table is printed when it is measured
bench-gpu: setup
	$(PY) benchmarks/bench_step.py --model base --variants eager compiled plain hf --rounds 5 --steps 10
	$(PY) benchmarks/bench_step.py --model base --task pretrain --variants compiled --opt adamw muon --rounds 3 --steps 8
	$(PY) benchmarks/bench_step.py --model large --task pretrain --variants eager compiled plain hf --rounds 3 --steps 5
	$(PY) benchmarks/bench_end_to_end.py --rounds 3 --steps 30
	$(PY) benchmarks/bench_features.py --size large --batch_size 256 --images 8192 --amp_dtype auto --rounds 3

# Before .venv is set up: a variable that the target cannot do without
needs-%:
	@test -n "$($*)" || { echo "make $(MAKECMDGOALS): pass $*=..., as the Makefile says above $(MAKECMDGOALS)" >&2; exit 2; }

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; pass PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)  # uv makes one without pip
	$(PY) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	rm -f $(VENV)/.ready-*
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest demo_data demo_output output_dir output_finetune output_linprobe output_evaluate
