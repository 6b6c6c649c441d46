"""The command line: precedence, messages, round trips, and that every shipped recipe reads."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import yaml
from patience import PATIENCE

from videor1.config import EvaluateConfig, SFTConfig, TrainConfig, cli, fields, files
from videor1.errors import ConfigError, DataError, TrainingStopped

RECIPES = sorted(files.RECIPES.glob("*.yaml"))
# Video-R1's values, read off its launch script and its trainer, for every option that they have.
VIDEO_R1 = {
    "num_generations": 8,
    "max_completion_length": 768,
    "max_prompt_length": 16384,
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 50,
    "temporal.enabled": True,
    "temporal.rule": "reference",
    "temporal.alpha": 0.3,
    "temporal.mu": 0.8,
    "temporal.apply": "reward",
    "temporal.shuffle_unit": "frame",
    "temporal.num_generations": None,
    "len_control": True,
    "reward.length_bonus": 0.2,
    "reward.length_range": (320, 512),
    "reward.correct_above": 0.1,
    "reward.lenient": False,
    "reward.format_weight": 1.0,
    "normalize": "std",
    "advantage_eps": 1e-4,
    "loss_type": "grpo",
    "importance_level": "token",
    "beta": 0.04,
    "kl_clamp": 10.0,
    "clip_low": None,
    "clip_high": None,
    "num_iterations": 1,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "max_grad_norm": 5.0,
    "freeze_vision": False,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "video.max_frames": 16,
    "video.fps": 2.0,
    "video.max_pixels": 128 * 28 * 28,
    "video.min_pixels": None,
    "video.image_max_pixels": 256 * 28 * 28,
}


def parse(*argv: str, config_class: type = TrainConfig):
    return cli.parse(config_class, list(argv), prog="videor1.train", description="T-GRPO.")


def failure(capsys, *argv: str, config_class: type = TrainConfig) -> str:
    """Run a command line that must exit with 2, and return its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv, config_class=config_class)
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("videor1.train: error: ")
    return output.err.removeprefix("videor1.train: error: ").rstrip("\n")


def write(tmp_path, text: str, name: str = "run.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def get(config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_no_arguments_give_the_class_defaults():
    assert parse() == TrainConfig()
    assert parse(config_class=SFTConfig) == SFTConfig()


def test_argv_none_reads_sys_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--beta", "0.5"])
    assert cli.parse(TrainConfig, None, prog="p", description="d").beta == 0.5


def test_the_reference_launch_line_works():
    line = "--temporal true --len_control true --beta 0.04 --num_generations 8 --bf16 --report_to wandb"
    line += " --max_grad_norm 5 --learning_rate 1e-6 --lr_scheduler_type cosine --gradient_checkpointing true"
    line += " --save_only_model false"
    config = parse(*line.split())
    assert config == dataclasses.replace(TrainConfig(), bf16=True, gradient_checkpointing=True, report_to=["wandb"])


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
    ],
)
def test_values_from_the_command_line(argv, name, value):
    found = get(parse(*argv.split()), name)
    assert (found, type(found)) == (value, type(value))


def test_appending_leaves_the_defaults_alone(tmp_path):
    path = write(tmp_path, "lora: {target_modules: [q_proj]}")
    assert parse("--config", path, "--lora.target_modules+", "lm_head").lora.target_modules == ["q_proj", "lm_head"]
    assert parse("--lora.target_modules+", "lm_head").lora.target_modules[-1] == "lm_head"
    assert parse().lora.target_modules == TrainConfig().lora.target_modules


def test_later_files_win_and_the_command_line_wins_over_both(tmp_path):
    first = write(tmp_path, "beta: 0.1\ntop_k: 5\ntemporal: {mu: 0.5, alpha: 0.9}\n", "first.yaml")
    second = write(tmp_path, "beta: 0.2\ntemporal: {mu: 0.6}\n", "second.yaml")
    # options before --config win too: where they stand does not matter
    config = parse("--temporal.alpha", "0.7", "--config", first, "--config", second, "--top_k", "7")
    assert (config.beta, config.top_k, config.temporal.mu, config.temporal.alpha) == (0.2, 7, 0.6, 0.7)


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
    ],
)
def test_values_from_yaml(tmp_path, text, name, value):
    found = get(parse("--config", write(tmp_path, text)), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "data:\n#  workers: 3\n"])
def test_empty_yaml_and_empty_sections_change_nothing(tmp_path, text):
    assert parse("--config", write(tmp_path, text)) == TrainConfig()


def test_yaml_merge_keys(tmp_path):
    text = "temporal: &base {mu: 0.5, alpha: 0.1}\n"
    config = parse("--config", write(tmp_path, text + "lora: {rank: 4}\n"))
    assert (config.temporal.mu, config.lora.rank) == (0.5, 4)
    config = parse("--config", write(tmp_path, "temporal:\n  <<: {mu: 0.5, alpha: 0.1}\n  rule: threshold\n"))
    assert (config.temporal.mu, config.temporal.alpha, config.temporal.rule) == (0.5, 0.1, "threshold")


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
def test_mistakes_on_the_command_line(capsys, argv, message):
    assert failure(capsys, *argv.split()) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nlearing_rate: 1", ":2: unknown option learing_rate; did you mean learning_rate?"),
        ("temporal:\n  rul: margin", ":2: unknown option temporal.rul; did you mean temporal.rule?"),
        ("temporl: {rule: margin}", ":1: unknown option temporl; did you mean temporal."),
        ("config: other.yaml", ":1: unknown option config; did you mean "),
        ("seed: 1\nbeta: high", ":2: beta: expected a number, got 'high'"),
        ("beta: null", ":1: beta: expected a number, got 'null'"),
        ("beta: {a: 1}", ":1: beta: expected a number, got "),
        ("temporal: {rule: best}", ":1: temporal.rule: expected one of margin, threshold, reference, got 'best'"),
        ("report_to: [mlflow]", ":1: report_to: expected a list of tensorboard, wandb, trackio, got "),
        ("reward: {length_range: [1, 2, 3]}", ":1: reward.length_range: expected [a whole number, a whole number]"),
        ("data: 3", ":1: data: expected a mapping of its options, got 3"),
        ("temporal: 3", ":1: temporal.enabled: expected true or false, got '3'"),
        ("beta: 1\nbeta: 2", ":2: beta is given twice"),
        ("temporal: {enabled: true}\ntemporal.enabled: false", ":2: temporal.enabled is given twice"),
        ("- beta", ": expected options as name: value lines"),
        ("beta: [1", ":1: not valid YAML: "),
        ("run_name: !!python/object:os.system x\nbeta: !!python/name:os.system", ":2: not valid YAML: "),
    ],
)
def test_mistakes_in_yaml_name_the_line(capsys, tmp_path, text, message):
    path = write(tmp_path, text)
    assert failure(capsys, "--config", path).startswith(path + message)


def test_a_range_error_from_yaml_is_one_line(capsys, tmp_path):
    path = write(tmp_path, "video: {max_frames: 3}")
    assert failure(capsys, "--config", path) == "video.max_frames: expected an even number, at least 2, got 3"


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
def test_no_option_is_infinite_or_nan(capsys, tmp_path, value):
    path = write(tmp_path, f"reward: {{length_bonus: {value}}}")
    assert failure(capsys, "--config", path).startswith("reward.length_bonus: expected a finite number, got ")


def test_missing_and_unreadable_config_files(capsys, tmp_path):
    message = failure(capsys, "--config", "nope.yaml")
    assert message.startswith("--config nope.yaml: no such file; give a YAML file or a recipe's name (")
    assert "qwen2_5_vl_7b" in message
    assert "it is a folder" in failure(capsys, "--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in failure(capsys, "--config", str(tmp_path / "binary.yaml"))


def test_recipes_go_by_name_and_a_real_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("--config", "qwen2_5_vl_7b").model_name_or_path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert parse("--config", "qwen2_5_vl_7b.yaml").model_name_or_path == "Qwen/Qwen2.5-VL-7B-Instruct"
    (tmp_path / "qwen2_5_vl_7b").write_text("model_name_or_path: mine")
    assert parse("--config", "qwen2_5_vl_7b").model_name_or_path == "mine"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_reads(path):
    config_class = SFTConfig if path.stem.startswith("sft") else TrainConfig
    config = cli.load_config(config_class, path)
    assert config != config_class()
    assert parse("--config", path.stem, config_class=config_class) == config


def test_the_7b_recipe_holds_the_launch_values():
    config = cli.load_config(TrainConfig, "qwen2_5_vl_7b")
    for name in (
        "lr_scheduler_type",
        "weight_decay",
        "max_grad_norm",
        "beta",
        "num_generations",
        "max_completion_length",
        "max_prompt_length",
        "temperature",
        "top_p",
        "len_control",
        "temporal.enabled",
        "video.max_frames",
        "video.fps",
        "video.max_pixels",
    ):
        assert get(config, name) == VIDEO_R1[name], name
    assert (config.bf16, config.gradient_checkpointing, config.save_steps) == (True, True, 100)
    assert (config.lora.rank, config.learning_rate) == (64, 1e-5)  # adapters, so that it fits one GPU


def test_compat_is_a_recipe_of_the_reference_codes_values():
    recipe, flag = cli.load_config(TrainConfig, "video_r1"), parse("--compat", "video-r1")
    assert dataclasses.replace(recipe, compat="video-r1") == flag
    written = dict(files.flat_tree(yaml.safe_load((files.RECIPES / "video_r1.yaml").read_text())))
    assert set(written) == set(VIDEO_R1)  # those alone, so that every other default holds
    assert {name: get(recipe, name) for name in VIDEO_R1} == VIDEO_R1


def test_the_recipe_of_compat_is_a_file_among_others(tmp_path):
    path = write(tmp_path, "beta: 0.1\ntop_k: 3\n")
    first, last = parse("--config", "video_r1", "--config", path), parse("--config", path, "--config", "video_r1")
    assert (first.beta, first.top_k, first.temporal.rule) == (0.1, 3, "reference")
    assert (last.beta, last.top_k) == (0.04, 50)


def test_compat_fills_in_below_yaml_and_command_line(tmp_path):
    config = parse("--compat", "video-r1")
    assert (config.temporal.rule, config.top_k) == ("reference", 50)  # both differ from the class defaults

    path = write(tmp_path, "temporal: {rule: threshold}\nnum_generations: 4\n")
    config = parse("--config", path, "--compat", "video-r1", "--num_generations", "6")
    assert (config.temporal.rule, config.num_generations, config.top_k) == ("threshold", 6, 50)

    path = write(tmp_path, "top_k: 3\ncompat: video-r1\n")
    config = parse("--config", path)
    assert (config.compat, config.temporal.rule, config.top_k) == ("video-r1", "reference", 3)
    assert parse("--config", path, "--compat", "null").temporal.rule == "margin"


def test_compat_goes_with_the_recipe():
    config = parse("--config", "qwen2_5_vl_7b", "--compat", "video-r1")
    assert (config.temporal.rule, config.top_k) == ("reference", 50)


def test_compat_is_no_option_of_sft(capsys):
    assert failure(capsys, "--compat", "video-r1", config_class=SFTConfig) == (
        "--compat is an option of videor1.train, not of this command"
    )


def test_an_option_of_another_command_is_told_apart(capsys, tmp_path):
    path = write(tmp_path, cli.dump_config(TrainConfig()))
    line = 1 + cli.dump_config(TrainConfig()).splitlines().index("num_generations: 8")
    message = f"{path}:{line}: num_generations is an option of videor1.train, not of this command"
    assert failure(capsys, "--config", path, config_class=EvaluateConfig) == message
    message = "--num_generations is an option of videor1.train, not of this command"
    assert failure(capsys, "--num_generations", "3", config_class=SFTConfig) == message


@pytest.mark.parametrize(
    ("config_class", "recipes"),
    [
        (TrainConfig, "demo, qwen2_5_vl_3b, qwen2_5_vl_7b, video_r1"),
        (SFTConfig, "sft, sft_demo"),
        (EvaluateConfig, None),
    ],
)
def test_help_names_the_recipes_that_the_command_reads(capsys, config_class, recipes):
    with pytest.raises(SystemExit):
        parse("--help", config_class=config_class)
    shown = " ".join(capsys.readouterr().out.split())
    assert ("Recipes" in shown) == bool(recipes)
    assert recipes is None or shown.endswith(f"Recipes that --config takes by name: {recipes}.")
    assert failure(capsys, "--config", "gone", config_class=config_class).endswith(
        f"give a YAML file or a recipe's name ({recipes})" if recipes else "give a YAML file"
    )


def test_a_resumed_run_keeps_its_options(tmp_path):
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
    assert parse(*folder) == TrainConfig(output_dir=str(tmp_path))
    assert parse("--resume", "null", *folder) == TrainConfig(output_dir=str(tmp_path))
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
def test_print_config_reads_back_equal(capsys, tmp_path, argv):
    config = parse(*argv.split())
    with pytest.raises(SystemExit) as stop:
        parse(*argv.split(), "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert parse("--config", write(tmp_path, printed)) == config
    assert set(yaml.safe_load(printed)) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_print_config_checks_first(capsys):
    assert failure(capsys, "--beta", "-1", "--print_config").startswith("beta: expected 0 or more")


@pytest.mark.parametrize("config_class", [TrainConfig, SFTConfig])
def test_save_and_load(tmp_path, config_class):
    config = config_class(run_name="null", learning_rate=3e-7, report_to=["trackio"])
    cli.save_config(config, tmp_path / "run" / "config.yaml")
    assert cli.load_config(config_class, tmp_path / "run" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_load_config_raises_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"bad\.yaml:1: unknown option learing_rate"):
        cli.load_config(TrainConfig, write(tmp_path, "learing_rate: 1", "bad.yaml"))


def squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("config_class", fields.COMMANDS.values())
def test_help_and_table_show_every_option_with_docstring_and_default(capsys, config_class):
    with pytest.raises(SystemExit) as stop:
        parse("--help", config_class=config_class)
    assert stop.value.code == 0
    shown = squeeze(capsys.readouterr().out)
    table = fields.options_table(config_class)
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


def test_the_names_in_the_table_are_usable():
    defaults = {name: json.dumps(option.default) for name, option in fields.collect_options(TrainConfig).items()}
    assert parse(*[f"--{name}={text.strip(chr(34))}" for name, text in defaults.items()]) == TrainConfig()


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("c"), 2), (DataError("d"), 1), (TrainingStopped("t"), 1), (KeyboardInterrupt(), 130)],
)
def test_run_main_turns_the_users_errors_into_exit_codes(capsys, error, code):
    def main(argv):
        raise error

    assert cli.run_main(main, []) == code
    assert capsys.readouterr().err == ("interrupted\n" if code == 130 else f"error: {error}\n")


def test_run_main_passes_results_and_bugs_through():
    assert cli.run_main(lambda argv: len(argv or []), ["a", "b", "c"]) == 3

    def bug(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run_main(bug, [])


@pytest.mark.parametrize(("command", "config_class"), fields.COMMANDS.items())
def test_the_table_command(capsys, command, config_class):
    assert cli.main(["--table", command.removeprefix("videor1.")]) == 0
    assert capsys.readouterr().out == fields.options_table(config_class)


def test_the_table_command_has_its_former_name_too():
    command = [sys.executable, "-m", "videor1.cli", "--table", "sft"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == fields.options_table(SFTConfig)


def test_changed_options_name_old_and_new() -> None:
    before = TrainConfig(learning_rate=1e-3)
    after = dataclasses.replace(
        before, max_steps=7, output_dir="elsewhere", temporal=dataclasses.replace(before.temporal, alpha=0.5)
    )
    assert cli.changed_options(before, before) == []
    assert cli.changed_options(before, after) == ["max_steps: -1 -> 7", "temporal.alpha: 0.3 -> 0.5"]
