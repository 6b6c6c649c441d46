"""Small copies of the benchmarks' datasets, in the layouts that their authors publish."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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


def write_parquet(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def vsibench(root: Path, clips: Clips) -> None:
    scene = {"dataset": "scannet", "scene_name": "scene0001_00"}
    other = {"dataset": "arkitscenes", "scene_name": "41069025"}
    choice = {"options": ["A. left", "B. right", "C. back"], "ground_truth": "B"}
    rows: Rows = [
        {
            "id": 0,
            **scene,
            "question_type": "object_counting",
            "question": "How many chairs?",
            "ground_truth": "4",
            "options": None,
        },
        {"id": 1, **scene, "question_type": "object_rel_direction_easy", "question": "Which side?", **choice},
        {"id": 2, **other, "question_type": "object_rel_direction_hard", "question": "Which side is it?", **choice},
        {"id": 3, **other, "question_type": "route_planning", "question": "Where to?", **choice},
        {
            "id": 4,
            **other,
            "question_type": "room_size_estimation",
            "question": "Square metres?",
            "ground_truth": "21.5",
            "options": None,
        },
    ]
    folder = root / "vsibench"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    clips.at(folder / "scannet" / "scene0001_00.mp4")
    clips.at(folder / "arkitscenes" / "41069025.mp4")


def videommmu(root: Path, clips: Clips) -> None:
    folder = root / "videommmu"
    options = ["$6", "$7"]
    rows = [
        {
            "id": "validation_Accounting_1",
            "question": "Unit cost?",
            "options": options,
            "answer": "B",
            "question_type": "multiple-choice",
        }
    ]
    ready = [
        {
            "id": "test_Art_Theory_12",
            "question": "Which era?",
            "options": ["A. gothic", "B. baroque"],
            "answer": "A",
            "question_type": "perception",
        }
    ]
    opened = {"id": "dev_Math_3", "question": "How far?", "options": [], "answer": "12.50", "question_type": "open"}
    write_parquet(folder / "Perception" / "test-00000-of-00001.parquet", ready)
    write_parquet(folder / "Comprehension" / "test-00000-of-00001.parquet", rows)
    write_parquet(folder / "Adaptation" / "test-00000-of-00001.parquet", [*rows, opened])
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
    folder = root / "tempcompass"
    common = {"video_id": "1034419625", "dim": "direction"}
    questions = {
        "multi-choice": ("Where does he go?\nA. to the left\nB. to the right", "B. to the right"),
        "yes_no": ("Does he go left?", "no"),
        "caption_matching": (
            "Which caption fits?\nCaption A: He goes left.\nCaption B: He goes right.",
            "Caption B: He goes right.",
        ),
    }
    for task, (question, answer) in questions.items():
        rows = [common | {"question": question, "answer": answer}]
        write_parquet(folder / task / "test-00000-of-00001.parquet", rows)
    caption = common | {"question": "Describe.", "mc_question": "Where?\nA. left", "mc_answer": "A. left"}
    write_parquet(folder / "captioning" / "test-00000-of-00001.parquet", [caption, caption])
    clips.at(folder / "videos" / "1034419625.mp4")


def videomme(root: Path, clips: Clips) -> None:
    folder = root / "videomme"
    rows: Rows = []
    for number, (video, duration) in enumerate((("fFjv93ACGo8", "short"), ("mKjv93ACGo9", "long")), start=1):
        about = {
            "video_id": f"{number:03}",
            "videoID": video,
            "duration": duration,
            "domain": "Knowledge",
            "sub_category": "Law",
            "url": "-",
            "options": ["A. one", "B. two", "C. three", "D. four"],
        }
        for i, (kind, answer) in enumerate(
            (("Counting Problem", "C"), ("OCR Problems", "A"), ("Counting Problem", "D"))
        ):
            rows.append(
                about
                | {"question_id": f"{number:03}-{i}", "task_type": kind, "question": "How many?", "answer": answer}
            )
    write_parquet(folder / "videomme" / "test-00000-of-00001.parquet", rows)
    clips.at(folder / "data" / "fFjv93ACGo8.mp4")
    clips.at(folder / "data" / "mKjv93ACGo9.mkv")  # the suffix lies, as some do


def mmvu(root: Path, clips: Clips) -> None:
    folder = root / "mmvu"
    address = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Computer_Science/0.mp4"
    common = {"video": address, "youtube_url": "-", "metadata": {"subject": "Computer Science", "textbook": "-"}}
    choices = {"A": "heap sort", "B": "quick sort", "C": "merge sort", "D": "", "E": ""}
    empty = dict.fromkeys("ABCDE", "")
    rows: Rows = [
        common
        | {
            "id": "validation_0",
            "question_type": "multiple-choice",
            "question": "Which sort?",
            "choices": choices,
            "answer": "B",
        },
        common
        | {
            "id": "validation_1",
            "question_type": "open-ended",
            "question": "Which one?",
            "choices": empty,
            "answer": "DFS",
        },
    ]
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
