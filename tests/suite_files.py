"""Small copies of the benchmarks' datasets, in the layouts that their authors publish."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from media import numbered_frames, write_video
from PIL import Image

from videor1.evaluation.suites.mvbench import CLIPPED, FOLDERS, TASKS

Rows = list[dict[str, Any]]


class Clips:
    """Copies of one short clip, made once."""

    def __init__(self, folder: Path) -> None:
        self.source = write_video(folder / "clip.mp4", numbered_frames(20, 32, 32), rate=10)

    def at(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(self.source, path))


def table(names: str, rows: Sequence[Sequence[Any]]) -> Rows:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


def write_parquet(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def vsibench(root: Path, clips: Clips) -> None:
    folder, options = root / "vsibench", ["A. left", "B. right", "C. back"]
    scene, other = ("scannet", "scene0001_00"), ("arkitscenes", "41069025")
    rows = table(
        "id dataset scene_name question_type question ground_truth options",
        [
            (0, *scene, "object_counting", "How many chairs?", "4", None),
            (1, *scene, "object_rel_direction_easy", "Which side?", "B", options),
            (2, *other, "object_rel_direction_hard", "Which side is it?", "B", options),
            (3, *other, "route_planning", "Where to?", "B", options),
            (4, *other, "room_size_estimation", "Square metres?", "21.5", None),
        ],
    )
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for dataset, name in (scene, other):
        clips.at(folder / dataset / f"{name}.mp4")


def videommmu(root: Path, clips: Clips) -> None:
    folder, names = root / "videommmu", "id question options answer question_type"
    choice = ("validation_Accounting_1", "Unit cost?", ["$6", "$7"], "B", "multiple-choice")
    ready = ("test_Art_Theory_12", "Which era?", ["A. gothic", "B. baroque"], "A", "perception")
    opened = ("dev_Math_3", "How far?", [], "12.50", "open")
    for track, rows in (("Perception", [ready]), ("Comprehension", [choice]), ("Adaptation", [choice, opened])):
        write_parquet(folder / track / "test-00000-of-00001.parquet", table(names, rows))
    for path in ("Business/validation_Accounting_1", "Art/test_Art_Theory_12", "Science/dev_Math_3"):
        clips.at(folder / f"{path}.mp4")
    (folder / "__MACOSX" / "Business").mkdir(parents=True)
    (folder / "__MACOSX" / "Business" / "._validation_Accounting_1.mp4").write_bytes(b"no video")


def mvbench(root: Path, clips: Clips) -> None:
    folder = root / "mvbench"
    for task, place in TASKS.items():
        name = "clip_1.webm" if place == "ssv2_video" else "friends_1" if task in FOLDERS else "clip_1.mp4"
        row = {"video": name, "question": f"What of {task}?", "candidates": ["red", "blue", "green"], "answer": "blue"}
        window = {"start": 0.5, "end": 1.25} if task in CLIPPED else {}
        write_json(folder / "json" / f"{task}.json", [row | window])
        if task in FOLDERS:
            images = folder / "video" / place / name
            images.mkdir(parents=True)
            for i, frame in enumerate(numbered_frames(6, 32, 32), start=1):
                Image.fromarray(np.ascontiguousarray(frame)).save(images / f"{i:05d}.jpg")
        else:
            # A part of STAR and CLEVRER was packed apart.
            above = "video/data0613" if task == "object_interaction" else "video"
            clips.at(folder / above / place / name)


def tempcompass(root: Path, clips: Clips) -> None:
    folder, common = root / "tempcompass", {"video_id": "1034419625", "dim": "direction"}
    captions = "Which caption fits?\nCaption A: He goes left.\nCaption B: He goes right."
    for task, question, answer in (
        ("multi-choice", "Where does he go?\nA. to the left\nB. to the right", "B. to the right"),
        ("yes_no", "Does he go left?", "no"),
        ("caption_matching", captions, "Caption B: He goes right."),
    ):
        rows = [common | {"question": question, "answer": answer}]
        write_parquet(folder / task / "test-00000-of-00001.parquet", rows)
    caption = common | {"question": "Describe.", "mc_question": "Where?\nA. left", "mc_answer": "A. left"}
    write_parquet(folder / "captioning" / "test-00000-of-00001.parquet", [caption, caption])
    clips.at(folder / "videos" / "1034419625.mp4")


def videomme(root: Path, clips: Clips) -> None:
    folder, options = root / "videomme", ["A. one", "B. two", "C. three", "D. four"]
    kinds = (("Counting Problem", "C"), ("OCR Problems", "A"), ("Counting Problem", "D"))
    rows = table(
        "video_id videoID duration domain sub_category url options question_id task_type question answer",
        [
            (video, name, duration, "Knowledge", "Law", "-", options, f"{video}-{i}", kind, "How many?", answer)
            for video, name, duration in (("001", "fFjv93ACGo8", "short"), ("002", "mKjv93ACGo9", "long"))
            for i, (kind, answer) in enumerate(kinds)
        ],
    )
    write_parquet(folder / "videomme" / "test-00000-of-00001.parquet", rows)
    clips.at(folder / "data" / "fFjv93ACGo8.mp4")
    clips.at(folder / "data" / "mKjv93ACGo9.mkv")  # the suffix lies, as some do


def mmvu(root: Path, clips: Clips) -> None:
    folder, about = root / "mmvu", {"subject": "Computer Science", "textbook": "-"}
    address = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Computer_Science/0.mp4"
    choices = {"A": "heap sort", "B": "quick sort", "C": "merge sort", "D": "", "E": ""}
    rows = table(
        "id video youtube_url metadata question_type question choices answer",
        [
            ("validation_0", address, "-", about, "multiple-choice", "Which sort?", choices, "B"),
            ("validation_1", address, "-", about, "open-ended", "Which one?", dict.fromkeys("ABCDE", ""), "DFS"),
        ],
    )
    write_json(folder / "validation.json", rows)
    clips.at(folder / "videos" / "Computer_Science" / "0.mp4")


WRITERS: dict[str, Callable[[Path, Clips], None]] = {
    "mmvu": mmvu,
    "mvbench": mvbench,
    "tempcompass": tempcompass,
    "videomme": videomme,
    "videommmu": videommmu,
    "vsibench": vsibench,
}
