"""MVBench: https://huggingface.co/datasets/OpenGVLab/MVBench (branch main; the branch "video" has cut clips instead)

It has twenty tasks of 200 questions, with a JSON file for each task. The right option is given as its text. Five tasks
ask about the seconds ``start`` to ``end`` of their videos, and one of these has its videos as folders of images, three
per second. The overall figure is the mean over all questions. Nothing is left out, but the videos of fine_grained_pose
(NTU RGB+D) are not in the dataset because of their license.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from videor1.evaluation.suites.base import BadRowError, Draft, Overall, Reader, Suite, lettered, plain_options
from videor1.evaluation.suites.scoring import score_choice

FRAMES_PER_SECOND = 3.0
TASKS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
CLIPPED = ("action_sequence", "action_prediction", "object_interaction", "action_localization", "episodic_reasoning")
FOLDERS = ("episodic_reasoning",)


def read(reader: Reader) -> None:
    """Read all rows of the benchmark."""
    for task in TASKS:
        (file,) = reader.files(f"json/{task}.json")
        fields = ("video", "question", "candidates", "answer", *(("start", "end") if task in CLIPPED else ()))
        reader.read(file, fields, partial(_question, reader, task))


def _question(reader: Reader, task: str, row: dict[str, Any]) -> Draft:
    candidates, answer = plain_options(row["candidates"]), row["answer"]
    if answer not in candidates:
        raise BadRowError("options", f"expected the answer among the candidates, got {answer!r} for {candidates}")
    options = lettered(candidates)
    letter = options[candidates.index(answer)][0]
    clipped = task in CLIPPED
    return Draft(
        problem_id=f"{task}/{row['video']}",
        problem=row["question"],
        answer=letter,
        path=_folder(reader, row["video"]) if task in FOLDERS else reader.video(TASKS[task], row["video"]),
        categories={"task": task},
        score=partial(score_choice, letter=letter, text=answer),
        options=options,
        start=float(row["start"]) if clipped else None,
        end=float(row["end"]) if clipped else None,
        frames_per_second=FRAMES_PER_SECOND if task in FOLDERS else None,
    )


def _folder(reader: Reader, name: str) -> str:
    """Return the folder that holds the images of a video."""
    places = [f"{above}{TASKS['episodic_reasoning']}/{name}" for above in ("video/", "")]
    return next((place for place in places if (reader.folder / place).is_dir()), places[0])


SUITE = Suite(
    name="mvbench",
    repository="OpenGVLab/MVBench",
    layout="json/<task>.json\n" + "\n".join(f"video/{folder}" for folder in dict.fromkeys(TASKS.values())),
    unpack="cd video && for f in *.zip; do unzip -q $f; done",
    overall=Overall("mean over all questions"),
    read=read,
    needs="The videos of fine_grained_pose (video/nturgbd) come from NTU RGB+D,\n"
    "https://rose1.ntu.edu.sg/dataset/actionRecognition; without them its 200 questions count as unanswered.",
)
