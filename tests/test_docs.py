"""The README and the pages of docs/: links, commands, options, paths and code hold, and generated pages are current."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import media
import pages
import pytest
from patience import PATIENCE

from benchmarks import report
from benchmarks.record import RESULTS
from videor1.config.fields import collect_options

ROOT = pages.ROOT
FOLDERS = ("videor1/", "videor1_kernels/", "csrc/", "tests/", "benchmarks/", "examples/", "docs/", ".ci/")
every_page = pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in pages.links(page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if anchor:
            assert anchor in pages.anchors(file.read_text(encoding="utf-8")), link


@every_page
def test_commands_options_and_files_that_are_named_exist(page: Path) -> None:
    known = {"config", "help", "print_config", "plan", "check", "json", "out", "rollouts", "no_local_rank", "write"}
    known |= {"list", "only", "numeric", "random", "full", "tree", "temporal"}  # of tests/ and pytest
    for config, _ in pages.make_options.CONFIGS.values():
        known |= set(collect_options(config))
    text = page.read_text(encoding="utf-8")
    for words in pages.shell_commands(text):
        pages.check_command(words)
    for span in pages.spans(text):
        if re.match(r"python (?:-m \S+|\S+\.py) ", span) and "[" not in span and "..." not in span:
            pages.check_command(span.split())
        if span.startswith("--"):
            assert set(re.findall(r"--([\w.]+)", span)) - {""} <= known, span
        path = span.partition(" ")[0]
        if path.startswith(FOLDERS) and not re.search(r"[<*]", path):
            assert (ROOT / path).exists(), path


def test_python_runs(tmp_path: Path) -> None:
    media.write_video(tmp_path / "kitchen.mp4", media.numbered_frames(24))
    found = [(pages.name(page), pages.blocks(page.read_text(encoding="utf-8"), "python")) for page in pages.PAGES]
    script = """
import json, sys, traceback
for page, blocks in json.load(sys.stdin):
    for number, block in enumerate(blocks, 1):
        try:
            exec(compile(block, f"{page}, block {number}", "exec"), {"__name__": "__main__"})
        except BaseException:
            sys.exit(f"{page}, block {number}: {traceback.format_exc()}")
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, text = [sys.executable, "-c", script], json.dumps(found)
    done = subprocess.run(command, input=text, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, env=env)
    assert done.returncode == 0, done.stderr
    assert any(blocks for _, blocks in found)


def test_a_wrong_page_is_found(tmp_path: Path) -> None:
    wrong = ["nothing", "train --learing_rate 1", "report R --to X", "plan --check --devise cpu"]
    lines = [f"python -m videor1.{words}" for words in wrong]
    lines += ["python docs/none.py", "A=1 python -m benchmarks.steps"]
    lines += ["pytest nowhere", "pytest --slow", "benchmarks/gpu.sh none", "benchmarks/none.sh step"]
    for line in [*lines, "pip install -e '.[none]'"]:
        (words,) = pages.shell_commands(f"```bash\n{line}\n```\n")
        with pytest.raises((AssertionError, ValueError, ModuleNotFoundError, SystemExit)):
            pages.check_command(words)
    text = "# A b, `c`\n\n[x](y.md#z) ![p](q.png) [w](https://w) `[n](m)`\n\n::: a.b\n\n```\n# no\n```\n"
    assert pages.links(text) == ["y.md#z", "q.png"]
    assert pages.anchors(text) == {"a-b-c", "a.b"}


def test_the_option_pages_are_current() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "options").glob("*.md")}
    assert written == pages.make_options.pages(), "not current: run python docs/make_options.py --write"


@pytest.mark.parametrize("command", ["train", "sft", "evaluate"])
def test_an_option_page_holds_every_option_once(command: str) -> None:
    page, config = pages.make_options.pages()[f"{command}.md"], pages.make_options.CONFIGS[command][0]
    found = re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)
    assert sorted(found) == sorted(collect_options(config))
    for section, name in re.findall(r"^## (\w+)\n.*?^\| `([\w.]+)` \|", page, re.MULTILINE | re.DOTALL):
        assert name.startswith(f"{section}.") or (section == "General" and "." not in name)


def test_a_stale_option_page_is_written_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages.make_options, "FOLDER", tmp_path)
    assert pages.make_options.main([]) == 1
    assert pages.make_options.main(["--write"]) == 0
    assert pages.make_options.main([]) == 0
    (tmp_path / "sft.md").write_text("old")
    capsys.readouterr()
    assert pages.make_options.main([]) == 1
    assert capsys.readouterr().out == "not current: docs/options/sft.md\n"


def test_the_page_of_results_is_that_of_the_recorded_runs() -> None:
    text = (ROOT / "docs" / "benchmarks" / "results.md").read_text(encoding="utf-8")
    assert text == report.page(RESULTS), "not current: run python -m benchmarks.report --write"


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="the site needs pip install -e '.[docs]'")
def test_the_site_can_be_built(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "kernels" / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="videor1_kernels.linear_logprob.linear_logprob"' in api
    assert "row position whose hidden state predicts each completion token" in api  # a comment beside a field
    assert not list(tmp_path.rglob("*.py"))
    remote = re.compile(r'<(?:link|script|img)[^>]* (?:href|src)="(https?://[^"]+)"')
    assert not [url for path in tmp_path.rglob("*.html") for url in remote.findall(path.read_text())]
