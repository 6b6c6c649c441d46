"""YAML files of options, and the shipped recipes: found by name, read into checked values."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from videor1.config.fields import SHORTHANDS, Option, type_error, unknown_option
from videor1.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "configs"


def flat_tree(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What a YAML file of options holds, by dotted names; unchecked."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat_tree(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def find_config(name: str, options: dict[str, Option]) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    recipe = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if Path(name).name == name and recipe.is_file():
        return recipe
    reason = "it is a folder" if path.is_dir() else "no such file"
    recipes = recipe_names(options)
    names = f" or a recipe's name ({', '.join(recipes)})" if recipes else ""
    raise ConfigError(f"--config {name}: {reason}; give a YAML file{names}")


def recipe_of(compat: str) -> Path:
    """The shipped file that a value of ``compat`` stands for."""
    return RECIPES / f"{compat.replace('-', '_')}.yaml"


def recipe_names(options: Iterable[str]) -> list[str]:
    """Names of the shipped files that hold nothing but these options."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if _recipe_options(path) <= set(options))


@functools.cache
def _recipe_options(path: Path) -> set[str]:
    return {name for name, _ in flat_tree(yaml.safe_load(path.read_text(encoding="utf-8")))}


def read_yaml(path: Path, parser: ArgumentParser, options: dict[str, Option]) -> dict[str, Any]:
    """A YAML file as checked values by dotted option name."""
    values: dict[str, Any] = {}
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None or _is_null(root):
        return values
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected options as name: value lines, got {_source(loader, root)!r:.60}")
    sections = {option.section for option in options.values()} - {""}
    for name, node in _leaves(loader, root, "", sections):
        where = f"{path}:{node.start_mark.line + 1}"
        name = SHORTHANDS[name] if SHORTHANDS.get(name) in options else name
        if name in sections:
            raise ConfigError(f"{where}: {name}: expected a mapping of its options, got {_source(loader, node)}")
        if name not in options:
            raise ConfigError(f"{where}: {unknown_option(name, options)}")
        if name in values:
            raise ConfigError(f"{where}: {name} is given twice")
        try:
            values[name] = _yaml_value(loader, node, options[name], parser)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return values


def _leaves(
    loader: yaml.SafeLoader, mapping: yaml.MappingNode, prefix: str, sections: set[str]
) -> Iterator[tuple[str, yaml.Node]]:
    loader.flatten_mapping(mapping)  # YAML's << merge keys
    for key, value in mapping.value:
        name = prefix + str(key.value)
        if name in sections and isinstance(value, yaml.MappingNode):
            yield from _leaves(loader, value, f"{name}.", sections)
        elif not (name in sections and _is_null(value)):  # "data:" with every line under it commented out
            yield name, value


def _yaml_value(loader: yaml.SafeLoader, node: yaml.Node, option: Option, parser: ArgumentParser) -> Any:
    if _is_null(node):
        if not option.nullable:
            raise ConfigError(type_error(option, "null"))
        return None
    if isinstance(node, yaml.ScalarNode) and option.takes_text and not option.choices:
        return node.value  # as written: run_name: 2024 is text
    value = node.value if isinstance(node, yaml.ScalarNode) and option.choices else _construct(loader, node)
    if isinstance(node, yaml.ScalarNode) and option.is_list:
        value = [part.strip() for part in node.value.split(",") if part.strip()]
    try:
        return parser.parse_object({option.name: value}, defaults=False)[option.name]
    except argparse.ArgumentError:
        raise ConfigError(type_error(option, _source(loader, node))) from None


def _construct(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {getattr(error, 'problem', None) or error}") from None


def _source(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else str(_construct(loader, node))


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"
