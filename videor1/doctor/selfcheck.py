"""Run each operation once, forward and backward, against its reference in fp64, and decode a clip of each codec."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videor1.doctor.rows import Finding

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Cast = Callable[[Tensor], Tensor]
    Case = Callable[[Cast, str], dict[str, Tensor]]

TRAINER = "videor1.training.tgrpo"  # importing this module imports everything that a run needs
LEVEL = 1.01  # one level of a pixel, by which rounding in fp32 may move it
CODECS = {"h264": "libx264", "hevc": "libx265", "av1": "libsvtav1", "vp9": "libvpx-vp9"}  # codec -> encoder of the clip
NEEDED_CODEC = "h264"  # the codec of the demonstration's clips
FRAMES, SIDE, STEP = 8, 64, 30  # frames of a clip, side in pixels, grey levels from one frame to the next
FAR = 6.0  # grey levels; compression changes the mean of a frame by less


def self_check() -> list[Finding]:
    """Check the trainer's imports, every operation and every codec."""
    return [_imports(), *operation_rows(), *decode_rows()]


def _imports() -> Finding:
    try:
        importlib.import_module(TRAINER)
    except Exception as error:
        fix = "pip install what is missing, or make a fresh environment"
        return Finding("imports", f"broken: import {TRAINER}: {_summary(error)}", "broken", fix)
    return Finding("imports", f"works: import {TRAINER}", "ok")


def operation_rows() -> list[Finding]:
    """Check every operation on the device and in the dtype that training uses; one finding for each."""
    import torch

    import videor1_kernels
    from videor1.doctor.tools import operations

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rows = []
    for op in operations():
        try:
            backend = videor1_kernels.chosen_backend(op, device, dtype=dtype)
        except ValueError as error:  # An optional package is missing.
            rows.append(Finding(op, f"cannot run: {error}", "absent"))
            continue
        try:
            difference = _compare(CASES[op], torch.device(device), dtype, backend)
        except Exception as error:
            difference = _summary(error)
        if difference:
            rows.append(Finding(op, f"broken ({backend} on {device}): {difference}", "broken", _fix(backend)))
        else:
            rows.append(Finding(op, f"works ({backend} on {device})", "ok"))
    return rows


def _fix(backend: str) -> str:
    return {
        "triton": "--kernels reference trains without Triton; report this with the whole output",
        "native": "VIDEOR1_NATIVE=0 does without the C++; report this with the whole output",
    }.get(backend, "reinstall torch; if that does not help, report this with the whole output")


def _compare(case: Case, device: torch.device, dtype: torch.dtype, backend: str) -> str:
    """Say how a backend differs from the reference in fp64 on the same (rounded) inputs; "" if it does not."""
    import torch

    from videor1_kernels.testing import TOLERANCES

    ours = case(lambda x: x.to(device, dtype), backend)
    oracle = case(lambda x: x.to(dtype).double(), "reference")
    for name, expected in oracle.items():
        got = ours[name].detach().cpu()
        if not expected.is_floating_point():
            if not torch.equal(got, expected.cpu()):
                return f"{name} are other ones than the reference's"
            continue
        bound = TOLERANCES[dtype]
        atol = LEVEL if name.startswith("patches") else bound.atol
        error = (got.double() - expected).abs()
        if got.shape != expected.shape or not bool((error <= atol + bound.rtol * expected.abs()).all()):
            return f"{name} is off by up to {error.max():.1e}, at most about {atol:.0e} was expected"
    return ""


def _randn(seed: int, *shape: int) -> Tensor:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _with_gradients(outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs with the gradient of the sum of their squares with respect to each input."""
    import torch

    total = sum((value.square().sum() for value in outputs.values()), torch.zeros(()))
    gradients = torch.autograd.grad(total, list(inputs.values()))
    return outputs | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}


def _head(cast: Cast) -> tuple[Tensor, Tensor, Tensor]:
    """Return (hidden states, weight of the head, labels)."""
    import torch

    hidden, weight = cast(_randn(0, 6, 32)).requires_grad_(), cast(0.3 * _randn(1, 50, 32)).requires_grad_()
    return hidden, weight, torch.tensor([3, 49, 0, 7, 7, 20], device=hidden.device)


def _linear_logprob(cast: Cast, backend: str) -> dict[str, Tensor]:
    import videor1_kernels as kernels

    hidden, weight, labels = _head(cast)
    logp, entropy = kernels.linear_logprob(hidden, weight, labels, backend=backend)
    # Rows that start at odd addresses take a kernel of their own.
    odd, _ = kernels.linear_logprob(hidden[:, 1:], weight[:, 1:], labels, backend=backend)
    return _with_gradients({"logp": logp, "entropy": entropy, "odd": odd}, {"hidden": hidden, "weight": weight})


def _selective_log_softmax(cast: Cast, backend: str) -> dict[str, Tensor]:
    import videor1_kernels as kernels

    logits, labels = cast(_randn(2, 6, 50)).requires_grad_(), _head(cast)[2]
    logp = kernels.selective_log_softmax(logits, labels, backend=backend)
    return _with_gradients({"logp": logp}, {"logits": logits})


def _two_completions(cast: Cast) -> dict[str, Any]:
    """Return the arguments of a GRPO loss over two completions of two and four tokens."""
    import torch

    old, reference = cast(-3 + 0.1 * _randn(3, 6)), cast(-3 + 0.1 * _randn(4, 6))
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32, device=old.device)
    return {
        "advantages": cast(torch.tensor([1.0, -0.5])),
        "cu_seqlens": cu_seqlens,
        "old_logp": old,
        "ref_logp": reference,
        "clip_low": 5.0,
        "clip_high": 5.0,
    }


def _linear_grpo_loss(cast: Cast, backend: str) -> dict[str, Tensor]:
    import videor1_kernels as kernels

    hidden, weight, labels = _head(cast)
    result = kernels.linear_grpo_loss(hidden, weight, labels, **_two_completions(cast), backend=backend)
    return {"logp": result.logp} | _with_gradients({"loss": result.loss}, {"hidden": hidden, "weight": weight})


def _grpo_loss(cast: Cast, backend: str) -> dict[str, Tensor]:
    import videor1_kernels as kernels

    logp = cast(-3 + 0.1 * _randn(5, 6)).requires_grad_()
    result = kernels.grpo_loss(logp, **_two_completions(cast), backend=backend)
    return _with_gradients({"loss": result.loss}, {"logp": logp})


def _tgrpo_advantages(cast: Cast, backend: str) -> dict[str, Tensor]:
    import torch

    import videor1_kernels as kernels

    accuracy = cast(torch.tensor([[1.0, 0, 1, 0], [1, 1, 0.5, 0], [0, 0, 0, 0]]))
    shuffled = cast(torch.tensor([[0.0, 1], [0.5, 0], [1, 1]]))
    lengths = torch.tensor([[400, 10, 20, 30], [400, 400, 400, 1], [1, 2, 3, 4]], device=accuracy.device)
    inputs = (accuracy, torch.ones_like(accuracy), lengths, shuffled)
    result, *others = (
        kernels.tgrpo_advantages(*inputs, normalize=normalize, backend=backend)
        for normalize in ("std", "batch", "gdpo")
    )
    bars = kernels.tgrpo_advantages(*inputs, correct_above=cast(torch.tensor([0.1, 0.5, 0.1])), backend=backend)
    named = {"by the batch": others[0].advantages, "each reward by itself": others[1].advantages}
    named["a bar for each prompt"] = bars.rewards
    named["p of some completions"] = kernels.tgrpo_advantages(*inputs, p_mask=inputs[0] > 0, backend=backend).temporal
    return {"advantages": result.advantages, "rewards": result.rewards, "p": result.p} | named


def _prefix_attention(cast: Cast, backend: str) -> dict[str, Tensor]:
    import videor1_kernels as kernels

    # The first prompt is long enough that several programs share the gradients of its keys. Heads of 256 entries, as
    # Qwen3.5 has them, have kernels of their own.
    found: dict[str, Tensor] = {}
    for size, tokens in ((32, 700), (256, 90)):
        made = (_randn(6 + i, tokens + 12, heads, size) for i, heads in enumerate((4, 2, 2)))
        # So that products, and what is allowed of their rounding, are of one size.
        q, k, v = (cast(x * (32 / size) ** 0.5).requires_grad_() for x in made)
        layout = kernels.PrefixLayout([tokens, 3], [[2, 3], [4]], device=q.device)
        out = kernels.prefix_attention(q, k, v, layout, backend=backend)
        results = _with_gradients({"output": out}, {"q": q, "k": k, "v": v})
        found |= {f"{name}, head dim {size}": value for name, value in results.items()}
    return found


def _prefix_decode_attention(cast: Cast, backend: str) -> dict[str, Tensor]:
    import torch

    import videor1_kernels as kernels

    found = {}
    for size in (32, 256):
        q, prefix_k, prefix_v = (cast(_randn(9 + i, n, h, size)) for i, (n, h) in enumerate(((3, 4), (8, 2), (8, 2))))
        suffix_k, suffix_v = (cast(_randn(12 + i, 3, 4, 2, size)) for i in range(2))
        index = partial(torch.tensor, device=q.device)
        found[f"output, head dim {size}"] = kernels.prefix_decode_attention(
            q,
            prefix_k,
            prefix_v,
            suffix_k,
            suffix_v,
            suffix_lengths=index([1, 4, 2]),
            cu_prefix=index([0, 5, 8]),
            row_group=index([0, 0, 1]),
            backend=backend,
        )
    return found


def _frames_to_patches(cast: Cast, backend: str) -> dict[str, Tensor]:
    """Return the patches of every family's rules, in levels of the channel that a level moves most."""
    import torch

    import videor1_kernels as kernels
    from videor1.video import FRAME_RULES

    like = cast(torch.zeros(1))
    frames = torch.randint(256, (4, 40, 60, 3), generator=torch.Generator().manual_seed(14)).to(torch.uint8)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return {
        f"patches of {name}": 255
        * min(rules.std)
        * kernels.frames_to_patches(
            frames.to(like.device),
            size=(rules.block, 2 * rules.block),
            permutation=[2, 0, 3, 1],
            dtype=dtype,
            patch_size=rules.patch_size,
            mean=rules.mean,
            std=rules.std,
            backend=backend,
        )
        for name, rules in FRAME_RULES.items()
    }


def _sample_tokens(cast: Cast, backend: str) -> dict[str, Tensor]:
    import torch

    import videor1_kernels as kernels

    drawn = []
    for vocabulary, top_p, top_k in ((50, 0.9, 20), (5000, 0.9, 20), (5000, 1.0, 0)):  # programs share a row of 5,000
        logits = cast(3 * _randn(15, 4, vocabulary))
        uniform = torch.tensor([0.05, 0.4, 0.7, 0.95], device=logits.device)
        banned = torch.tensor([7], device=logits.device)
        drawn.append(kernels.sample_tokens(logits, uniform, top_p=top_p, top_k=top_k, banned=banned, backend=backend))
    tokens, logp = map(torch.cat, zip(*drawn, strict=True))
    return {"tokens": tokens, "logp": logp}


def _add_rms_norm(cast: Cast, backend: str) -> dict[str, Tensor]:
    import videor1_kernels as kernels

    x, residual, weight = cast(_randn(16, 4, 48)), cast(_randn(17, 4, 48)), cast(_randn(18, 48))
    normed, summed = kernels.add_rms_norm(x, weight, residual=residual, backend=backend)
    offset, _ = kernels.add_rms_norm(x, weight, residual=residual, unit_offset=True, backend=backend)
    return {"normed": normed, "summed": summed, "normed by 1 + weight": offset}


def _rotary_append(cast: Cast, backend: str) -> dict[str, Tensor]:
    import torch

    import videor1_kernels as kernels

    qkv, angles = cast(_randn(19, 3, (4 + 2 * 2) * 16)), _randn(20, 9, 16)
    index = partial(torch.tensor, device=qkv.device)
    q_norm, k_norm = cast(_randn(41, 16)), cast(_randn(42, 16))
    norms: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm, "unit_offset": True}
    found: dict[str, Tensor] = {}
    # As Qwen2.5-VL has it; and as Qwen3.5 has it, with norms and only a part of each head rotated.
    whole: dict[str, Any] = {}
    for name, turning, options in (("", 16, whole), (" of Qwen3.5", 4, norms)):
        cos, sin = cast(angles.cos()[:, :turning]), cast(angles.sin()[:, :turning])
        keys, values = (cast(torch.zeros(5, 4, 2, 16)) for _ in range(2))
        q = kernels.rotary_append(
            qkv,
            cos,
            sin,
            keys,
            values,
            positions=index([8, 0, 3]),
            suffix_lengths=index([1, 4, 2]),
            suffix_slots=index([4, 0, 2]),
            backend=backend,
            **options,
        )
        found |= {f"q{name}": q, f"keys{name}": keys, f"values{name}": values}
    return found


def _sigmoid_mul(cast: Cast, backend: str) -> dict[str, Tensor]:
    import videor1_kernels as kernels

    x, gate = cast(_randn(43, 4, 48)), cast(_randn(44, 4, 48))
    return {"output": kernels.sigmoid_mul(x, gate, backend=backend)}


def _gated_rms_norm(cast: Cast, backend: str) -> dict[str, Tensor]:
    import videor1_kernels as kernels

    x, product, weight = cast(_randn(45, 4, 3, 16)), cast(_randn(46, 4, 80)), cast(_randn(47, 16))
    return {"output": kernels.gated_rms_norm(x, product[:, 32:].unflatten(1, (3, 16)), weight, backend=backend)}


def _silu_mul(cast: Cast, backend: str) -> dict[str, Tensor]:
    import videor1_kernels as kernels

    gate_up, inner, b = (cast(_randn(21 + i, *size)) for i, size in enumerate([(4, 96), (4, 10), (96, 5)]))
    return {
        "output": kernels.silu_mul(gate_up, backend=backend),
        "with adapters": kernels.silu_mul(gate_up, inner, b, backend=backend),
    }


def _prefix_gated_delta(cast: Cast, backend: str) -> dict[str, Tensor]:
    import videor1_kernels as kernels

    shapes = {"q": (2, 16), "k": (2, 16), "v": (4, 16), "g": (4,), "beta": (4,)}
    made = {name: _randn(24 + i, 17, *shape) for i, (name, shape) in enumerate(shapes.items())}
    made |= {"g": -made["g"].abs(), "beta": made["beta"].sigmoid()}
    inputs = {name: cast(x).requires_grad_() for name, x in made.items()}
    q, k, v, g, beta = inputs.values()
    layout = kernels.PrefixLayout([5, 3], [[2, 4], [3]], q.device)
    out = kernels.prefix_gated_delta(q, k, v, g, beta, layout, backend=backend)
    return _with_gradients({"output": out}, inputs)


def _prefix_causal_conv(cast: Cast, backend: str) -> dict[str, Tensor]:
    import videor1_kernels as kernels

    x, weight = cast(_randn(29, 17, 32)).requires_grad_(), cast(_randn(30, 32, 4)).requires_grad_()
    layout = kernels.PrefixLayout([5, 3], [[2, 4], [3]], x.device)
    out = kernels.prefix_causal_conv(x, weight, layout, activation="silu", backend=backend)
    return _with_gradients({"output": out}, {"x": x, "weight": weight})


def _gated_delta_step(cast: Cast, backend: str) -> dict[str, Tensor]:
    import torch

    import videor1_kernels as kernels

    q, k, v, gate = (
        cast(_randn(31 + i, *shape)) for i, shape in enumerate([(3, 2, 16), (3, 2, 16), (3, 4, 16), (3, 4)])
    )
    state = cast(_randn(35, 5, 4, 16, 16))
    state = state if state.dtype == torch.float64 else state.float()
    slots = torch.tensor([4, 0, 2], device=q.device)
    out = kernels.gated_delta_step(q, k, v, -gate.abs(), gate.sigmoid(), state, slots=slots, backend=backend)
    return {"output": out, "state": state}


def _causal_conv_step(cast: Cast, backend: str) -> dict[str, Tensor]:
    import torch

    import videor1_kernels as kernels

    x, state, weight = (cast(_randn(36 + i, *shape)) for i, shape in enumerate([(3, 32), (5, 32, 3), (32, 4)]))
    slots = torch.tensor([4, 0, 2], device=x.device)
    out = kernels.causal_conv_step(x, state, weight, slots=slots, activation="silu", backend=backend)
    return {"output": out, "state": state}


CASES: dict[str, Case] = {
    "add_rms_norm": _add_rms_norm,
    "causal_conv_step": _causal_conv_step,
    "frames_to_patches": _frames_to_patches,
    "gated_delta_step": _gated_delta_step,
    "gated_rms_norm": _gated_rms_norm,
    "grpo_loss": _grpo_loss,
    "linear_grpo_loss": _linear_grpo_loss,
    "linear_logprob": _linear_logprob,
    "prefix_attention": _prefix_attention,
    "prefix_causal_conv": _prefix_causal_conv,
    "prefix_decode_attention": _prefix_decode_attention,
    "prefix_gated_delta": _prefix_gated_delta,
    "rotary_append": _rotary_append,
    "sample_tokens": _sample_tokens,
    "selective_log_softmax": _selective_log_softmax,
    "sigmoid_mul": _sigmoid_mul,
    "silu_mul": _silu_mul,
    "tgrpo_advantages": _tgrpo_advantages,
}


def decode_rows() -> list[Finding]:
    """Encode a small clip with every codec and decode it with ``read_frames``; one finding for each codec."""
    os.environ.setdefault("SVT_LOG", "0")  # Otherwise SVT-AV1 writes its settings to stderr.
    with tempfile.TemporaryDirectory() as folder:
        return [_decode(codec, encoder, Path(folder)) for codec, encoder in CODECS.items()]


def _decode(codec: str, encoder: str, folder: Path) -> Finding:
    name = f"decode {codec}"
    status: Any = "broken" if codec == NEEDED_CODEC else "warning"
    fix = "pip install --force-reinstall av"
    try:
        from av.codec.codec import UnknownCodecError

        from videor1.video import read_frames

        try:
            path = _write_clip(folder / f"{codec}.mp4", encoder)
        except UnknownCodecError:
            return Finding(name, f"not tried: this PyAV has no {encoder} to make a clip with", "info")
        clip = read_frames(path, fps=float(FRAMES))
        levels = [round(float(frame.float().mean()), 1) for frame in clip.frames]  # type: ignore[union-attr]
    except Exception as error:
        return Finding(name, f"broken: {_summary(error)}", status, fix)
    made = [i * STEP for i in range(FRAMES)]
    if len(levels) != FRAMES or any(abs(a - b) > FAR for a, b in zip(levels, made, strict=True)):
        return Finding(name, f"broken: frames of grey levels {made} came back as {levels}", status, fix)
    return Finding(name, f"works: {FRAMES} frames by {clip.backend}", "ok")


def _write_clip(path: Path, encoder: str) -> Path:
    import av
    import numpy as np

    options = {"x265-params": "log-level=none"} if encoder == "libx265" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=FRAMES, options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((SIDE, SIDE, 3), number * STEP, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _summary(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
