# DeepTrust: everything that is run, by name. `make demo` on a fresh machine does all that it needs.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV   ?= .venv
PYTHON ?= python3.11
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
TORCH  := 2.13.0
export PORT ?= 8000

.PHONY: help setup dev starter-models starter demo serve monitoring dashboards review stop test proofs bench bench-quick data-dashboard lint audit format lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# Lists are installed with --no-deps: they are complete, and what they leave out (CUDA builds that vLLM names) must stay out.
# torch's CPU build comes first, from whatever pip is set up with; PyTorch's own index is the fallback.
$(VENV)/.serving: requirements/cpu.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch, sys; sys.exit(torch.__version__ != '$(TORCH)+cpu')" 2>/dev/null \
	  || $(PIP) install --quiet --no-deps "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)+cpu"
	@echo "installing $$(grep -c == requirements/cpu.txt) pinned packages (a few minutes the first time)"
	$(PIP) install --quiet --no-deps -r requirements/cpu.txt
	touch $@

$(VENV)/.dev: $(VENV)/.serving requirements/dev.txt
	$(PIP) install --quiet --no-deps -r requirements/dev.txt
	@# tests drive a real browser and look words up in WordNet; both are Debian packages
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  { command -v chromium && [ -e /usr/share/wordnet/index.noun ]; } >/dev/null || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core wordnet-base; } >/dev/null; fi
	@$(INSTALL_PROMETHEUS)
	@$(INSTALL_POSTGRES)
	touch $@

# Prometheus is a Debian package too. Where systemd runs, the package starts one on every interface: not ours.
INSTALL_PROMETHEUS := command -v prometheus >/dev/null || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	  && { apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus; } >/dev/null \
	  && { ! command -v systemctl >/dev/null || systemctl disable --now prometheus; } >/dev/null 2>&1; } || true

# Tests start PostgreSQL servers of their own from the programs of this package. The one that it makes is not wanted.
INSTALL_POSTGRES := ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	  && { apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql; } >/dev/null \
	  && { ! command -v systemctl >/dev/null || systemctl disable --now postgresql; } >/dev/null 2>&1; } || true

# The proof of the cluster's launcher makes hosts out of namespaces. An sshd that the package brings is not wanted; one that was there is.
INSTALL_HOSTS := { command -v ip && command -v rsync && [ -x /usr/sbin/sshd ]; } >/dev/null || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	  && { had=$$(ls /usr/sbin/sshd 2>/dev/null); \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends openssh-server openssh-client iproute2 rsync; } >/dev/null; \
	    [ -n "$$had" ] || ! command -v systemctl >/dev/null || systemctl disable --now ssh >/dev/null 2>&1; }; } || true

setup: $(VENV)/.serving  ## the serving environment (.venv)

dev: $(VENV)/.dev  ## what tests and checks need, on top

starter-models: setup  ## build the starter models (demo and serve do it by themselves)
	$(PY) -m deployments.starter

starter: dev  ## train the starter models again (LABELLED=, CAPTIONED=, TEXTS=, WORK=FOLDER; ONLY=detector or captioner)
	$(PY) -m train.starter --labelled "$(LABELLED)" --captioned "$(CAPTIONED)" --texts "$(TEXTS)" --work "$(WORK)" \
		$(if $(ONLY),--only $(ONLY))

data-dashboard: dev  ## prepared data in the browser (DATA=FOLDER)
	$(PY) -m data.dashboard --data $(DATA)

demo: setup  ## start, analyse the sample photos, print answers and addresses, go on serving
	$(PY) -m app.demo

serve: setup  ## start and serve in the foreground until Ctrl-C (PORT=8000)
	$(PY) -m app.serve

monitoring: setup  ## Prometheus with the alert rules on the running application, until Ctrl-C
	@$(INSTALL_PROMETHEUS)
	$(PY) -m app.monitoring

dashboards: dev  ## write the Grafana dashboards again (monitoring/grafana)
	$(PY) -m monitoring.dashboards

$(VENV)-review/.done: requirements/review.txt
	test -x $(VENV)-review/bin/python || $(PYTHON) -m venv $(VENV)-review
	@echo "installing Label Studio: $$(grep -c == requirements/review.txt) pinned packages"
	$(VENV)-review/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements/review.txt
	touch $@

review: setup $(VENV)-review/.done  ## Label Studio for reviewers, until Ctrl-C (python -m app.review push fills it)
	$(PY) -m app.review start --program $(VENV)-review/bin/label-studio

stop:  ## end it: accepted requests first, at once when asked again; no process and no port is left
	@! test -x $(PY) || $(PY) -m app.stop

test: dev  ## the tests, end-to-end ones against the real application among them (without the proofs)
	$(PY) -m pytest

# what they measure does not replace what is committed; what is not there to run one with is a failure
proofs: export DEEPTRUST_RESULTS = benchmarks/results/bench
proofs: export DEEPTRUST_TEST_ALL = 1
proofs: dev $(VENV)-review/.done  ## the tests that take minutes each (kills, sweeps, thousands of bodies)
	@$(INSTALL_HOSTS)
	$(PY) -m pytest -m proof

PHOTOS ?= samples
# shorter runs than those that are committed, which they do not replace
bench: export DEEPTRUST_RESULTS = benchmarks/results/bench
bench: dev  ## the main claims of speed in turn, on a quiet machine (PHOTOS=FOLDER of JPEGs, BLIP=CHECKPOINT; CAPTIONED= and DATA=PREPARED for two more)
	$(PY) -m benchmarks.peers --photos $(PHOTOS) --clients '[16,64]' --rounds 1
	$(PY) -m benchmarks.serving --photos $(PHOTOS) --parts ratio
	$(PY) -m benchmarks.captioner --photos $(PHOTOS) $(if $(BLIP),--checkpoint $(BLIP))
	$(PY) -m benchmarks.hops
	$(PY) -m benchmarks.gateway --rates '[50]' --seconds 30
	$(PY) -m benchmarks.annotate --photos $(PHOTOS) --parts throughput --long 192 --rounds 1
	$(PY) -m benchmarks.prepare --photos $(PHOTOS) --parts throughput --pictures 3000 --rounds 1
	$(if $(CAPTIONED),$(PY) -m benchmarks.tagger_serving --flickr $(CAPTIONED))
	$(if $(CAPTIONED),$(PY) -m benchmarks.tagger_options --flickr $(CAPTIONED) --rounds 1)
	$(if $(DATA),$(PY) -m benchmarks.training --data $(DATA)/aivshuman --parts overhead,scaling --rounds 1)
	$(PY) -m benchmarks.scale --photos $(PHOTOS) --parts validate,size,spike --load-s 30 --rates '[50,300]' --spike-rates '[50]'

bench-quick: dev  ## the same, short: shows that it works
	$(PY) -m benchmarks.peers --photos $(PHOTOS) --quick
	$(PY) -m benchmarks.scale --photos $(PHOTOS) --quick
	$(PY) -m benchmarks.captioner --quick

lint: dev  ## ruff, bandit and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m bandit --quiet --configfile pyproject.toml --recursive app deployments train data monitoring benchmarks requirements
	$(PY) -m mypy

$(VENV)-audit/.done: requirements/audit.txt
	test -x $(VENV)-audit/bin/python || $(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements/audit.txt
	touch $@

# --strict: a package that the service does not know (a mirror of PyPI that gives no advisories) is a failure, not a pass.
SERVICE ?= pypi
LISTS   ?= $(wildcard requirements/*.txt benchmarks/peers/requirements-*.txt)
audit: $(VENV)-audit/.done  ## known holes in every pinned list (wants pypi.org, or SERVICE=osv: api.osv.dev)
	@failed=; for list in $(LISTS); do echo "$$list:"; \
	  $(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --vulnerability-service $(SERVICE) \
	    --requirement "$$list" || failed="$$failed $$list"; done; \
	  [ -z "$$failed" ] || { echo "not shown to be without known holes:$$failed"; exit 1; }

format: dev  ## let ruff put the code in order
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lock:  ## resolve the pinned lists in requirements/ again
	$(PYTHON) requirements/lock.py

clean: stop  ## remove the environment
	rm -rf $(VENV) $(VENV)-review $(VENV)-audit $(VENV)-peers
