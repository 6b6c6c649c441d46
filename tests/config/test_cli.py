"""The command line: precedence, messages, round trips, and that every shipped recipe reads."""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from videor1.config import EvaluateConfig, SFTConfig, TrainConfig, cli, fields, files
from videor1.errors import ConfigError, DataError, TrainingStopped

RECIPES = sorted(files.RECIPES.glob("*.yaml"))
# Video-R1's values, read off its launch script and its trainer, for every option that they have.
VIDEO_R1 = yaml.safe_load("""{
    num_generations: 8, max_completion_length: 768, max_prompt_length: 16384, temperature: 1.0, top_p: 0.95, top_k: 50,
    temporal.enabled: true, temporal.rule: reference, temporal.alpha: 0.3, temporal.mu: 0.8, temporal.apply: reward,
    temporal.shuffle_unit: frame, temporal.num_generations: null,
    len_control: true, reward.length_bonus: 0.2, reward.length_range: [320, 512], reward.correct_above: 0.1,
    reward.lenient: false, reward.format_weight: 1.0, normalize: std, advantage_eps: 1.0e-4,
    loss_type: grpo, importance_level: token, beta: 0.04, kl_clamp: 10.0, clip_low: null, clip_high: null,
    num_iterations: 1, learning_rate: 1.0e-6, lr_scheduler_type: cosine, weight_decay: 0.01, max_grad_norm: 5.0,
    freeze_vision: false, per_device_train_batch_size: 1, gradient_accumulation_steps: 1,
    video.max_frames: 16, video.fps: 2.0, video.max_pixels: 100352, video.min_pixels: null,
    video.image_max_pixels: 200704
}""")
# What the 7B recipe takes of it.
LAUNCHED = yaml.safe_load("""[
    lr_scheduler_type, weight_decay, max_grad_norm, beta, num_generations, max_completion_length, max_prompt_length,
    temperature, top_p, len_control, temporal.enabled, video.max_frames, video.fps, video.max_pixels
]""")
FINITE = "reward.length_bonus: expected a finite number, got "
Capture = pytest.CaptureFixture[str]


def parse(*argv: str, config_class: type = TrainConfig) -> Any:
    return cli.parse(config_class, list(argv), prog="videor1.train", description="T-GRPO.")


def failure(capsys: Capture, *argv: str, config_class: type = TrainConfig) -> str:
    """Run a command line that must exit with 2, and return its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv, config_class=config_class)
    output = capsys.readouterr()
    assert (stop.value.code, output.out, output.err.count("\n")) == (2, "", 1), output.err
    assert output.err.startswith("videor1.train: error: ")
    return output.err.removeprefix("videor1.train: error: ").rstrip("\n")


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def get(config: Any, name: str) -> Any:
    return operator.attrgetter(name)(config) if name else config


def test_no_arguments_give_the_class_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse() == TrainConfig()
    assert parse(config_class=SFTConfig) == SFTConfig()
    monkeypatch.setattr(sys, "argv", ["train.py", "--beta", "0.5"])
    assert cli.parse(TrainConfig, None, prog="p", description="d").beta == 0.5


def test_the_reference_launch_line_works() -> None:
    line = "--temporal true --len_control true --beta 0.04 --num_generations 8 --bf16 --report_to wandb"
    line += " --max_grad_norm 5 --learning_rate 1e-6 --lr_scheduler_type cosine --gradient_checkpointing true"
    expected = TrainConfig(bf16=True, gradient_checkpointing=True, report_to=["wandb"])
    assert parse(*line.split(), "--save_only_model", "false") == expected


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        ("--temporal false", "temporal.enabled", False),
        ("--temporal=false", "temporal.enabled", False),
        ("--temporal.enabled false", "temporal.enabled", False),
        ("--len_control false", "len_control", False),
        ("--bf16 true", "bf16", True),
        ("--bf16 False", "bf16", False),
        ("--bf16 null", "bf16", None),
        ("--max_steps -1", "max_steps", -1),
        ("--learning_rate=2e-5", "learning_rate", 2e-5),
        ("--clip_low 0.2", "clip_low", 0.2),
        ("--temporal.num_generations 3", "temporal.num_generations", 3),
        ("--temporal.apply advantage", "temporal.apply", "advantage"),
        ("--reward.length_range 10 20", "reward.length_range", (10, 20)),
        ("--reward.length_range [10,20]", "reward.length_range", (10, 20)),
        ("--reward.functions my.module:fn,other:fn", "reward.functions", ["my.module:fn", "other:fn"]),
        ("--report_to [wandb,trackio]", "report_to", ["wandb", "trackio"]),
        ("--report_to wandb trackio", "report_to", ["wandb", "trackio"]),
        ("--report_to+ wandb --report_to+ trackio", "report_to", ["wandb", "trackio"]),
        ("--run_name 1e-3", "run_name", "1e-3"),
        ("--beta 0.1 --beta 0.2", "beta", 0.2),
        ("--lora.target_modules+ lm_head", "lora.target_modules", [*TrainConfig().lora.target_modules, "lm_head"]),
    ],
)
def test_values_from_the_command_line(argv: str, name: str, value: object) -> None:
    found = get(parse(*argv.split()), name)
    assert (found, type(found)) == (value, type(value))
    assert parse() == TrainConfig()  # nothing is appended to the defaults


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("temporal: false", "temporal.enabled", False),
        ("temporal: {enabled: false}", "temporal.enabled", False),
        ("temporal.enabled: false", "temporal.enabled", False),
        ("learning_rate: 1e-5", "learning_rate", 1e-5),  # YAML 1.1 reads this one as text
        ("beta: 0", "beta", 0.0),
        ("run_name: 2024", "run_name", "2024"),
        ("run_name: 2024-01-02", "run_name", "2024-01-02"),
        ("run_name: 'null'", "run_name", "null"),
        ("run_name: null", "run_name", None),
        ("normalize: none", "normalize", "none"),
        ("temporal: {apply: null}", "temporal.apply", None),
        ("report_to: wandb", "report_to", ["wandb"]),
        ("reward:\n  length_range:\n  - 1\n  - 2\n", "reward.length_range", (1, 2)),
        ("bf16: yes", "bf16", True),
        ("temporal:\n  <<: {mu: 0.5, alpha: 0.1}\n  rule: threshold\n", "temporal.mu", 0.5),
        ("temporal: &base {mu: 0.5}\nlora: {rank: 4}\n", "lora.rank", 4),
        ("", "", TrainConfig()),
        ("# only a comment\n", "", TrainConfig()),
        ("data:\n#  workers: 3\n", "", TrainConfig()),
    ],
)
def test_values_from_yaml(tmp_path: Path, text: str, name: str, value: object) -> None:
    found = get(parse("--config", write(tmp_path, text)), name)
    assert (found, type(found)) == (value, type(value))


def test_later_files_win_and_the_command_line_wins_over_both(tmp_path: Path) -> None:
    first = write(tmp_path, "beta: 0.1\ntop_k: 5\ntemporal: {mu: 0.5, alpha: 0.9}\n", "first.yaml")
    second = write(tmp_path, "beta: 0.2\ntemporal: {mu: 0.6}\nlora: {target_modules: [q_proj]}\n", "second.yaml")
    # options before --config win too: where they stand does not matter
    files = ["--config", first, "--config", second]
    config = parse("--temporal.alpha", "0.7", *files, "--top_k", "7", "--lora.target_modules+", "lm_head")
    assert (config.beta, config.top_k, config.temporal.mu, config.temporal.alpha) == (0.2, 7, 0.6, 0.7)
    assert config.lora.target_modules == ["q_proj", "lm_head"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--temporal.rul margin", "unknown option --temporal.rul; did you mean temporal.rule?"),
        ("--learing_rate 1", "unknown option --learing_rate; did you mean learning_rate?"),
        ("--learning-rate 1", "unknown option --learning-rate; did you mean learning_rate?"),
        ("--max_pixels 1", "unknown option --max_pixels; did you mean video.max_pixels?"),
        ("--alpha 1", "unknown option --alpha; did you mean lora.alpha or temporal.alpha?"),
        ("--confg a.yaml", "unknown option --confg; did you mean config?"),
        ("--learning 1", "unknown option --learning; did you mean learning_rate?"),  # a prefix is no abbreviation
        ("--beta+ 1", "unknown option --beta+; did you mean beta?"),
        ("--beta high", "beta: expected a number, got 'high'"),
        ("--beta", "argument --beta: expected one argument"),
        ("--beta -1 --print_config", "beta: expected 0 or more, got -1.0"),
        ("--num_generations 2.5", "num_generations: expected a whole number, got '2.5'"),
        ("--len_control maybe", "len_control: expected true or false, got 'maybe'"),
        ("--bf16 maybe", "bf16: expected true or false or null, got 'maybe'"),
        ("--temporal.rule best", "temporal.rule: expected one of margin, threshold, reference, got 'best'"),
        ("--temporal.apply best", "temporal.apply: expected one of reward, advantage or null, got 'best'"),
        ("--report_to mlflow", "report_to: expected a list of tensorboard, wandb, trackio, got 'mlflow'"),
        ("--compat video-r2", "compat: expected one of video-r1 or null, got 'video-r2'"),
        ("--num_generations 1", "num_generations: expected at least 2 (the group is its own baseline), got 1"),
        ("--max_steps -2", "max_steps: expected 0 or more, or -1 (from num_train_epochs), got -2"),
        ("--temporal.alpha -1", "temporal.alpha: expected 0 or more, got -1.0"),
        ("--kl_clamp 0", "kl_clamp: expected above 0, got 0.0"),
        ("--adam_beta2 1", "adam_beta2: expected in [0, 1), got 1.0"),
        ("--lora.dropout 1", "lora.dropout: expected in [0, 1), got 1.0"),
        ("--data.cache_mb -1", "data.cache_mb: expected 0 (none) or more, got -1"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_mistakes_on_the_command_line(capsys: Capture, argv: str, message: str) -> None:
    assert failure(capsys, *argv.split()) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nlearing_rate: 1", "PATH:2: unknown option learing_rate; did you mean learning_rate?"),
        ("temporal:\n  rul: margin", "PATH:2: unknown option temporal.rul; did you mean temporal.rule?"),
        ("temporl: {rule: margin}", "PATH:1: unknown option temporl; did you mean temporal."),
        ("config: other.yaml", "PATH:1: unknown option config; did you mean "),
        ("seed: 1\nbeta: high", "PATH:2: beta: expected a number, got 'high'"),
        ("beta: null", "PATH:1: beta: expected a number, got 'null'"),
        ("beta: {a: 1}", "PATH:1: beta: expected a number, got "),
        ("temporal: {rule: best}", "PATH:1: temporal.rule: expected one of margin, threshold, reference, got 'best'"),
        ("report_to: [mlflow]", "PATH:1: report_to: expected a list of tensorboard, wandb, trackio, got "),
        ("reward: {length_range: [1, 2, 3]}", "PATH:1: reward.length_range: expected [a whole number, a whole number]"),
        ("data: 3", "PATH:1: data: expected a mapping of its options, got 3"),
        ("temporal: 3", "PATH:1: temporal.enabled: expected true or false, got '3'"),
        ("beta: 1\nbeta: 2", "PATH:2: beta is given twice"),
        ("temporal: {enabled: true}\ntemporal.enabled: false", "PATH:2: temporal.enabled is given twice"),
        ("- beta", "PATH: expected options as name: value lines"),
        ("beta: [1", "PATH:1: not valid YAML: "),
        ("run_name: !!python/object:os.system x\nbeta: !!python/name:os.system", "PATH:2: not valid YAML: "),
        ("video: {max_frames: 3}", "video.max_frames: expected an even number, at least 2, got 3"),
        *(
            (f"reward: {{length_bonus: {x}}}", "reward.length_bonus: expected a finite")
            for x in (".inf", ".nan", "-.inf")
        ),
    ],
)
def test_mistakes_in_yaml_name_the_line(capsys: Capture, tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert failure(capsys, "--config", path).startswith(message.replace("PATH", path))


def test_missing_and_unreadable_config_files(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path, reason in ((tmp_path, "it is a folder"), (tmp_path / "binary.yaml", "cannot be read")):
        assert reason in failure(capsys, "--config", str(path))
    with pytest.raises(ConfigError, match=r"bad\.yaml:1: unknown option learing_rate"):
        cli.load_config(TrainConfig, write(tmp_path, "learing_rate: 1", "bad.yaml"))


def test_recipes_go_by_name_and_a_real_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("qwen2_5_vl_7b", "qwen2_5_vl_7b.yaml"):
        assert parse("--config", name).model_name_or_path == "Qwen/Qwen2.5-VL-7B-Instruct"
    (tmp_path / "qwen2_5_vl_7b").write_text("model_name_or_path: mine")
    assert parse("--config", "qwen2_5_vl_7b").model_name_or_path == "mine"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_reads(path: Path) -> None:
    config_class = SFTConfig if path.stem.startswith("sft") else TrainConfig
    config = cli.load_config(config_class, path)
    assert config != config_class()
    assert parse("--config", path.stem, config_class=config_class) == config


@pytest.mark.parametrize("name", ["qwen2_5_vl_7b", "qwen3_vl_8b"])
def test_recipes_hold_the_reference_codes_values(name: str) -> None:
    config = cli.load_config(TrainConfig, name)
    launched = {name: VIDEO_R1[name] for name in LAUNCHED}
    if name == "qwen3_vl_8b":  # frames of as many tokens, of 32 x 32 pixels
        launched["video.max_pixels"] = 128 * 32 * 32
    assert {name: get(config, name) for name in LAUNCHED} == launched
    assert (config.bf16, config.gradient_checkpointing, config.save_steps) == (True, True, 100)
    assert (config.lora.rank, config.learning_rate) == (64, 1e-5)  # adapters, so that it fits one GPU
    recipe, flag = cli.load_config(TrainConfig, "video_r1"), parse("--compat", "video-r1")
    assert dataclasses.replace(recipe, compat="video-r1") == flag
    written = dict(files.flat_tree(yaml.safe_load((files.RECIPES / "video_r1.yaml").read_text())))
    assert set(written) == set(VIDEO_R1)  # those alone, so that every other default holds
    assert {name: fields.plain(get(recipe, name)) for name in VIDEO_R1} == VIDEO_R1


def test_compat_fills_in_below_yaml_and_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "temporal: {rule: threshold}\nnum_generations: 4\n")
    config = parse("--config", path, "--compat", "video-r1", "--num_generations", "6")
    assert (config.temporal.rule, config.num_generations, config.top_k) == ("threshold", 6, 50)
    config = parse("--config", "qwen2_5_vl_7b", "--compat", "video-r1")
    assert (config.temporal.rule, config.top_k) == ("reference", 50)  # both differ from the class defaults

    path = write(tmp_path, "top_k: 3\ncompat: video-r1\nbeta: 0.1\n")
    config = parse("--config", path)
    assert (config.compat, config.temporal.rule, config.top_k) == ("video-r1", "reference", 3)
    assert parse("--config", path, "--compat", "null").temporal.rule == "margin"
    # The recipe of that name is a file among others.
    for order, values in (("video_r1", path), (0.1, 3)), ((path, "video_r1"), (0.04, 50)):
        config = parse(*(word for name in order for word in ("--config", name)))
        assert (config.beta, config.top_k, config.temporal.rule) == (*values, "reference")


def test_an_option_of_another_command_is_told_apart(capsys: Capture, tmp_path: Path) -> None:
    path = write(tmp_path, cli.dump_config(TrainConfig()))
    line = 1 + cli.dump_config(TrainConfig()).splitlines().index("num_generations: 8")
    where = "is an option of videor1.train, not of this command"
    found = failure(capsys, "--config", path, config_class=EvaluateConfig)
    assert found == f"{path}:{line}: num_generations {where}"
    for option, value in (("--num_generations", "3"), ("--compat", "video-r1")):
        assert failure(capsys, option, value, config_class=SFTConfig) == f"{option} {where}"


def test_a_resumed_run_keeps_its_options(tmp_path: Path) -> None:
    config = TrainConfig(model_name_or_path="m", beta=0.5, report_to=["wandb"], compat="video-r1", output_dir="moved")
    cli.save_config(config, tmp_path / "config.yaml")
    folder = ["--output_dir", str(tmp_path)]
    expected = dataclasses.replace(config, output_dir=str(tmp_path), resume="auto")
    assert parse("--resume", "auto", *folder) == expected
    # What is given again wins, from files too.
    given = [*folder, "--resume=auto", "--config", write(tmp_path, "beta: 0.7\nseed: 3"), "--seed", "4"]
    assert parse(*given) == dataclasses.replace(expected, beta=0.7, seed=4)
    where = write(tmp_path, f"output_dir: {tmp_path}", "where.yaml")
    assert parse("--resume", "auto", "--config", where) == expected
    # A command that names its model or data is whole: what it does not give has its default.
    assert parse("--resume", "auto", *folder, "--dataset_name", "d").beta == TrainConfig().beta
    assert parse("--resume", "auto", "--config", write(tmp_path, f"output_dir: {tmp_path}\nmodel_name_or_path: m")) == (
        TrainConfig(resume="auto", output_dir=str(tmp_path), model_name_or_path="m")
    )
    # Another run in the folder has nothing to do with it.
    for words in (folder, ["--resume", "null", *folder]):
        assert parse(*words) == TrainConfig(output_dir=str(tmp_path))
    assert parse("--resume", "auto", "--output_dir", str(tmp_path / "new")).beta == TrainConfig().beta


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--compat video-r1 --temporal.mu 0.5",
        "--config qwen2_5_vl_3b --report_to wandb --clip_low 0.2 --clip_high 0.28",
        "--run_name null --output_dir 1e-6 --reward.functions a:b --bf16 false --learning_rate 1e-10",
        "--run_name=été:#'quoted'",
    ],
)
def test_print_config_reads_back_equal(capsys: Capture, tmp_path: Path, argv: str) -> None:
    config = parse(*argv.split())
    with pytest.raises(SystemExit) as stop:
        parse(*argv.split(), "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert parse("--config", write(tmp_path, printed)) == config
    assert set(yaml.safe_load(printed)) == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("config_class", [TrainConfig, SFTConfig])
def test_save_and_load(tmp_path: Path, config_class: type) -> None:
    config = config_class(run_name="null", learning_rate=3e-7, report_to=["trackio"])
    cli.save_config(config, tmp_path / "run" / "config.yaml")
    assert cli.load_config(config_class, tmp_path / "run" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


TRAIN_RECIPES = (
    "demo, demo_qwen3_5, demo_qwen3_vl, qwen2_5_vl_3b, qwen2_5_vl_7b, qwen3_5_9b, qwen3_vl_4b, qwen3_vl_8b, video_r1"
)


@pytest.mark.parametrize(
    ("command", "config_class", "recipes"),
    [
        ("videor1.train", TrainConfig, TRAIN_RECIPES),
        ("videor1.sft", SFTConfig, "sft, sft_demo"),
        ("videor1.evaluate", EvaluateConfig, ""),
    ],
)
def test_help_and_table_show_every_option_with_docstring_and_default_and_the_recipes(
    capsys: Capture, command: str, config_class: type, recipes: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help", config_class=config_class)
    assert stop.value.code == 0
    shown = squeeze(capsys.readouterr().out)
    assert ("Recipes" in shown) == bool(recipes)
    assert shown.endswith(squeeze(f"Recipes that --config takes by name: {recipes}.") if recipes else "")
    advice = f"give a YAML file or a recipe's name ({recipes})" if recipes else "give a YAML file"
    assert failure(capsys, "--config", "gone", config_class=config_class) == f"--config gone: no such file; {advice}"
    assert fields.COMMANDS[command] is config_class
    assert cli.main(["--table", command.removeprefix("videor1.")]) == 0
    table = capsys.readouterr().out
    assert table == fields.options_table(config_class)
    options = fields.collect_options(config_class)
    assert len(table.splitlines()) == 2 + len(options)
    for option in options.values():
        assert len(option.help) > 5, f"{option.name} has no docstring in options.py"
        assert squeeze(f"--{option.name}") in shown
        assert squeeze(option.help) in shown
        default = "null" if option.default is None else str(option.default)
        after = shown.split(squeeze(f"--{option.name}"), 1)[1].split(squeeze(option.help), 1)[1][:400]
        assert squeeze(f"default:{default})") in after
        row = next(line for line in table.splitlines() if line.startswith(f"| `{option.name}` |"))
        if option.range is not None:
            assert after.startswith(squeeze(f"Range: {option.range.words}. (type:"))
            assert f"` | {option.range.words} | " in row
        elif option.choices:
            assert f"` | {', '.join(option.choices)} | " in row
        assert squeeze(option.help) in squeeze(row.replace("\\", ""))
        assert row.replace("\\|", "").count("|") == 5


def test_the_names_in_the_table_are_usable() -> None:
    defaults = {name: json.dumps(option.default) for name, option in fields.collect_options(TrainConfig).items()}
    assert parse(*[f"--{name}={text.strip(chr(34))}" for name, text in defaults.items()]) == TrainConfig()


def test_run_main_turns_the_users_errors_into_exit_codes(capsys: Capture) -> None:
    def main(argv: list[BaseException]) -> int:
        raise argv[0]

    users = {ConfigError("c"): 2, DataError("d"): 1, TrainingStopped("t"): 1, KeyboardInterrupt(): 130}
    for error, code in users.items():
        assert cli.run_main(main, [error]) == code
        assert capsys.readouterr().err == ("interrupted\n" if code == 130 else f"error: {error}\n")
    with pytest.raises(ZeroDivisionError):  # a bug
        cli.run_main(main, [ZeroDivisionError()])
    assert cli.run_main(len, ["a", "b", "c"]) == 3


def test_the_table_command_has_its_former_name_too(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "argv", ["videor1.cli", "--table", "sft"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("videor1.cli", run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, fields.options_table(SFTConfig))


def test_changed_options_name_old_and_new() -> None:
    before = TrainConfig(learning_rate=1e-3)
    temporal = dataclasses.replace(before.temporal, alpha=0.5)
    after = dataclasses.replace(before, max_steps=7, output_dir="elsewhere", temporal=temporal)
    assert cli.changed_options(before, before) == []
    assert cli.changed_options(before, after) == ["max_steps: -1 -> 7", "temporal.alpha: 0.3 -> 0.5"]
