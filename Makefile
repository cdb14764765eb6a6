# make demo: install, prepare, train, evaluate, generate, report.  make check: lint and types.
# make test: the test suite.  make test-all: with what takes longest.  make test-fast: a minute of it.  make soak: longer.
VENV ?= .venv
PY := $(VENV)/bin/python
# Modules are compiled when they are first imported: pip would compile all of them, one after the other. What was
# compiled is kept, whatever the environment says: else each of the hundreds of processes would compile it again.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(VENV)/bin/pip --disable-pip-version-check install --quiet --no-compile
REQ := requirements/requirements
INSTALLED := $(VENV)/.installed
DEMO := demo_output
SOAK := tests/faults tests/config/test_fuzz.py tests/data/test_damaged_files.py tests/training/test_damaged_checkpoints.py \
	tests/exchange/test_damaged_exports.py

.PHONY: demo test test-all test-fast soak check format clean

# torch first, by itself: no other package may choose its build.
$(INSTALLED): $(REQ).txt $(REQ)-dev.txt $(REQ)-eval.txt $(REQ)-tensorboard.txt $(REQ)-tokenizers.txt $(REQ)-demo.txt $(REQ)-vision.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' $(REQ).txt)"
	$(PIP) -r $(REQ).txt -r $(REQ)-eval.txt -r $(REQ)-demo.txt -r $(REQ)-dev.txt -r $(REQ)-tensorboard.txt -r $(REQ)-tokenizers.txt -r $(REQ)-vision.txt
	touch $@

demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(PY) -m tools.demo.prepare $(DEMO)
	$(PY) prepare_data.py sotu_train -d $(DEMO)/data -t HFTokenizer -v $(DEMO)/tokenizer.json --input $(DEMO)/sotu_train.jsonl
	$(PY) prepare_data.py sotu_heldout -d $(DEMO)/data -t HFTokenizer -v $(DEMO)/tokenizer.json --input $(DEMO)/sotu_heldout.jsonl
	$(PY) deepy.py train.py configs/demo.yml
	$(PY) deepy.py eval.py configs/demo.yml --eval_tasks sotu_word_order --include_path $(DEMO)/tasks --eval_results_prefix $(DEMO)/
	$(PY) deepy.py generate.py configs/demo.yml --text_gen_type input-file -i $(DEMO)/prompts.txt -o $(DEMO)/samples.jsonl
	$(PY) -m tools.demo.report $(DEMO)

test: $(INSTALLED)
	$(PY) -m pytest -m "not slow"

test-all: $(INSTALLED)
	$(PY) -m pytest

# What starts no command, joins no processes and builds no engine.
test-fast: $(INSTALLED)
	$(PY) -m pytest --dist=load -m "not (launches or processes or engine or long)"

# Runs killed at random instants, mutated configurations, damaged files: another set of them every time, for minutes.
soak: $(INSTALLED)
	SOAK_STRIKES=20 SOAK_EXAMPLES=3000 SOAK_ROUNDS=10 SOAK_SEED=$${SOAK_SEED:-$$(date +%s)} $(PY) -m pytest --numprocesses=0 --timeout=900 $(SOAK)

check: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(DEMO) .mypy_cache .ruff_cache .pytest_cache
