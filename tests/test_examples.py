"""The examples, run as scripts: without network, in a folder of their own."""

import ast
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from forks import ForkServer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CPU_SECONDS = 60  # the docstrings promise 20 on a machine that has nothing else to do


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    modules = ["transformers.models.qwen2.modeling_qwen2", "trl", "datasets"]
    variables = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    server = ForkServer(tmp_path_factory.mktemp("examples") / "log", list(filter(installed, modules)), **variables)
    yield server
    server.close()


def installed(module: str) -> bool:
    return find_spec(module.partition(".")[0]) is not None


@pytest.fixture
def run_example(server: ForkServer, tmp_path: Path) -> Callable[[str], str]:
    """Its output. It may use one thread, no GPU, and no network."""

    def run(name: str) -> str:
        server.start("forks:script", [str(EXAMPLES / name), str(tmp_path), str(CPU_SECONDS)])
        codes, said = server.wait(), server.log.read_text()
        assert codes == [0], said
        assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
        return said

    return run


def found(pattern: str, text: str) -> tuple[float, ...]:
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in\n{text}"
    return tuple(map(float, match.groups()))


def test_plain_loop(run_example: Callable[[str], str]) -> None:
    said = run_example("plain_grpo.py")
    before, after = found(r"reward ([\d.]+) -> ([\d.]+); loss on the backend reference", said)
    assert before < 0.15  # of 16 words one is right
    assert after > 0.5
    tree = ast.parse((EXAMPLES / "plain_grpo.py").read_text(encoding="utf-8"))
    assert 20 < sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) <= 36


def test_shared_prefix_in_transformers(run_example: Callable[[str], str]) -> None:
    said = run_example("transformers_prefix.py")
    assert "attention videor1_prefix on the backend native" in said
    packed, repeated, factor = found(
        r"tokens: (\d+) in one packed row, (\d+) in 7 repeated rows \(([\d.]+) times", said
    )
    assert packed == 120 + 90 + (12 + 30 + 7 + 21) + (9 + 25 + 16)
    assert repeated == 7 * (120 + 30)
    assert factor == pytest.approx(repeated / packed, abs=0.05)
    count, logp, gradient = found(
        r"(\d+) log-probabilities: largest difference (\S+) nats; gradients: (\S+) relative", said
    )
    assert count == 120
    assert logp < 1e-5
    assert gradient < 1e-5


@pytest.mark.skipif(not installed("trl"), reason="TRL is not installed (extra test)")
def test_trl(run_example: Callable[[str], str]) -> None:
    said = run_example("trl_grpo.py")
    before, after = found(r"reward ([\d.]+) -> ([\d.]+) in 16 steps of trl.GRPOTrainer", said)
    assert before < 0.3
    assert after > 0.7
    assert "log-probabilities by videor1_kernels.linear_logprob, backend reference" in said


def test_every_example_is_tested_and_stands_alone() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    paths = sorted(EXAMPLES.glob("*.py"))
    assert len(paths) == 3
    for path in paths:
        assert f'"{path.name}"' in here
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert f"python examples/{path.name}" in (ast.get_docstring(tree) or "")
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not {module.partition(".")[0] for module in modules} & {"tests", "tiny", "videor1"}
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
