"""The readers on small files in each benchmark's published format, and the scoring rules at their borders."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from suite_files import WRITERS, Clips, write_json, write_parquet

from videor1.config import VideoConfig
from videor1.data import load_samples
from videor1.errors import ConfigError, DataError
from videor1.evaluation.suites import SUITES, Loaded, from_dataset, load_suite
from videor1.evaluation.suites.base import BadRowError, lettered
from videor1.evaluation.suites.mvbench import TASKS
from videor1.evaluation.suites.scoring import score_choice, score_mra, score_open, score_yes_no
from videor1.types import Media
from videor1.video.media import load_media

VIDEO = VideoConfig(max_frames=8, max_pixels=56 * 56, min_pixels=56 * 56)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    return Clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, clips: Clips) -> Path:
    """All six; read only."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for write in WRITERS.values():
        write(folder, clips)
    return folder


@pytest.fixture
def one(tmp_path: Path, clips: Clips):
    """Writes one benchmark alone, to be damaged; gives its folder."""

    def make(name: str) -> Path:
        WRITERS[name](tmp_path, clips)
        return tmp_path / name

    return make


def answer(text: str) -> str:
    return f"<think>so</think><answer>{text}</answer>"


def scores(loaded: Loaded, text: str) -> list[float]:
    return [question.score(answer(text)) for question in loaded.questions]


@pytest.mark.parametrize("name", WRITERS)
def test_every_question_is_asked_about_a_video_that_decodes(root: Path, name: str) -> None:
    loaded = load_suite(name, root)
    assert loaded.name == name
    assert not loaded.errors
    assert loaded.missing == 0
    indices = [question.sample.index for question in loaded.questions]
    assert indices == sorted(set(indices))
    axes = {tuple(question.categories) for question in loaded.questions}
    assert len(axes) == 1
    for question in loaded.questions:
        media = load_media(question.sample, VIDEO)
        assert isinstance(media, Media)
        assert media.kind == "video"
        # The solution is what its own rule calls right, and nothing else is.
        assert question.score(answer(question.sample.solution[8:-9])) == 1.0
        assert question.score("no tags") == question.score(answer("none of it")) == 0.0
        if question.sample.options:
            letters = {option[0] for option in question.sample.options}
            assert sorted(letters) == [chr(ord("A") + i) for i in range(len(letters))]
            assert sum(question.score(answer(letter)) for letter in letters) == 1.0


def test_vsibench(root: Path) -> None:
    loaded = load_suite("vsibench", root)
    assert [q.sample.problem_type for q in loaded.questions] == ["regression", *3 * ["multiple choice"], "regression"]
    folders = [q.sample.path.parent.name for q in loaded.questions if q.sample.path]
    assert folders == 2 * ["scannet"] + 3 * ["arkitscenes"]
    assert scores(loaded, "4")[0] == 1.0
    assert scores(loaded, "3")[0] == pytest.approx(0.6)  # |3 - 4| / 4 = 0.25: right at 0.5, 0.55, ..., 0.75
    assert {q.categories["question_type"] for q in loaded.questions} >= {"object_counting", "route_planning"}
    assert set(loaded.overall.groups) == {f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")}


@pytest.mark.parametrize("files", [["test-00000-of-00001"], ["test_debiased", "test_pruned"]])
def test_vsibench_of_other_releases(one, files: list[str]) -> None:
    folder = one("vsibench")
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    (folder / "test.jsonl").unlink()
    for i, name in enumerate(files):
        write_parquet(folder / f"{name}.parquet", rows[i :: len(files)])
    loaded = load_suite("vsibench", folder.parent)
    assert len(loaded.questions) == 5
    assert not loaded.errors


def test_vsibench_says_what_is_wrong_with_a_row(one) -> None:
    folder = one("vsibench")
    row = json.loads((folder / "test.jsonl").read_text().splitlines()[1])
    bad = [
        row | {"question_type": "object_rel_directions"},
        row | {"ground_truth": "D"},
        row | {"options": None},
        {k: v for k, v in row.items() if k != "question"},
        row | {"question": 3},
        row | {"scene_name": "../../../etc/x"},
        row | {"question_type": "object_counting", "ground_truth": "many"},
    ]
    lines = [json.dumps(entry) for entry in [row, *bad]]
    (folder / "test.jsonl").write_text("\n".join([*lines, "{not json"]))
    loaded = load_suite("vsibench", folder.parent)
    assert [question.sample.index for question in loaded.questions] == [0]
    kinds = ["problem_type", "options", "options", "missing_field", "wrong_type", "outside_root", "wrong_type"]
    assert [error.kind for error in loaded.errors] == [*kinds, "bad_json"]
    assert "line 2" in loaded.errors[0].message
    assert str(loaded.errors[0].path).endswith("test.jsonl")


def test_videommmu(root: Path) -> None:
    loaded = load_suite("videommmu", root)
    tracks = [question.categories["track"] for question in loaded.questions]
    assert tracks == ["Perception", "Comprehension", "Adaptation", "Adaptation"]
    assert [q.categories["discipline"] for q in loaded.questions] == ["Art", "Business", "Business", "Science"]
    perception, comprehension, choice, opened = loaded.questions
    assert perception.sample.options == ("A. gothic", "B. baroque")  # lettered already
    assert comprehension.sample.options == ("A. $6", "B. $7")
    assert "end of the video" in choice.sample.problem
    assert choice.sample.problem.startswith("Learn from the video")
    assert perception.sample.problem.endswith("Ignore the quiz at the end of the video.")
    assert (opened.sample.problem_type, opened.sample.options) == ("free-form", ())
    assert [opened.score(answer(text)) for text in ("12.5", "it is 12.5 metres", "12.51", "125")] == [1, 1, 0, 0]
    assert perception.sample.path
    assert "__MACOSX" not in str(perception.sample.path)


def test_mvbench(root: Path) -> None:
    loaded = load_suite("mvbench", root)
    assert [question.categories["task"] for question in loaded.questions] == list(TASKS)
    by_task = {question.categories["task"]: question.sample for question in loaded.questions}
    assert all(sample.solution == "<answer>B</answer>" for sample in by_task.values())
    assert all(sample.options == ("A. red", "B. blue", "C. green") for sample in by_task.values())
    clipped = {task for task, sample in by_task.items() if sample.start is not None}
    assert clipped == {
        "action_sequence",
        "action_prediction",
        "object_interaction",
        "action_localization",
        "episodic_reasoning",
    }
    assert (by_task["action_sequence"].start, by_task["action_sequence"].end) == (0.5, 1.25)
    assert by_task["object_interaction"].path
    assert "data0613/star" in str(by_task["object_interaction"].path)
    episodic = by_task["episodic_reasoning"]
    assert episodic.frames_per_second == 3.0
    assert {sample.frames_per_second for task, sample in by_task.items() if sample is not episodic} == {None}
    assert scores(loaded, "blue") == 20 * [1.0]  # the option's text alone
    assert scores(loaded, "B. blue") == 20 * [1.0]
    assert scores(loaded, "A. red") == 20 * [0.0]


def test_mvbench_refuses_an_answer_that_is_no_candidate(one) -> None:
    folder = one("mvbench")
    file = folder / "json" / "action_sequence.json"
    (row,) = json.loads(file.read_text())
    write_json(file, [row | {"answer": "black"}, row | {"start": 5.0, "end": 4.0}, row | {"end": None}])
    loaded = load_suite("mvbench", folder.parent)
    assert [error.kind for error in loaded.errors] == ["options", "window", "wrong_type"]
    assert len(loaded.questions) == 19
    (folder / "json" / "state_change.json").unlink()
    with pytest.raises(DataError, match=r"no json/state_change\.json"):
        load_suite("mvbench", folder.parent)


def test_tempcompass(root: Path) -> None:
    loaded = load_suite("tempcompass", root)
    choice, yes_no, captions = loaded.questions
    assert choice.sample.problem == "Where does he go?"
    assert choice.sample.options == ("A. to the left", "B. to the right")
    assert yes_no.sample.problem == "Does he go left?\nAnswer yes or no."
    texts = ("No", "no, he goes right", "Yes", "not sure", "")
    assert [yes_no.score(answer(text)) for text in texts] == [1, 1, 0, 0, 0]
    assert captions.sample.problem == "Which caption fits?"
    assert captions.sample.options == ("A. He goes left.", "B. He goes right.")
    assert [captions.score(answer(text)) for text in ("B", "He goes right.", "A", "He goes left.")] == [1, 1, 0, 0]
    assert dict(loaded.left_out) == {"captioning: a language model would have to judge the answers": 2}
    assert {question.categories["aspect"] for question in loaded.questions} == {"direction"}


def test_tempcompass_without_the_captioning_files(one) -> None:
    folder = one("tempcompass")
    shutil.rmtree(folder / "captioning")
    assert not load_suite("tempcompass", folder.parent).left_out


def test_videomme(root: Path) -> None:
    loaded = load_suite("videomme", root)
    assert len(loaded.questions) == 6
    assert len({question.sample.path for question in loaded.questions}) == 2
    assert [q.categories["duration"] for q in loaded.questions] == 3 * ["short"] + 3 * ["long"]
    assert list(loaded.questions[0].categories) == ["duration", "domain", "task_type", "sub_category"]
    assert loaded.questions[0].sample.options[2] == "C. three"
    assert scores(loaded, "C")[:3] == [1.0, 0.0, 0.0]


def test_mmvu(root: Path) -> None:
    loaded = load_suite("mmvu", root)
    (question,) = loaded.questions
    assert question.sample.options == ("A. heap sort", "B. quick sort", "C. merge sort")  # empty ones are none
    assert question.categories == {"discipline": "Engineering", "subject": "Computer Science"}
    assert dict(loaded.left_out) == {"open-ended: a language model would have to judge the answers": 1}


@pytest.mark.parametrize("name", WRITERS)
def test_missing_data_tell_how_to_get_them(tmp_path: Path, name: str) -> None:
    suite = SUITES[name]
    (tmp_path / "something").mkdir()
    with pytest.raises(DataError) as caught:
        load_suite(name, tmp_path)
    message = str(caught.value)
    command = f"hf download {suite.repository} --repo-type dataset --local-dir {tmp_path / name}"
    assert command in message
    assert suite.card in message
    assert "something" in message  # what was found instead
    assert all(str(tmp_path / name / line) in message for line in suite.layout.splitlines())
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=f"{name}: no .*found: nothing") as caught:
        load_suite(name, tmp_path)
    assert command in str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_archives_that_were_not_unpacked(one, name: str) -> None:
    folder = one(name)
    for path in [*folder.rglob("*.mp4"), *folder.rglob("*.mkv"), *folder.rglob("*.webm"), *folder.rglob("*.jpg")]:
        path.unlink()
    shutil.rmtree(folder / "video", ignore_errors=True)
    with pytest.raises(DataError, match="none of its videos is there") as caught:
        load_suite(name, folder.parent)
    assert SUITES[name].unpack in str(caught.value)


def test_some_missing_videos_are_counted(one) -> None:
    folder = one("videomme")
    (folder / "data" / "mKjv93ACGo9.mkv").unlink()
    loaded = load_suite("videomme", folder.parent)
    assert (len(loaded.questions), loaded.missing) == (6, 3)


def test_a_folder_named_as_the_repository_serves_too(one, tmp_path: Path) -> None:
    folder = one("videomme")
    folder.rename(tmp_path / "Video-MME")
    assert len(load_suite("Video-MME", tmp_path).questions) == 6


def test_nothing_that_can_be_asked(one) -> None:
    folder = one("mmvu")
    rows = json.loads((folder / "validation.json").read_text())
    write_json(folder / "validation.json", [rows[1], {"id": 3}])
    with pytest.raises(DataError, match=r"none of its rows.*missing_field.*open-ended"):
        load_suite("mmvu", folder.parent)
    for content, message in (("{}", "expected a JSON list"), ("[", "expected a JSON list")):
        (folder / "validation.json").write_text(content)
        with pytest.raises(DataError, match=message):
            load_suite("mmvu", folder.parent)


def test_a_parquet_file_that_is_none(one) -> None:
    folder = one("videomme")
    (folder / "videomme" / "test-00000-of-00001.parquet").write_bytes(b"an error page")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_suite("videomme", folder.parent)


@pytest.mark.parametrize(("given", "near"), [("mvbnch", "mvbench"), ("video_mmmmu", "videommmu"), ("vsi", "vsibench")])
def test_an_unknown_benchmark_gets_the_nearest_name(tmp_path: Path, given: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"got '{given}'; did you mean '{near}'\?"):
        load_suite(given, tmp_path)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"question": "How \ud83d?"}, "bad_text"),
        ({"options": ["A. left", "B. \ud83d", "C. back"], "ground_truth": "B"}, "bad_text"),
        ({"id": "\ud83d"}, "bad_text"),
        ({"question_type": "\ud83d"}, "problem_type"),
        ({"scene_name": "\ud83d"}, "bad_path"),
        ({"ground_truth": "nan"}, "solution"),
        ({"ground_truth": "inf"}, "solution"),
        ({"ground_truth": "\ud83d"}, "wrong_type"),
    ],
)
def test_a_row_that_cannot_be_asked_is_counted(one, change: dict, kind: str) -> None:
    folder = one("vsibench")
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    base = rows[1] if "options" in change else rows[0]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, [base | change, *rows])))
    loaded = load_suite("vsibench", folder.parent)
    assert [error.kind for error in loaded.errors] == [kind]
    assert len(loaded.questions) == len(rows)


def test_a_category_that_is_no_text_is_counted(one) -> None:
    folder = one("mmvu")
    rows = json.loads((folder / "validation.json").read_text())
    bad = rows[0] | {"video": rows[0]["video"].replace("/videos/", "/videos/\ud83d_")}
    write_json(folder / "validation.json", [bad, *rows])
    loaded = load_suite("mmvu", folder.parent)
    assert [error.kind for error in loaded.errors] == ["bad_text"]


def bad_utf8(file: Path, column: str) -> None:
    """Write a Parquet file again with a byte that is not UTF-8 in its first row: Arrow does not check it."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file)
    texts = table.column(column).to_pylist()
    data = [b"\xff" + text.encode() if i == 0 else text.encode() for i, text in enumerate(texts)]
    made = pyarrow.array(data, pyarrow.binary()).view(pyarrow.string())
    table = table.set_column(table.schema.get_field_index(column), column, made)
    pyarrow.parquet.write_table(table, file)


def test_a_row_of_parquet_that_is_not_utf8_is_counted(one) -> None:
    folder = one("videomme")
    (file,) = folder.glob("**/*.parquet")
    before = len(load_suite("videomme", folder.parent).questions)
    bad_utf8(file, "question")
    loaded = load_suite("videomme", folder.parent)
    assert [error.kind for error in loaded.errors] == ["bad_json"]
    assert "utf-8" in loaded.errors[0].message
    assert len(loaded.questions) == before - 1


def test_a_data_file_is_a_benchmark_too(assets) -> None:
    dataset = load_samples(assets.dev)
    loaded = from_dataset(dataset)
    assert loaded.name == "dev"
    assert [question.sample for question in loaded.questions] == dataset.samples
    assert all(question.score(answer(question.sample.solution[8:-9])) > 0.6 for question in loaded.questions)
    choice = next(q for q in loaded.questions if q.sample.problem_type == "multiple choice")
    letter = choice.sample.solution[8:-9]
    assert choice.score(answer(f"{letter}.")) == 0.0  # the trainer's own strict rule
    assert from_dataset(dataset, lenient=True).questions[choice.sample.index].score(answer(f"{letter}.")) == 1.0


def test_a_data_files_regression_is_mean_relative_accuracy(tmp_path: Path) -> None:
    entry = {"problem": "How far?", "data_type": "text", "problem_type": "regression"}
    solutions = ("1,000", "4", "four")
    write_json(tmp_path / "r.json", [entry | {"solution": f"<answer>{text}</answer>"} for text in solutions])
    loaded = from_dataset(load_samples(tmp_path / "r.json", reward=None))
    assert [q.score(answer(text)) for q, text in zip(loaded.questions, ("1000", "3"), strict=True)] == [1, 0.6]
    assert [(error.kind, "problem 2" in error.message) for error in loaded.errors] == [("solution", True)]
    assert loaded.overall.text == "mean over all questions (regression: mean relative accuracy)"


def test_a_data_files_solutions_are_checked_by_the_scores_of_an_evaluation(tmp_path: Path) -> None:
    entry = {"problem": "How far?", "data_type": "text"}
    kinds = {"regression": ("0", "12 cm", "$12", "nan"), "numerical": ("12 cm", "7"), "free-form": ("赤い車", "a car")}
    cases = [(kind, solution) for kind, solutions in kinds.items() for solution in solutions]
    rows = [entry | {"problem_type": kind, "solution": f"<answer>{text}</answer>"} for kind, text in cases]
    write_json(tmp_path / "r.json", rows)
    dataset = load_samples(tmp_path / "r.json", reward=None)
    for lenient, left in ((False, {0, 5, 7}), (True, {0, 1, 2, 4, 5, 6, 7})):
        loaded = from_dataset(dataset, lenient=lenient)
        assert {question.sample.index for question in loaded.questions} == left
        assert [error.kind for error in loaded.errors] == ["solution"] * (len(cases) - len(left))
        assert all(question.score(question.sample.solution) > 0.1 for question in loaded.questions)
    distance = from_dataset(dataset, lenient=True).questions[1].score
    texts = ("12", "12 cm", "12 centimeters", "$\\frac{24}{2}$", "12 m")
    assert [distance(answer(text)) for text in texts] == [1, 1, 1, 1, 0]


def test_options_are_lettered_once() -> None:
    assert lettered(["red", "blue"]) == ["A. red", "B. blue"]
    assert lettered(["A. red", "B. blue"]) == ["A. red", "B. blue"]
    assert lettered(["A) red", "B) blue"]) == ["A) red", "B) blue"]
    assert lettered(["A. Lincoln", "G. Washington"]) == ["A. A. Lincoln", "B. G. Washington"]
    with pytest.raises(BadRowError):
        lettered(["x"] * 27)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B. a big dog", 1),
        ("A big dog.", 1),
        ("a  big dog", 1),
        ("A", 0),
        ("A big dog and a cat", 0),
        ("", 0),
        ("A) or B)", 0),
        ("dog", 0),
    ],
)
def test_choice(text: str, right: int) -> None:
    assert score_choice(answer(text), letter="B", text="a big dog") == right


def test_choice_counts_the_answer_tag_alone() -> None:
    assert score_choice("B", letter="B") == 0.0
    assert score_choice("<think>B</think>", letter="B") == 0.0
    assert score_choice("<answer></answer>", letter="B", text="") == 0.0


@pytest.mark.parametrize(
    ("text", "truth", "score"),
    [
        ("4", 4, 1.0),
        ("4.0", 4, 1.0),
        ("4.", 4, 1.0),
        ("4 chairs", 4, 1.0),
        ("1,000", 1000, 1.0),
        ("four", 4, 0.0),
        ("", 4, 0.0),
        ("-4", 4, 0.0),
        ("8", 4, 0.0),
        ("2", 4, 0.1),
        ("6", 4, 0.1),
        ("1e400", 4, 0.0),
        ("95", 100, 1.0),
        ("94.9", 100, 0.9),
        ("90", 100, 0.9),
        ("89.9", 100, 0.8),
        ("50", 100, 0.1),
        ("49.9", 100, 0.0),
        ("0", 0, 1.0),
        ("1", 0, 0.0),
        ("nan", 4, 0.0),
        ("inf", 4, 0.0),
        ("+3.9m", 4, 0.0),
        ("3.9 m", 4, 1.0),
    ],
)
def test_mean_relative_accuracy(text: str, truth: float, score: float) -> None:
    assert score_mra(answer(text), truth=truth) == pytest.approx(score)


def test_mean_relative_accuracy_equals_the_formula() -> None:
    """Away from the thresholds, by the paper's formula."""
    for given in (1.03, 3.1, 4.77, 5.3, 9.9):
        thresholds = [0.5 + 0.05 * i for i in range(10)]
        expected = sum(abs(given - 4.2) / 4.2 <= 1 - t for t in thresholds) / 10
        assert score_mra(answer(str(given)), truth=4.2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("12.5", "12.50", 1),
        ("about 12.499", "12.5", 1),
        ("12", "12.5", 0),
        ("1,250", "1250", 1),
        ("x = -3", "-3", 1),
        ("the red curve", "red", 1),
        ("RED", "red", 1),
        ("blue", "red", 0),
        ("", "red", 0),
        ("m", "m", 1),
        ("5 m", "m", 1),
        ("metre", "m", 0),
        ("8", "['8', 'eight']", 1),
        ("Eight.", "['8', 'eight']", 1),
        ("seven", "['8', 'eight']", 0),
        ("[x]", "[x", 1),
    ],
)
def test_open_questions(text: str, truth: str, right: int) -> None:
    assert score_open(answer(text), truth=truth) == right


@pytest.mark.parametrize(
    ("text", "truth", "right"), [("Yes.", "yes", 1), ("yes, it is", "yes", 1), ("no", "yes", 0), ("1", "yes", 0)]
)
def test_yes_no(text: str, truth: str, right: int) -> None:
    assert score_yes_no(answer(text), truth=truth) == right


def test_each_reader_names_its_source() -> None:
    for name, suite in SUITES.items():
        folder = Path(__file__).parents[3] / "videor1" / "evaluation" / "suites"
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        assert suite.card in text
        assert re.search(r"left out|Left\s+out", text), name
