"""The readers on small files in each benchmark's published format."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from suite_files import WRITERS, write_json, write_parquet

from videor1.config import VideoConfig
from videor1.data import load_samples
from videor1.demo.assets import Assets
from videor1.errors import ConfigError, DataError
from videor1.evaluation.suites import SUITES, Loaded, from_dataset, load_suite
from videor1.evaluation.suites.base import BadRowError, lettered
from videor1.evaluation.suites.mvbench import TASKS
from videor1.types import Media
from videor1.video.media import load_media

VIDEO = VideoConfig(max_frames=8, max_pixels=56 * 56, min_pixels=56 * 56)
LEFT_OUT = "a language model would have to judge the answers"
One = Callable[[str], Path]


@pytest.fixture
def one(tmp_path: Path, benchmarks: Path) -> One:
    """Copies one benchmark alone, to be damaged; gives its folder."""
    return lambda name: Path(shutil.copytree(benchmarks / name, tmp_path / name))


def answer(text: str) -> str:
    return f"<think>so</think><answer>{text}</answer>"


def scores(loaded: Loaded, text: str) -> list[float]:
    return [question.score(answer(text)) for question in loaded.questions]


def rows_of(file: Path) -> list[dict[str, Any]]:
    text = file.read_text()
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)


def kinds(loaded: Loaded) -> list[str]:
    return [error.kind for error in loaded.errors]


@pytest.mark.parametrize("name", WRITERS)
def test_every_question_is_asked_about_a_video_that_decodes(benchmarks: Path, name: str) -> None:
    loaded = load_suite(name, benchmarks)
    assert (loaded.name, loaded.errors, loaded.missing) == (name, [], 0)
    indices = [question.sample.index for question in loaded.questions]
    assert indices == sorted(set(indices))
    assert len({tuple(question.categories) for question in loaded.questions}) == 1
    for question in loaded.questions:
        media = load_media(question.sample, VIDEO)
        assert isinstance(media, Media)
        assert media.kind == "video"
        # The solution is what its own rule calls right, and nothing else is.
        assert question.score(answer(question.sample.solution[8:-9])) == 1.0
        assert question.score("no tags") == question.score(answer("none of it")) == 0.0
        letters = "".join(option[0] for option in question.sample.options)
        assert "ABCDEFGHIJ".startswith(letters)
        assert sum(question.score(answer(letter)) for letter in letters) == bool(letters)


def test_vsibench(benchmarks: Path) -> None:
    loaded = load_suite("vsibench", benchmarks)
    assert [q.sample.problem_type for q in loaded.questions] == ["regression", *3 * ["multiple choice"], "regression"]
    folders = [q.sample.path.parent.name for q in loaded.questions if q.sample.path]
    assert folders == 2 * ["scannet"] + 3 * ["arkitscenes"]
    # |3 - 4| / 4 = 0.25: right at 0.5, 0.55, ..., 0.75
    assert (scores(loaded, "4")[0], scores(loaded, "3")[0]) == (1.0, pytest.approx(0.6))
    assert {q.categories["question_type"] for q in loaded.questions} >= {"object_counting", "route_planning"}
    assert set(loaded.overall.groups) == {f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")}


def test_vsibench_with_bad_rows_and_of_other_releases(one: One) -> None:
    folder = one("vsibench")
    rows = rows_of(folder / "test.jsonl")
    number, row = rows[0], rows[1]
    bad = [
        (row | {"question_type": "object_rel_directions"}, "problem_type"),
        (row | {"ground_truth": "D"}, "options"),
        (row | {"options": None}, "options"),
        ({k: v for k, v in row.items() if k != "question"}, "missing_field"),
        (row | {"question": 3}, "wrong_type"),
        (row | {"scene_name": "../../../etc/x"}, "outside_root"),
        (number | {"ground_truth": "many"}, "wrong_type"),
        (number | {"question": "How \ud83d?"}, "bad_text"),
        (row | {"options": ["A. left", "B. \ud83d", "C. back"]}, "bad_text"),
        (number | {"id": "\ud83d"}, "bad_text"),
        (number | {"question_type": "\ud83d"}, "problem_type"),
        (number | {"scene_name": "\ud83d"}, "bad_path"),
        (number | {"ground_truth": "nan"}, "solution"),
        (number | {"ground_truth": "inf"}, "solution"),
        (number | {"ground_truth": "\ud83d"}, "wrong_type"),
        ("{not json", "bad_json"),
    ]
    given = [row, *(one for one, _ in bad), number]
    (folder / "test.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in given))
    loaded = load_suite("vsibench", folder.parent)
    assert [question.sample.index for question in loaded.questions] == [0, len(bad) + 1]
    assert kinds(loaded) == [kind for _, kind in bad]
    assert "line 2" in loaded.errors[0].message
    assert str(loaded.errors[0].path).endswith("test.jsonl")
    # Other releases.
    (folder / "test.jsonl").unlink()
    for files in (["test-00000-of-00001"], ["test_debiased", "test_pruned"]):
        for i, name in enumerate(files):
            write_parquet(folder / f"{name}.parquet", rows[i :: len(files)])
        loaded = load_suite("vsibench", folder.parent)
        assert (len(loaded.questions), loaded.errors) == (5, [])
        for name in files:
            (folder / f"{name}.parquet").unlink()


def test_videommmu(benchmarks: Path) -> None:
    loaded = load_suite("videommmu", benchmarks)
    perception, comprehension, choice, opened = loaded.questions
    tracks = ["Perception", "Comprehension", "Adaptation", "Adaptation"]
    assert [q.categories["track"] for q in loaded.questions] == tracks
    assert [q.categories["discipline"] for q in loaded.questions] == ["Art", "Business", "Business", "Science"]
    assert perception.sample.options == ("A. gothic", "B. baroque")  # lettered already
    assert comprehension.sample.options == ("A. $6", "B. $7")
    assert "end of the video" in choice.sample.problem
    assert choice.sample.problem.startswith("Learn from the video")
    assert perception.sample.problem.endswith("Ignore the quiz at the end of the video.")
    assert (opened.sample.problem_type, opened.sample.options) == ("free-form", ())
    assert [opened.score(answer(text)) for text in ("12.5", "it is 12.5 metres", "12.51", "125")] == [1, 1, 0, 0]
    assert "__MACOSX" not in str(comprehension.sample.path)


def test_mvbench(one: One, benchmarks: Path) -> None:
    loaded = load_suite("mvbench", benchmarks)
    assert [question.categories["task"] for question in loaded.questions] == list(TASKS)
    by_task = {question.categories["task"]: question.sample for question in loaded.questions}
    assert {sample.solution for sample in by_task.values()} == {"<answer>B</answer>"}
    assert {sample.options for sample in by_task.values()} == {("A. red", "B. blue", "C. green")}
    clipped = {task for task, sample in by_task.items() if (sample.start, sample.end) == (0.5, 1.25)}
    actions = {f"action_{name}" for name in ("sequence", "prediction", "localization")}
    assert clipped == actions | {"object_interaction", "episodic_reasoning"}
    assert {by_task[task].start for task in by_task.keys() - clipped} == {None}
    assert "data0613/star" in str(by_task["object_interaction"].path)
    rates = {task: sample.frames_per_second for task, sample in by_task.items() if sample.frames_per_second}
    assert rates == {"episodic_reasoning": 3.0}
    for text, score in (("blue", 1.0), ("B. blue", 1.0), ("A. red", 0.0)):  # also the option's text alone
        assert scores(loaded, text) == 20 * [score]
    for given, expected in (  # options are lettered once
        (["red", "blue"], ["A. red", "B. blue"]),
        (["A. red", "B. blue"], ["A. red", "B. blue"]),
        (["A) red", "B) blue"], ["A) red", "B) blue"]),
        (["A. Lincoln", "G. Washington"], ["A. A. Lincoln", "B. G. Washington"]),
    ):
        assert lettered(given) == expected
    with pytest.raises(BadRowError):
        lettered(["x"] * 27)
    # An answer that is no candidate is refused, and so are windows.
    folder = one("mvbench")
    file = folder / "json" / "action_sequence.json"
    (row,) = rows_of(file)
    write_json(file, [row | {"answer": "black"}, row | {"start": 5.0, "end": 4.0}, row | {"end": None}])
    loaded = load_suite("mvbench", folder.parent)
    assert (kinds(loaded), len(loaded.questions)) == (["options", "window", "wrong_type"], 19)
    (folder / "json" / "state_change.json").unlink()
    with pytest.raises(DataError, match=r"no json/state_change\.json"):
        load_suite("mvbench", folder.parent)


def test_tempcompass(one: One) -> None:
    folder = one("tempcompass")
    loaded = load_suite("tempcompass", folder.parent)
    choice, yes_no, captions = loaded.questions
    assert choice.sample.problem == "Where does he go?"
    assert choice.sample.options == ("A. to the left", "B. to the right")
    assert yes_no.sample.problem == "Does he go left?\nAnswer yes or no."
    texts = ("No", "no, he goes right", "Yes", "not sure", "")
    assert [yes_no.score(answer(text)) for text in texts] == [1, 1, 0, 0, 0]
    assert captions.sample.problem == "Which caption fits?"
    assert captions.sample.options == ("A. He goes left.", "B. He goes right.")
    assert [captions.score(answer(text)) for text in ("B", "He goes right.", "A", "He goes left.")] == [1, 1, 0, 0]
    assert dict(loaded.left_out) == {f"captioning: {LEFT_OUT}": 2}
    assert {question.categories["aspect"] for question in loaded.questions} == {"direction"}
    shutil.rmtree(folder / "captioning")
    assert not load_suite("tempcompass", folder.parent).left_out


def test_videomme(one: One, tmp_path: Path) -> None:
    folder = one("videomme")
    loaded = load_suite("videomme", folder.parent)
    assert (len(loaded.questions), len({question.sample.path for question in loaded.questions})) == (6, 2)
    assert [q.categories["duration"] for q in loaded.questions] == 3 * ["short"] + 3 * ["long"]
    assert list(loaded.questions[0].categories) == ["duration", "domain", "task_type", "sub_category"]
    assert loaded.questions[0].sample.options[2] == "C. three"
    assert scores(loaded, "C")[:3] == [1.0, 0.0, 0.0]
    # Some missing videos are counted, and a folder named as the repository serves too.
    (folder / "data" / "mKjv93ACGo9.mkv").unlink()
    folder.rename(tmp_path / "Video-MME")
    loaded = load_suite("Video-MME", tmp_path)
    assert (len(loaded.questions), loaded.missing) == (6, 3)


def test_mmvu(one: One) -> None:
    folder = one("mmvu")
    loaded = load_suite("mmvu", folder.parent)
    (question,) = loaded.questions
    assert question.sample.options == ("A. heap sort", "B. quick sort", "C. merge sort")  # empty ones are none
    assert question.categories == {"discipline": "Engineering", "subject": "Computer Science"}
    assert dict(loaded.left_out) == {f"open-ended: {LEFT_OUT}": 1}
    # A category that is no text is counted; a file of nothing that can be asked says why.
    file = folder / "validation.json"
    rows = rows_of(file)
    write_json(file, [rows[0] | {"video": rows[0]["video"].replace("/videos/", "/videos/\ud83d_")}, *rows])
    assert kinds(load_suite("mmvu", folder.parent)) == ["bad_text"]
    nothing = json.dumps([rows[1], {"id": 3}]), r"none of its rows.*missing_field.*open-ended"
    for content, message in (nothing, ("{}", "expected a JSON list"), ("[", "expected a JSON list")):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            load_suite("mmvu", folder.parent)


@pytest.mark.parametrize("name", WRITERS)
def test_missing_data_tell_how_to_get_them(one: One, tmp_path: Path, name: str) -> None:
    suite, elsewhere = SUITES[name], tmp_path / "elsewhere"
    (elsewhere / "something").mkdir(parents=True)
    command = f"hf download {suite.repository} --repo-type dataset --local-dir {elsewhere / name}"
    with pytest.raises(DataError) as caught:
        load_suite(name, elsewhere)
    told = [command, suite.card, "something", *(str(elsewhere / name / line) for line in suite.layout.splitlines())]
    assert [words for words in told if words not in str(caught.value)] == []
    (elsewhere / name).mkdir()
    with pytest.raises(DataError, match=f"{name}: no .*found: nothing") as caught:
        load_suite(name, elsewhere)
    assert command in str(caught.value)
    for given, near in ((name[:3] + name[4:], name), ("video_mmmmu", "videommmu"), ("vsi", "vsibench")):
        with pytest.raises(ConfigError, match=rf"got '{given}'; did you mean '{near}'\?"):
            load_suite(given, tmp_path)
    # Archives that were not unpacked.
    folder = one(name)
    for path in folder.rglob("*"):
        if path.suffix in (".mp4", ".mkv", ".webm", ".jpg"):
            path.unlink()
    shutil.rmtree(folder / "video", ignore_errors=True)
    with pytest.raises(DataError, match="none of its videos is there") as caught:
        load_suite(name, folder.parent)
    assert suite.unpack in str(caught.value)
    # The reader itself names where the data come from, and what is left out.
    text = Path(__file__).parents[3].joinpath("videor1", "evaluation", "suites", f"{name}.py").read_text("utf-8")
    assert suite.card in text
    assert re.search(r"left out|Left\s+out", text)


def test_parquet_that_is_none_or_not_utf8(one: One) -> None:
    folder = one("videomme")
    (file,) = folder.glob("**/*.parquet")
    table = parquet.read_table(file)
    texts = [text.encode() for text in table.column("question").to_pylist()]
    # Arrow does not check that a row is UTF-8.
    made = pyarrow.array([b"\xff" + texts[0], *texts[1:]], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(table.set_column(table.schema.get_field_index("question"), "question", made), file)
    loaded = load_suite("videomme", folder.parent)
    assert (kinds(loaded), len(loaded.questions)) == (["bad_json"], len(texts) - 1)
    assert "utf-8" in loaded.errors[0].message
    file.write_bytes(b"an error page")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_suite("videomme", folder.parent)


def test_a_data_file_is_a_benchmark_too(assets: Assets) -> None:
    dataset = load_samples(assets.dev)
    loaded = from_dataset(dataset)
    assert (loaded.name, [question.sample for question in loaded.questions]) == ("dev", dataset.samples)
    assert all(question.score(answer(question.sample.solution[8:-9])) > 0.6 for question in loaded.questions)
    choice = next(q for q in loaded.questions if q.sample.problem_type == "multiple choice")
    letter = choice.sample.solution[8:-9]
    assert choice.score(answer(f"{letter}.")) == 0.0  # the trainer's own strict rule
    assert from_dataset(dataset, lenient=True).questions[choice.sample.index].score(answer(f"{letter}.")) == 1.0


def test_a_data_files_solutions_are_checked_by_the_scores_of_an_evaluation(tmp_path: Path) -> None:
    """Regression is scored by mean relative accuracy."""
    given = {
        "regression": ("0", "12 cm", "$12", "nan", "1,000", "4", "four"),
        "numerical": ("12 cm", "7"),
        "free-form": ("赤い車", "a car"),
    }
    cases = [(kind, solution) for kind, solutions in given.items() for solution in solutions]
    entry = {"problem": "How far?", "data_type": "text"}
    rows = [entry | {"problem_type": kind, "solution": f"<answer>{text}</answer>"} for kind, text in cases]
    write_json(tmp_path / "r.json", rows)
    dataset = load_samples(tmp_path / "r.json", reward=None)
    for lenient, left in ((False, {0, 4, 5, 8, 10}), (True, {0, 1, 2, 4, 5, 7, 8, 9, 10})):
        loaded = from_dataset(dataset, lenient=lenient)
        assert {question.sample.index for question in loaded.questions} == left
        assert kinds(loaded) == ["solution"] * (len(cases) - len(left))
        assert all(question.score(question.sample.solution) > 0.1 for question in loaded.questions)
        by_index = {question.sample.index: question.score for question in loaded.questions}
        assert [by_index[i](answer(text)) for i, text in ((4, "1000"), (5, "3"))] == [1, 0.6]
        assert loaded.overall.text == "mean over all questions (regression: mean relative accuracy)"
    assert any("problem 6" in error.message for error in loaded.errors)
    texts = ("12", "12 cm", "12 centimeters", "$\\frac{24}{2}$", "12 m")
    assert [by_index[1](answer(text)) for text in texts] == [1, 1, 1, 1, 0]
