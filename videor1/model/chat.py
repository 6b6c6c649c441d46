"""How a run puts its questions: its system prompt, and its arguments of the chat template."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import Environment, meta
from jinja2.exceptions import TemplateError

from videor1.errors import ConfigError, did_you_mean
from videor1.model.families import Family
from videor1.model.prompts import RENDER_ERRORS, check_no_special_tokens
from videor1.model.template import opened_text
from videor1.placeholders import placeholders
from videor1.types import Sample, SampleError

# What transformers gives a template itself: the conversation, and functions.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # transformers' own tag, which Jinja does not know


@dataclass(frozen=True)
class Chat:
    """A run's system prompt and arguments of the chat template, which a sample's own take the place of.

    Attributes:
        system: the system prompt; None: the chat template's own, if it has one.
        template_kwargs: arguments of the chat template, such as ``{"enable_thinking": False}``.
    """

    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def check(self, tokenizer: Any, source: str) -> None:
        """Check that the chat template has the arguments, and a place for the system prompt.

        Raises:
            ConfigError: it has not, or the system prompt holds special tokens.
        """
        if self.template_kwargs and (problem := _unknown(tokenizer, self.template_kwargs)):
            raise ConfigError(f"chat_template_kwargs: {problem} (model_name_or_path: {source})")
        if self.system is None:
            return
        if found := placeholders(self.system):
            raise ConfigError(f"system: expected a text without media, which only the data bring, got <{found[0]}>")
        try:
            check_no_special_tokens(tokenizer, Sample(0, "", "", "text", "free-form", ""), self.system)
        except SampleError as error:
            raise ConfigError(f"system: {error.message}") from None
        turns = [{"role": "system", "content": self.system}, {"role": "user", "content": "?"}]
        try:
            rendered = tokenizer.apply_chat_template(turns, tokenize=False, **self.template_kwargs)
        except RENDER_ERRORS as error:
            raise ConfigError(
                f"system: the chat template of {source} cannot render a system prompt: {type(error).__name__}: {error}"
            ) from error
        if self.system.strip() not in rendered:
            raise ConfigError(f"system: the chat template of {source} leaves out or changes a system prompt")

    def asked(self, sample: Sample, tokenizer: Any, source: str, family: Family, opened: str) -> Sample:
        """Return a sample as the run asks it, see ``VideoLM.asked``."""
        own = sample.chat_template_kwargs
        if own:
            self._check_own(sample, tokenizer, source, family, opened)
        system = self.system if sample.system is None else sample.system
        if system == sample.system and not self.template_kwargs:
            return sample
        return replace(sample, system=system, chat_template_kwargs={**self.template_kwargs, **own})

    def _check_own(self, sample: Sample, tokenizer: Any, source: str, family: Family, opened: str) -> None:
        """Check a sample's own arguments. Raises SampleError ``chat_template_kwargs``."""

        def fail(reason: str) -> SampleError:
            message = f"problem {sample.problem_id}: chat_template_kwargs: {reason}"
            return SampleError("chat_template_kwargs", message, sample.path)

        own = sample.chat_template_kwargs
        if problem := _unknown(tokenizer, own):
            raise fail(problem)
        try:
            ours = _opened(tokenizer, source, family, json.dumps({**self.template_kwargs, **own}, sort_keys=True))
        except (ConfigError, TypeError, ValueError) as error:
            raise fail(str(error)) from None
        if ours != opened:
            raise fail(f"with them the chat template opens an answer with {ours!r}, in this run with {opened!r}")


@functools.lru_cache(maxsize=256)
def _opened(tokenizer: Any, source: str, family: Family, template_kwargs: str) -> str:
    return opened_text(tokenizer, source, family, json.loads(template_kwargs))


def _unknown(tokenizer: Any, given: Iterable[str]) -> str:
    """Say which arguments a chat template does not have; "" where it has all."""
    template = tokenizer.get_chat_template()
    taken = (
        _GIVEN | set(inspect.signature(tokenizer.apply_chat_template).parameters) | set(tokenizer.special_tokens_map)
    )
    known = _variables(template) - taken
    for name in given:
        if name in taken:
            return f"{name!r} is not an argument of the chat template alone: it cannot be set"
        if name not in known:
            has = f"it has {sorted(known)}" if known else "it has none"
            return f"the chat template has no argument {name!r}{did_you_mean(name, known)}; {has}"
    return ""


@functools.lru_cache(maxsize=16)
def _variables(template: str) -> frozenset[str]:
    """Return the names that a chat template reads and does not set itself."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
    try:
        parsed = environment.parse(_GENERATION.sub("", template))
    except TemplateError:  # with a tag that only transformers knows: every name in it may be an argument
        return frozenset(re.findall(r"[A-Za-z_]\w*", template))
    return frozenset(meta.find_undeclared_variables(parsed)) - set(environment.globals)


PLAIN_CHAT = Chat()
