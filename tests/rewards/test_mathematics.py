"""Mathematics: what is equal, and that a comparison ends, raises nothing and is the same from every thread."""

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from videor1.rewards import accuracy_reward, malformed_reason, mathematics
from videor1.rewards.scoring import solution_reward
from videor1.rewards.solutions import why_unearnable

EQUAL = [
    ("1/2", "0.5"),
    ("\\frac{1}{2}", "$0.5$"),
    ("$$-\\dfrac{3}{2}$$", "-1.5"),
    ("2\\sqrt{3}", "$\\sqrt{12}$"),
    ("x^2+2x+1", "(x+1)^2"),
    ("(1,2)", "(1, 2)"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("1,000", "1000"),
    ("50\\%", "0.5"),
    ("\\boxed{7}", "7"),
    ("no mathematics at all", "no  mathematics at all"),
]
UNEQUAL = [("3", "4"), ("(1,2)", "(2,1)"), ("x^2", "x^3"), ("\\pi", "3.14159"), ("1/3", "0.3333"), ("3", "")]
ENDLESS = ["9^{9^{9^9}}", "(" * 400, "10**10**10", "\\int_0^{10} x^{x^x} dx"]


def earn(output: str, truth: str) -> float:
    return accuracy_reward(f"<answer>{output}</answer>", f"<answer>{truth}</answer>", "math")


def fault(output: str, truth: str) -> str:
    return malformed_reason(f"<answer>{output}</answer>", f"<answer>{truth}</answer>", "math")


def test_what_is_equal() -> None:
    for one, other in EQUAL:
        assert (earn(one, other), earn(other, one)) == (1, 1), (one, other)
        assert (earn(one, one), solution_reward(one, "math")) == (1, 1)
        assert why_unearnable(one, "math") is None
    for truth, output in UNEQUAL:
        assert earn(output, truth) == 0, (truth, output)
    assert (fault("", "3"), fault("€€", "3"), fault("4", "3")) == ("no_answer", "not_math", "")
    for text in ("nan", "NaN", "$-NaN$"):
        assert (earn(text, text), fault(text, text)) == (0, "not_finite")


def test_a_comparison_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "CPU_SECONDS", 1)
    mathematics._compared.cache_clear()
    mathematics._worker.stop()
    for text in ENDLESS:
        began = time.perf_counter()
        assert (earn(text, "3"), fault(text, "3")) == (0, "too_slow"), text
        assert time.perf_counter() - began < 60
        assert earn("1/2", "0.5") == 1  # the next one is compared as ever
    assert fault("1+" * 600 + "1", "601") == "too_slow"
    mathematics._compared.cache_clear()
    mathematics._worker.stop()


def test_threads_and_forks_compare_alike() -> None:
    """Signals would raise in a thread; a fork must not wait for a lock or share a pipe."""
    pairs = [(f"{n}/7", f"{n * 3}/21") for n in range(20)] + [(f"{n}/7", f"{n}/9") for n in range(1, 20)]
    mathematics._compared.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: earn(*pair), pairs))
    assert found == [1.0] * 20 + [0.0] * 19
    mathematics._compared.cache_clear()
    assert threading.main_thread() is threading.current_thread()
    context = multiprocessing.get_context("fork")
    with mathematics._worker._lock:  # another thread of the parent compares while this one forks
        child = context.Process(target=_in_a_fork)
        child.start()
    child.join(100)
    assert child.exitcode == 0
    assert earn("3/7", "9/21") == 1


def _in_a_fork() -> None:
    os._exit(0 if earn("2/7", "6/21") == 1 and earn("2/7", "2/8") == 0 else 1)


def test_hostile_texts_neither_raise_nor_change() -> None:
    texts = [
        "\\frac{1}{0}",
        "$",
        "$$",
        "\\",
        "\x00",
        "\ud800",
        "🙂",
        "{" * 50,
        "__import__('os')",
        "\\frac{}{",
        "nan",
        "oo",
    ]
    texts += ["1\n2", "'", '"', "x=", "=", "\\begin{matrix}", "3" * 1000, "None", "[]", "lambda: 1"]
    before = [(earn(text, "3"), fault(text, "3")) for text in texts]
    assert all(earned == 0 for earned, _ in before)
    mathematics._compared.cache_clear()
    mathematics._worker.stop()  # a process that has compared nothing says the same
    assert [(earn(text, "3"), fault(text, "3")) for text in texts] == before


def test_a_process_that_cannot_start_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from videor1.errors import ConfigError

    mathematics._compared.cache_clear()
    mathematics._worker.stop()
    monkeypatch.setattr(mathematics.sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match="math-verify"):
        earn("1", "2")
    monkeypatch.undo()
    assert earn("1/2", "0.5") == 1
