# Everything starts from a bare machine with Python 3.11+ and make: each target makes .venv when there is none.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DOCS   := $(VENV)/docs
RUN    ?= runs/demo
STEPS  ?=
LIMIT  ?= 1000
PROMPT ?= a small red cat on a mint background

FEW    := --student-steps 4 --init stickers --steps 1350 --student-lr 1e-4 --set tell_rung=true \
          --set lora_lead=120 --set anchor_weight=5 --set anchor_end=0 --set first_share=0.5

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint docs distill sample eval mutate kill fuzz memory full-size ablations negative results style bench bench-eval bench-sample bench-serve teach teach-control teach-few teach-tiny-vae wheel clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable . --group dev $(CONSTRAIN)
	touch $@

setup: $(READY)  ## make .venv and install

demo: STEPS := $(or $(STEPS),500)
demo: $(READY)  ## distil, sample and evaluate on the built-in world; at most 12 minutes on two CPU cores
	$(BIN)/sbrush distill prompts/stickers.txt --out $(RUN) $(if $(STEPS),--steps $(STEPS))
	$(BIN)/sbrush sample "a cat" "a small red car on a mint background" "a big purple fish" --seed 1-6 --student $(RUN) --compare -o $(RUN)/compare.png
	$(BIN)/sbrush eval --student $(RUN) --limit $(LIMIT) --report $(RUN)/report.html
	@echo
	@echo "Look at:  $(RUN)/compare.png       one step (upper rows) and the teacher's 25 (lower rows)"
	@echo "          $(RUN)/samples/          the student as it learned"
	@echo "          $(RUN)/report.html       the figures"
	@echo "Next:     $(BIN)/sbrush sample \"a big teal bird\" --seed 1-8 --student $(RUN)"

test: $(READY)  ## the test suite; FILE=tests/test_core.py for one file
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(if $(FILE),$(FILE),-n auto --dist worksteal)

test-all: $(READY)  ## the suite and what only a long run can show: full-size networks, 24 GiB, an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest -m slow

lint: $(READY)  ## ruff, mypy, and which package may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@echo "lint: all passed"

$(DOCS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet --group docs
	touch $@

docs: $(DOCS)/.ready  ## build the documentation into site/; a broken link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "Open:     site/index.html"

distill: $(READY)  ## distil the built-in teacher into RUN
	$(BIN)/sbrush distill prompts/stickers.txt --out $(RUN) $(if $(STEPS),--steps $(STEPS))

sample: $(READY)  ## draw PROMPT with the shipped student
	$(BIN)/sbrush sample "$(PROMPT)" -o out.png

eval: $(READY)  ## evaluate STUDENT (the shipped one); with COCO=DIR on COCO-30K, failing above MAX_FID
	$(BIN)/sbrush eval $(if $(STUDENT),--student $(STUDENT)) $(if $(COCO),--coco-30k --coco-root $(COCO) \
	  $(if $(MAX_FID),--max-fid $(MAX_FID)),--limit $(LIMIT))

mutate: $(READY)  ## break core.py in every small way; WHERE=sample: the rest in those of tests/breakages.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py $(WHERE)

kill: $(READY)  ## kill a run fifty times at random; it must end as one that was not disturbed
	$(BIN)/python tests/kill.py 50

fuzz: $(READY)  ## damage five hundred folders that sbrush reads; it must refuse or do no harm
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py 500

memory: $(READY)  ## what `sbrush eval --coco-30k` holds in memory at 300 and at 3,000 images
	$(BIN)/python tests/memory.py 300 3000

full-size: $(READY)  ## Stable Diffusion's full sizes, random weights: needs 24 GiB, 30 GB of disk and half an hour or more
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest -m slow tests/test_full_size.py

ablations: $(READY)  ## the paper's ablations on the built-in world, with an image each
	$(BIN)/python -m sbrush.benchmarks.ablations

negative: $(READY)  ## what a negative prompt does to the built-in student, by method and scale, into docs/negative
	$(BIN)/python -m sbrush.benchmarks.negative

results: $(READY)  ## all methods side by side, into docs/results.md: hours; SEEDS, BUDGET, MINUTES, PAIRS, ARGS=--list
	$(BIN)/python -m sbrush.benchmarks.results $(if $(SEEDS),--seeds $(SEEDS)) $(if $(BUDGET),--budget $(BUDGET)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(PAIRS),--pairs $(PAIRS)) $(ARGS)

style: $(READY)  ## how well student and teacher take on the built-in LoRA's style; minutes
	$(BIN)/python -m sbrush.benchmarks.style

bench: $(READY)  ## the training step against the baseline and the roofline; SIZE=sd21 for SD 2.1's, on a GPU
	$(BIN)/python -m sbrush.benchmarks.training $(if $(SIZE),--size $(SIZE) --minutes 6)

bench-sample: $(READY)  ## one image, warm and cold, beside the bare networks and plain diffusers; SIZE=sd21 on a GPU
	$(BIN)/python -m sbrush.benchmarks.sampling $(if $(SIZE),--size $(SIZE))

bench-eval: $(READY)  ## `sbrush eval --coco-30k` against the baseline; SIZE=sd21 for SD 2.1's and ViT-g-14, on a GPU
	$(BIN)/python -m sbrush.benchmarks.evaluation $(if $(SIZE),--size $(SIZE) --clip ViT-g-14 --images 3000 --minutes 6)

bench-serve: $(READY)  ## `sbrush serve` under the load of 100 clients for a minute, beside the bare networks
	$(BIN)/python -m sbrush.benchmarks.serve --clients 100 --seconds 60 $(if $(SIZE),--size $(SIZE))

teach: $(READY)  ## train the built-in world again from nothing: autoencoder, judge, teacher, LoRA, ControlNet, student, tiny VAE; ARGS=lora: one of them
ifneq ($(ARGS),)
	$(BIN)/python -m sbrush.training.world.teach $(ARGS)
else
	$(BIN)/python -m sbrush.training.world.teach vae
	$(BIN)/python -m sbrush.training.world.teach judge
	$(BIN)/python -m sbrush.training.world.teach teacher
	$(BIN)/python -m sbrush.training.world.ship teacher
	$(BIN)/python -m sbrush.training.world.ship guidance
	$(BIN)/python -m sbrush.training.world.teach lora
	$(BIN)/python -m sbrush.training.world.control train
	$(BIN)/python -m sbrush.training.world.control ship
	for seed in 0 1; do \
	  $(BIN)/sbrush distill prompts/stickers.txt --seed $$seed --out runs/seed-$$seed && \
	  { ! grep -q '"extended_by": \[\]' runs/seed-$$seed/config.json || \
	    $(BIN)/sbrush distill prompts/stickers.txt --seed $$seed --out runs/seed-$$seed --extend 3000; } || exit 1; done
	$(BIN)/sbrush merge runs/seed-0 runs/seed-1 -o runs/shipped
	$(BIN)/python -m sbrush.training.world.ship student runs/shipped
	$(MAKE) teach-few
	$(BIN)/python -m sbrush.training.world.tiny_vae train
	$(BIN)/python -m sbrush.training.world.tiny_vae ship
endif

teach-few: $(READY)  ## train the built-in world's student of four steps again, from the shipped student
	$(BIN)/sbrush distill prompts/stickers.txt $(FEW) --out runs/few
	$(BIN)/python -m sbrush.training.world.ship student runs/few --name stickers-few

teach-control: $(READY)  ## train the built-in world's ControlNet again, beside the shipped teacher
	$(BIN)/python -m sbrush.training.world.control train
	$(BIN)/python -m sbrush.training.world.control ship

teach-tiny-vae: $(READY)  ## train the built-in world's tiny VAE again, from the shipped VAE and student
	$(BIN)/python -m sbrush.training.world.tiny_vae train
	$(BIN)/python -m sbrush.training.world.tiny_vae ship
	$(BIN)/python -m sbrush.training.world.ship graphs

wheel: $(READY)  ## build the wheel, install it into an empty environment and draw an image with it
	rm -rf dist
	$(BIN)/python -m build --wheel
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install --quiet dist/*.whl
	cd dist && venv/bin/sbrush sample "a cat" -o cat.png && test -s cat.png
	cd dist && venv/bin/python -c "from sbrush.serving.app import read_page; read_page()"

clean:  ## remove what the targets made, but for runs/
	rm -rf $(VENV) dist site .pytest_cache .mypy_cache .ruff_cache
