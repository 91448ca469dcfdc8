import json
import re
from pathlib import Path

import pytest
from tiny_config import read_config

from sra_fast.config.cli import make_parser, parse_train, save_config
from sra_fast.config.cli import parse as parse_options
from sra_fast.config.schema import Config
from sra_fast.data.options import Options
from sra_fast.training.checks import check_config, check_device, split_batch
from sra_fast.training.plan import fill_in
from sra_fast.utils.registry import MODEL_FAMILIES
from sra_fast.zero.deepspeed_config import deepspeed_config, zero_stage

pytestmark = pytest.mark.usefixtures("rooms")

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = {  # student layer, teacher layer (SRA, Table of settings)
    "SiT-B/2": (3, 8),
    "SiT-L/2": (6, 16),
    "SiT-XL/2": (8, 20),
    "DiT-B/2": (3, 7),
    "DiT-L/2": (6, 14),
    "DiT-XL/2": (8, 16),
}


def parse(*args):
    return parse_train(list(args))[0]


def rejected(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        parse(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_valid(path):
    cfg = parse("--config", str(path))
    fill_in(cfg)
    check_config(cfg)


def test_there_is_a_config_for_every_run_of_the_paper():
    found = {}
    for path in CONFIGS.glob("?it_*.yaml"):
        cfg = parse("--config", str(path))
        found[cfg.model.name, cfg.model.input_size * 8] = cfg
    assert set(found) == {(name, 256) for name in PAPER} | {("SiT-XL/2", 512)}
    for (name, size), cfg in found.items():
        assert (cfg.align.student_layer, cfg.align.teacher_layer) == PAPER[name]
        assert cfg.align.weight == (0.2 if name.startswith("SiT") else 0.04)
        assert (cfg.align.hold, cfg.align.decay) == ((99, 800) if size == 512 else (149, 1000))
        assert (cfg.align.schedule, cfg.align.distance, cfg.align.beta, cfg.align.t_max) == (
            "epochs",
            "smooth_l1",
            0.05,
            0.2,
        )
        assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.clip, cfg.train.global_batch) == (
            1e-4,
            0,
            1,
            256,
        )
        assert cfg.train.ema_decay == 0.9999


def test_command_line_wins_over_files_and_later_files_over_earlier(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("optim:\n  lr: 0.5\nmodel:\n  depth: 3\n")
    cfg = parse(
        "--config", str(CONFIGS / "digits.yaml"), "--config", str(other), "--model.depth", "4"
    )
    assert (cfg.optim.lr, cfg.model.depth, cfg.model.input_size) == (0.5, 4, 8)


def test_align_none_has_a_short_form(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text("align: none\n")
    for args in (("--config", str(path)), ("--align", "none"), ("--align=none",)):
        assert parse(*args).align.target == "none"


def test_saved_config_reads_back(tmp_path):
    file = ("--config", str(CONFIGS / "digits.yaml"))
    schedule = "--align.schedule milestones --align.milestones".split()
    cfg = parse(*file, *schedule, "{5: 0.1}")
    save_config(cfg, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == cfg


NUMBERS_AS_TEXT = (
    *("--data.path", "1e3", "--train.out", "1e5", "--train.init_from", "1e-3"),
    *("--train.averages", '{"1e-3": {"decay": 0.9}, "no": {"decay": 0.5}}'),
)


def test_texts_that_look_like_numbers_read_back(tmp_path):
    cfg = parse(*NUMBERS_AS_TEXT)
    assert set(cfg.train.averages) == {"1e-3", "no"}
    save_config(cfg, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == cfg


def test_a_printed_config_reads_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(*NUMBERS_AS_TEXT, "--print_config")
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert read_config(tmp_path / "printed.yaml") == parse(*NUMBERS_AS_TEXT)


@pytest.mark.parametrize(
    "args, message",
    [
        (("--model.nam", "SiT-B/2"), "model.nam"),
        (("--optim.lr", "fast"), "optim.lr"),
        (("--align.distance", "l3"), "align.distance"),
        (("--train.zero_stage", "4"), "zero_stage"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_typos_and_wrong_types_are_one_message(capsys, args, message):
    error = rejected(capsys, *args)
    assert message in error and "Traceback" not in error


def test_typo_in_a_file_is_named(capsys, tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("align:\n  studnt_layer: 3\n")
    assert "studnt_layer" in rejected(capsys, "--config", str(path))


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    words = " ".join(capsys.readouterr().out.split())
    for section, cls in Config.__dataclass_fields__.items():
        for name in cls.default_factory().__dataclass_fields__:
            entry = re.search(
                rf"(?<!short for )--{section}\.{name}\+? (?!\[ITEM,...\], --)"
                r"\S+ ([^-].{8,}?) \((type|default)",
                words,
            )
            said = entry and entry[1].removesuffix("; short form: --cfg-scale")
            assert said and "--" not in said, f"--help does not explain {section}.{name}"


def test_help_says_the_short_forms_and_each_list_of_choices_once(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    words = " ".join(capsys.readouterr().out.split())
    assert "--model NAME short for --model.name NAME" in words
    assert "--data PATH short for --data.path PATH" in words
    assert (
        "--align NAME short for --align.target NAME; `--align NAME --help` lists its options"
        in words
    )
    assert "classifier-free guidance; 1 is none; short form: --cfg-scale (type: float" in words
    assert f"families: {', '.join(MODEL_FAMILIES)} (type: str, default: SiT-XL/2)" in words
    # forms that nobody needs, and what stands before the text already
    for unwanted in ("Path to a configuration file", "--train CONFIG", "Literal['bf16'"):
        assert unwanted not in words
    assert "--train.precision {bf16,fp32} of weights and activations" in words


@pytest.mark.parametrize(
    "args, message",
    [
        (("--align.teacher_layer", "29"), "<= depth .28.*teacher_layer 29"),
        (
            ("--align.student_layer", "21", "--align.teacher_layer", "20"),
            "student_layer 21 and teacher_layer 20",
        ),
        (("--model.name", "SiT-H/2"), "expected a model name"),
        (("--model.input_size", "33"), "multiple of patch_size 2, got 33"),
        (
            ("--model.name", "DiT-XL/2", "--diffusion.path", "cosine"),
            "DiT's process has no choices, expected none of diffusion.path cosine",
        ),
        (("--sample.method", "ddim"), "sample.method for flow_matching"),
        (("--model.class_dropout_prob", "0", "--sample.guidance", "2"), "class_dropout_prob > 0"),
        (("--align.t_max", "1.5"), "t_max"),
        (("--align.fraction", "0"), r"align.fraction must lie in \(0, 1\], got 0"),
        (("--align.every", "0"), "align.every must be at least 1, got 0"),
        (
            ("--align.schedule", "steps"),
            "align.schedule steps needs align.hold and align.decay in steps, got 149 and 1000",
        ),
        (("--align.schedule", "epochs", "--align.hold", "-1"), "align.hold must not be negative"),
        (("--optim.min_lr", "0.1"), r"optim.min_lr must lie in \[0, optim.lr\], got 0.1 and"),
        (("--align.schedule", "milestones"), "milestones"),
        (("--train.steps", "0"), "train.steps"),
        (("--train.ema_decay", "1.1"), "ema_decay"),
        (("--train.seed", str(2**64)), "train.seed must lie in"),
        (("--optim.lr", "0"), "optim.lr and optim.eps must be positive"),
        (("--optim.betas", "[1.0, 0.9]"), "optim.betas"),
        (
            ("--optim.warmup_steps", "-3"),
            "optim.warmup_steps must not be negative nor infinite, got -3",
        ),
        (("--optim.warmup_steps", str(10**20)), "optim.warmup_steps must not be negative nor inf"),
        (("--align.weight", "-0.2"), "align.milestones must not be negative, got -0.2"),
        (("--sample.steps", "0"), "sample.steps for euler_maruyama"),
        (
            ("--model.name", "DiT-XL/2", "--sample.steps", "2000"),
            r"sample.steps for ddpm must lie in \[2, 1000\]",
        ),
        (("--sample.guided_channels", "5"), r"sample.guided_channels must lie in \[0, 4\], got 5"),
        (("--sample.interval", "[0.9, 0.1]"), "low <= high"),
    ],
)
def test_impossible_configurations_are_named(args, message):
    cfg = parse(*args)
    with pytest.raises(ValueError, match=message):
        fill_in(cfg)
        check_config(cfg)


def test_batch_must_divide():
    cfg = parse("--train.global_batch", "10")
    assert split_batch(cfg, 2) == (5, 1)
    cfg.train.micro_batch = 1
    assert split_batch(cfg, 2) == (1, 5)
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 10"):
        split_batch(parse("--train.global_batch", "10"), 3)
    cfg.train.micro_batch = 4
    with pytest.raises(ValueError, match="multiple of micro_batch 4 x 2 processes, got 10"):
        split_batch(cfg, 2)


def merged(tmp_path, user, *args):
    path = tmp_path / "ds.json"
    path.write_text(user if isinstance(user, str) else json.dumps(user))
    cfg = parse(*args)
    fill_in(cfg)
    return cfg, deepspeed_config(cfg, 256, 1, str(path), cuda=False)


def test_deepspeed_json_wins_over_our_defaults(tmp_path):
    user = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 7},
        "train_batch_size": "auto",
        "comms_logger": {},
    }
    cfg, config = merged(tmp_path, user)
    assert zero_stage(config, cfg) == 2
    assert (
        config["zero_optimization"]["reduce_bucket_size"] == 7 and config["train_batch_size"] == 256
    )
    assert (
        config["bf16"] == {"enabled": True, "check_grad_overflow": False}
        and "comms_logger" in config
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_deepspeed_files_are_accepted(stage):
    cfg = parse()
    config = deepspeed_config(cfg, 256, 1, str(CONFIGS / f"deepspeed/zero{stage}.json"), cuda=False)
    assert zero_stage(config, cfg) == stage


@pytest.mark.parametrize("micro, overlap", [(256, False), (64, True)])
def test_one_process_overlaps_nothing(micro, overlap):
    """DeepSpeed then waits for the device after every backward."""
    assert (
        deepspeed_config(parse(), micro, 1, None, cuda=True)["zero_optimization"]["overlap_comm"]
        == overlap
    )


@pytest.mark.parametrize(
    "user, message",
    [
        ({"train_batch_size": 64}, "train_batch_size 64, the configuration gives 256"),
        ({"gradient_clipping": 5.0}, "gradient_clipping"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is set by optim"),
        ({"fp16": {"enabled": True}}, "set train.precision"),
        ({"zero_optimization": {"stage": 4}}, "stage must be"),
        ({"zero_optimization": 2}, "zero_optimization must be an object"),
        ({"zero_optimization": {"stagee": 2}}, "unknown key zero_optimization.stagee"),
        ({"zero_optimisation": {"stage": 2}}, "unknown keys .'zero_optimisation'"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm must be true"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "would go stale"),
        ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, "would go stale"),
        ({"bf16": True}, "bf16 must be an object"),
        ({"data_types": 3}, "data_types must be an object, got 3"),
        ({"zero_optimization": {"stage": "1"}}, "must be 0, 1, 2 or 3, got '1'"),
        ({"zero_optimization": {"stage": True}}, "must be 0, 1, 2 or 3, got True"),
        ({"zero_optimization": {"legacy_stage1": True}}, "unknown key zero_optimization.legacy"),
        ({"sparse_gradients": True}, "unknown keys .'sparse_gradients'"),
        ({"steps_per_print": "x"}, "steps_per_print must be null or a whole number .* got 'x'"),
        ({"steps_per_print": 0}, "steps_per_print must be null or a whole number .* got 0"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "masters and the EMA are fp32"),
        (
            {"prescale_gradients": True, "zero_optimization": {"stage": 2}},
            "prescale_gradients must be false at stage 2 unless",
        ),
        (
            {"gradient_predivide_factor": 2.0, "zero_optimization": {"stage": 3}},
            "gradient_predivide_factor must be 1 at stage 3 unless .* got 2.0",
        ),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 0}},
            "grad_accum_dtype must be torch.bfloat16 at stage 0",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 100}},
            "module_granularity_threshold must be 0: .* got 100",
        ),
        # in DeepSpeed's own words
        (
            {"zero_optimization": {"reduce_bucket_size": "x"}},
            "DeepSpeed refuses --deepspeed_config .*ds.json: reduce_bucket_size: .* got 'x'$",
        ),
        ({"communication_data_type": "x"}, "ds.json: Invalid communication_data_type"),
        ({"data_types": {"grad_accum_dtype": "x"}}, "ds.json: 'x' is not a valid DtypeEnum"),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "round_robin_gradients",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer",
        ),
        ({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 9}}, "go stale"),
        ("{", "is not JSON"),
        ("[1]", "one JSON object"),
    ],
)
def test_contradicting_deepspeed_json_is_named(tmp_path, user, message):
    with pytest.raises(ValueError, match=message):
        cfg, config = merged(tmp_path, user)
        zero_stage(config, cfg)


@pytest.mark.parametrize(
    "user",
    [
        {"bf16": {"immediate_grad_update": True}},
        {"bf16": {"enabled": "auto"}, "data_types": "auto"},
        {"prescale_gradients": True, "zero_optimization": {"stage": 1}},
        {
            "gradient_predivide_factor": 2.0,
            "zero_optimization": {"stage": 2, "reduce_scatter": False},
        },
        {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}},
        {"steps_per_print": 10},
    ],
)
def test_what_deepspeed_takes_is_accepted(tmp_path, user):
    cfg, config = merged(tmp_path, user)
    assert zero_stage(config, cfg) == user.get("zero_optimization", {}).get("stage", 1)
    assert config["bf16"]["enabled"]


@pytest.mark.parametrize("name", ["align.teacher_graph", "align.teacher_stream", "train.compile"])
def test_what_the_machine_or_the_stage_cannot_do_is_named(name):
    cfg = parse(f"--{name}", "true")
    check_device(cfg, 2, cuda=True)
    with pytest.raises(ValueError, match=f"{name} needs a ZeRO stage below 3, got 3"):
        check_device(cfg, 3, cuda=True)
    if name != "train.compile":
        with pytest.raises(ValueError, match=f"{name} needs a CUDA device"):
            check_device(cfg, 2, cuda=False)


def test_missing_deepspeed_json_is_named():
    with pytest.raises(ValueError, match="cannot be read"):
        deepspeed_config(parse(), 256, 1, "nowhere.json", cuda=False)


def test_fp8_needs_widths_of_its_products_before_anything_is_built():
    with pytest.raises(ValueError, match="multiple of 16, got 36"):
        args = "--align.teacher_dtype fp8 --model.hidden_size 36 --model.num_heads 3"
        check_device(parse(*args.split()), 1, cuda=False)


@pytest.mark.parametrize("name", ["optim.lr", "optim.clip", "optim.weight_decay"])
def test_infinite_numbers_of_a_file_are_named(tmp_path, name):
    section, field = name.split(".")
    (tmp_path / "inf.yaml").write_text(f"{section}:\n  {field}: .inf\n")
    cfg = parse("--config", str(tmp_path / "inf.yaml"))
    fill_in(cfg)
    with pytest.raises(ValueError, match="infinite|finite"):
        check_config(cfg)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize(
    "text",
    [
        "align: {{weight: {}}}",
        "align: {{schedule: milestones, milestones: {{0: 1.0, 5: {}}}}}",
        "sample: {{guidance: {}}}",
    ],
)
def test_weights_and_guidance_of_a_file_are_finite(tmp_path, text, value):
    (tmp_path / "x.yaml").write_text(text.format(value))
    cfg = parse("--config", str(tmp_path / "x.yaml"))
    fill_in(cfg)
    with pytest.raises(ValueError, match="(weight|milestones|guidance) must be .*finite"):
        check_config(cfg)


@pytest.mark.parametrize(
    "args, layers",
    [
        ("--model SiT-B/2", (3, 8)),
        ("--model SiT-L/4", (6, 16)),
        ("--model SiT-XL/2", (8, 20)),
        ("--model DiT-B/2", (3, 7)),
        ("--model DiT-XL/2", (8, 16)),
        # no model of the paper's: a quarter and three quarters
        ("--model SiT-S/2", (3, 9)),
        ("--model SiT-XL/2 --model.depth 6", (2, 5)),
        ("--model SiT-XL/2 --model.depth 1", (1, 1)),
        ("--model SiT-B/2 --align.student_layer 10", (10, 10)),
        ("--model SiT-B/2 --align.teacher_layer 5", (3, 5)),
    ],
)
def test_layers_follow_from_the_model(args, layers):
    cfg = parse(*args.split())
    fill_in(cfg)
    check_config(cfg)
    assert (cfg.align.student_layer, cfg.align.teacher_layer) == layers


def test_short_forms():
    cfg = parse(*"--model SiT-S/4 --data some/where --cfg-scale 1.5 --align none".split())
    assert (cfg.model.name, cfg.data.path) == ("SiT-S/4", "some/where")
    assert cfg.sample.guidance == 1.5
    assert cfg.align.target == "none"
    same = parse(*"--model=SiT-S/4 --data=some/where --cfg-scale=1.5 --align=none".split())
    assert same == cfg
    # a whole section is still one
    cfg = parse("--model", "{name: SiT-S/8, depth: 3}")
    assert (cfg.model.name, cfg.model.depth) == ("SiT-S/8", 3)


@pytest.mark.parametrize(
    "args",
    [
        "--captions a.json b.json --text-encoders clip t5 --text-name x",
        "--text_name=x --captions [a.json,b.json] --text_encoders [clip,t5]",
        "--text-name x --text-encoders clip t5 --captions a.json b.json",
    ],
)
def test_lists_and_dashes_of_a_program(args):
    parser = make_parser(Options, "")
    options, _ = parse_options(Options, parser, ["--source", "s", *args.split(), "--pixels=true"])
    assert options.captions == ["a.json", "b.json"]
    assert options.text_encoders == ["clip", "t5"]
    assert (options.source, options.text_name, options.pixels) == ("s", "x", True)
    # one value that is no list is one name
    for name in ("a, b", "[1].json", "[a", "[a] \U0001f600"):
        options, _ = parse_options(Options, parser, ["--source=s", "--text-encoders", name])
        assert options.text_encoders == [name]
