PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo photos captions fashion lint test-fast test codegen bugs chaos docs

# one thread: with two, on two cores that other programs used as well, a step of so small a network
# took more than ten times as long
demo photos captions: export OMP_NUM_THREADS = 1

demo: $(INSTALLED)
	@$(BIN)/deepspeed --quiet sra_fast/train.py --config configs/digits.yaml

# from photographs to samples, scores and probes: the commands of docs/your_own_images.md
photos: $(INSTALLED)
	@$(BIN)/python examples/photos.py data/photos/images
	@$(BIN)/python sra_fast/preprocess.py --source data/photos/images --out data/photos/pixels --pixels true --resolution 32
	@$(BIN)/deepspeed --quiet sra_fast/train.py --config configs/photos.yaml
	@run=$$(ls -td runs/photos/*/ | head -n 1) && \
	$(BIN)/python sra_fast/sample.py --checkpoint $$run --out $${run}generated --count 200 --sample.method euler --sample.steps 25 --cfg-scale 1.5 && \
	$(BIN)/python sra_fast/evaluate.py --samples $${run}generated --features pixels --out $${run}scores.json && \
	$(BIN)/python sra_fast/probe.py --checkpoint $$run --times '[0.1, 0.5]' --out $${run}probe

# from captions in words to samples of prompts: the commands of docs/text_to_image.md
captions: $(INSTALLED)
	@$(BIN)/python examples/captions.py make data/captions
	@$(BIN)/python sra_fast/preprocess.py --source data/captions/images --out data/captions/pixels --pixels true --channels 1 --resolution 8 \
	--captions txt --text-encoders data/captions/text_encoder
	@$(BIN)/python sra_fast/train.py --config configs/captions.yaml
	@run=$$(ls -td runs/captions/*/ | head -n 1) && \
	$(BIN)/python sra_fast/sample.py --checkpoint $$run --prompts data/captions/prompts/seen.txt --out $${run}seen --count 220 --grid 110 --scale 12 \
	--sample.method euler --sample.steps 25 --cfg-scale 2 && \
	$(BIN)/python sra_fast/sample.py --checkpoint $$run --prompts data/captions/prompts/held_out.txt --out $${run}held_out --count 200 --grid 50 --scale 12 \
	--sample.method euler --sample.steps 25 --cfg-scale 2 && \
	$(BIN)/python examples/captions.py score $$run

# Fashion-MNIST (Debian's package dataset-fashion-mnist) as pixels, at its own size and at 16 px
FASHION ?= /usr/share/datasets/fashion-mnist
fashion: $(INSTALLED)
	@test -d $(FASHION) || { echo "error: there is no $(FASHION): sudo apt-get install dataset-fashion-mnist (31 MB), or" \
	"make fashion FASHION=FOLDER with train-images-idx3-ubyte.gz and the three other files of github.com/zalandoresearch/fashion-mnist" >&2; exit 2; }
	@$(BIN)/python sra_fast/preprocess.py --source $(FASHION) --out data/fashion/28 --pixels true
	@$(BIN)/python sra_fast/preprocess.py --source $(FASHION) --out data/fashion/16 --pixels true --resolution 16

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(BIN)/codespell
	@$(BIN)/python tests/planted_bugs.py --patterns

# without the tests that tests/conftest.py lists as slow: five minutes on two cores
test-fast: $(INSTALLED)
	@$(PYTEST) -m "not slow"

test: $(INSTALLED)
	@$(PYTEST)

# kernels compiled for Ampere, Hopper and Blackwell; `make test` compiles them for Hopper
codegen: $(INSTALLED)
	@SRA_FAST_ARCHS="80 90 100" $(PYTEST) tests/ops -k "codegen or compiles_without_spills"

# plants bugs in the operators one at a time; every one must turn a test red (half an hour)
bugs: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/planted_bugs.py

# kills, tears, damages and injects: 360 runs, each of which must come through (a quarter of an hour)
chaos: $(INSTALLED)
	@$(BIN)/python tests/chaos/run.py

# the documentation site, in site/; a link or an anchor that leads nowhere is an error
docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# runs again only when the requirements change
$(INSTALLED): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,eval,plots,test,vae,features,text,hub,photos,docs,dev]"
	touch $@
