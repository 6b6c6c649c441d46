"""Ranges of options: every number has one or is known to need none, and the range shown is the one that is checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, get_args

import pytest

from videor1.config import EvaluateConfig, SFTConfig, TrainConfig, VideoConfig
from videor1.config.fields import COMMANDS, Option, collect_options
from videor1.config.ranges import Range, above, at_least, check_values, field_ranges
from videor1.errors import ConfigError

# Numbers of which every finite value means something; length_range's two ends are held to each other.
ANY_VALUE = {
    "seed",
    "lora.alpha",
    "reward.correct_above",
    "reward.format_weight",
    "reward.length_bonus",
    "reward.length_range",
}


def is_number(option: Option) -> bool:
    return not {int, float}.isdisjoint((option.type, *get_args(option.type)))


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
    return config_class(**{section: replace(getattr(config_class(), section), **changed)} if section else changed)


@pytest.mark.parametrize("config_class", COMMANDS.values())
def test_every_number_has_a_range_or_takes_any_value(config_class: type) -> None:
    options = collect_options(config_class)
    numbers = {name for name, option in options.items() if is_number(option)}
    assert numbers >= ANY_VALUE
    assert {name for name, option in options.items() if option.range} == numbers - ANY_VALUE


@pytest.mark.parametrize("config_class", COMMANDS.values())
def test_a_value_beyond_the_end_of_its_range_is_refused(config_class: type) -> None:
    for option in collect_options(config_class).values():
        if option.range is None:
            continue
        held, refused = ends(option)
        assert all(value in option.range for value in held), option.name
        for value in refused:
            with pytest.raises(ConfigError) as error:
                with_value(config_class, option.name, value)
            assert str(error.value) == f"{option.name}: expected {option.range.words}, got {value!r}"


def test_words() -> None:
    assert [at_least(0).words, at_least(3).words, above(0).words] == ["0 or more", "at least 3", "above 0"]
    assert [at_least(0, "0 (off) or more").words, above(0, "more than none").words] == [
        "0 (off) or more",
        "more than none",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_range_holds_what_is_not_finite(value: float) -> None:
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
    with pytest.raises(ConfigError, match=r"^section\.size: expected at least 1, got 0$"):
        check_values(Config(section=Section(size=0)))
    with pytest.raises(ConfigError, match=r"^section\.free: expected a finite number, got nan$"):
        check_values(Config(section=Section(free=math.nan)))
    with pytest.raises(ConfigError, match=r"^rate: expected above 0, got 0\.0$"):
        check_values(Config(rate=0.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TrainConfig(max_tokens_per_row=768),
            "max_tokens_per_row: expected more than max_completion_length (768), or null for no bound, got 768",
        ),
        (
            lambda: SFTConfig(video=VideoConfig(min_pixels=200_000)),
            "video.min_pixels: expected at least 1 and at most video.max_pixels (100352), got 200000",
        ),
        (
            lambda: SFTConfig(video=VideoConfig(image_max_pixels=3135)),
            "video.image_min_pixels: expected at least 1 and at most video.image_max_pixels (3135), got 3136",
        ),
        (
            lambda: with_value(TrainConfig, "reward.length_range", (3, 2)),
            "reward.length_range: expected (low, high) with low <= high, got (3, 2)",
        ),
        (
            lambda: EvaluateConfig(eval_top_p=0.9),
            "eval_top_p: expected 1, or eval_temperature above 0 (0 is greedy: every answer is the same), got 0.9",
        ),
    ],
)
def test_what_two_options_ask_of_each_other(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert str(refused.value) == message


ABSURD = {
    "num_generations": 10**9,
    "max_completion_length": 10**12,
    "max_prompt_length": 10**12,
    "rollout_batch_size": 10**9,
    "per_device_train_batch_size": 10**9,
    "gradient_accumulation_steps": 10**9,
    "num_iterations": 10**9,
    "dynamic_sampling": 10**9,
    "max_tokens_per_row": 10**15,
    "num_train_epochs": 1e300,
    "seed": 10**40,
    "save_steps": 10**40,
    "max_steps": 10**40,
    "eval_samples": 10**40,
    "temporal.num_generations": 10**9,
    "rollout.kv_mib": 10**12,
    "rollout.concurrency": 10**9,
    "data.workers": 10**6,
    "data.prefetch": 10**9,
    "data.cache_mb": 10**12,
    "data.shuffle_mb": 10**12,
    "data.timeout": 1e300,
    "video.max_frames": 10**9,
    "video.max_pixels": 10**15,
    "video.image_max_pixels": 10**15,
    "lora.rank": 10**9,
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_size_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected at most [\d,.e+]+, got (\d|a number of)"):
        with_value(TrainConfig, name, ABSURD[name])


def test_sizes_that_are_absurd_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_completion_length: expected at most 2,147,483,648 / num_generations"):
        TrainConfig(num_generations=1024, max_completion_length=2**22)


def test_large_sizes_that_can_be_meant_are_not_refused() -> None:
    TrainConfig(num_generations=1024, max_completion_length=131072, max_prompt_length=10**6, rollout_batch_size=4096)


@pytest.mark.parametrize("folder", ["runs/\udcff", "a\0b", "\udce9t\udce9/run"])
@pytest.mark.parametrize("config_class", COMMANDS.values())
def test_a_folder_that_cannot_hold_a_checkpoint_is_refused(config_class: type, folder: str) -> None:
    with pytest.raises(ConfigError, match="output_dir: expected a folder whose name is UTF-8 text"):
        config_class(output_dir=folder)
    config_class(output_dir="résultats/試験 😀")
