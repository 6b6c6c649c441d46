"""Ranges of options: every number has one or is known to need none, and the range shown is the one that is checked."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, get_args

import pytest

from videor1.config import EvaluateConfig, SFTConfig, TrainConfig
from videor1.config.fields import COMMANDS, Option, collect_options
from videor1.config.options import PROBLEM_TYPES
from videor1.config.ranges import Range, above, at_least, check_values, field_ranges
from videor1.errors import ConfigError
from videor1.types import ProblemType

# Numbers of which every finite value means something; length_range's two ends are held to each other.
REWARD = {"reward.correct_above", "reward.format_weight", "reward.length_bonus", "reward.length_range"}
ANY_VALUE = {"seed", "lora.alpha"} | REWARD
commands = pytest.mark.parametrize("config_class", COMMANDS.values())


def ends(option: Option) -> tuple[list[float], list[float]]:
    """Return values at both ends of an option's range, which are in it, and values beyond them, which are not."""
    given, step = option.range, 1 if int in (option.type, *get_args(option.type)) else 1e-6
    assert given is not None
    low = [given.ge, given.ge - step] if given.gt == -math.inf else [given.gt + step, given.gt]
    high = [given.le, given.le + step] if given.le < math.inf else [given.lt - step, given.lt]
    held, refused = zip(low, *[high] * (high[-1] < math.inf), strict=True)
    return list(held), [*refused, *[low[0] + 1] * (given.multiple_of == 2)]


def with_value(config_class: type, name: str, value: object) -> Any:
    section, _, field = name.rpartition(".")
    changed = {field: value}
    for part in reversed(section.split(".") if section else []):
        outer = functools.reduce(getattr, section.split(".")[: section.split(".").index(part)], config_class())
        changed = {part: replace(getattr(outer, part), **changed)}
    return config_class(**changed)


@commands
def test_every_number_has_a_range_or_takes_any_value(config_class: type) -> None:
    options = collect_options(config_class)
    numbers = {name for name, o in options.items() if not {int, float}.isdisjoint((o.type, *get_args(o.type)))}
    assert numbers >= ANY_VALUE
    assert {name for name, option in options.items() if option.range} == numbers - ANY_VALUE


@commands
def test_a_value_beyond_the_end_of_its_range_is_refused(config_class: type) -> None:
    for option in collect_options(config_class).values():
        held, refused = ends(option) if option.range else ([], [])
        assert all(value in option.range for value in held), option.name
        for value in refused:
            with pytest.raises(ConfigError) as error:
                with_value(config_class, option.name, value)
            assert str(error.value) == f"{option.name}: expected {option.range.words}, got {value!r}"


def test_words_and_finite_numbers() -> None:
    shown = [at_least(0), at_least(3), above(0), at_least(0, "0 (off) or more"), above(0, "more than none")]
    expected = ["0 or more", "at least 3", "above 0", "0 (off) or more", "more than none"]
    assert [one.words for one in shown] == expected
    for value in (math.nan, math.inf, -math.inf):
        assert not any(value in one for one in (at_least(0), above(0), Range("in (0, 1]", gt=0, le=1)))


def test_sections_and_inherited_fields_are_checked_and_null_is_free() -> None:
    @dataclass
    class Section:
        size: Annotated[int | None, at_least(1)] = None
        free: float = 0.0

    @dataclass
    class Base:
        rate: Annotated[float, above(0)] = 1.0

    @dataclass
    class Config(Base):
        section: Any = field(default_factory=Section)

    assert (list(field_ranges(Section)), list(field_ranges(Config))) == (["size"], ["rate"])
    check_values(Config())
    for config, message in (
        (Config(section=Section(size=0)), r"^section\.size: expected at least 1, got 0$"),
        (Config(section=Section(free=math.nan)), r"^section\.free: expected a finite number, got nan$"),
        (Config(rate=0.0), r"^rate: expected above 0, got 0\.0$"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_values(config)


@pytest.mark.parametrize(
    ("config_class", "name", "value", "message"),
    [
        (TrainConfig, "max_tokens_per_row", 768, "more than max_completion_length (768), or null for no bound"),
        (SFTConfig, "video.min_pixels", 200_000, "at least 1 and at most video.max_pixels (100352)"),
        (SFTConfig, "video.image_min_pixels", 10**6, "at least 1 and at most video.image_max_pixels (200704)"),
        (TrainConfig, "reward.length_range", (3, 2), "(low, high) with low <= high"),
        (EvaluateConfig, "eval_top_p", 0.9, "1, or eval_temperature above 0 (0 is greedy: every answer is the same)"),
    ],
)
def test_what_two_options_ask_of_each_other(config_class: type, name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        with_value(config_class, name, value)
    assert str(refused.value) == f"{name}: expected {message}, got {value}"


def test_the_problem_types_are_those_of_the_records() -> None:
    assert get_args(ProblemType) == PROBLEM_TYPES


COUNTS = "num_generations rollout_batch_size per_device_train_batch_size gradient_accumulation_steps num_iterations"
COUNTS += " dynamic_sampling temporal.num_generations rollout.concurrency data.prefetch video.max_frames lora.rank"
LARGE = ["max_completion_length", "max_prompt_length", "rollout.kv_mib", "data.cache_mb", "data.shuffle_mb"]
ABSURD = {
    **dict.fromkeys(COUNTS.split(), 10**9),
    "data.workers": 10**6,
    **dict.fromkeys(LARGE, 10**12),
    **dict.fromkeys(["max_tokens_per_row", "video.max_pixels", "video.image_max_pixels"], 10**15),
    **dict.fromkeys(["seed", "save_steps", "max_steps", "eval_samples"], 10**40),
    **dict.fromkeys(["num_train_epochs", "data.timeout"], 1e300),
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_size_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected at most [\d,.e+]+, got (\d|a number of)"):
        with_value(TrainConfig, name, ABSURD[name])


def test_sizes_that_are_absurd_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_completion_length: expected at most 2,147,483,648 / num_generations"):
        TrainConfig(num_generations=1024, max_completion_length=2**22)
    TrainConfig(num_generations=1024, max_completion_length=131072, max_prompt_length=10**6, rollout_batch_size=4096)


@pytest.mark.grid(folder=["runs/\udcff", "a\0b", "\udce9t\udce9/run"], config_class=list(COMMANDS.values()))
def test_a_folder_that_cannot_hold_a_checkpoint_is_refused(config_class: type, folder: str) -> None:
    with pytest.raises(ConfigError, match="output_dir: expected a folder whose name is UTF-8 text"):
        config_class(output_dir=folder)
    config_class(output_dir="résultats/試験 😀")
