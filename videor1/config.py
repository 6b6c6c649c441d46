"""Every option of the trainer, with its default and its meaning. The command line (``cli.py``) is made from this file.

Names are the reference's (Video-R1) where it has one. A field's docstring is its ``--help`` text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Literal

from videor1.errors import ConfigError

IMAGE_MAX_PIXELS = 256 * 28 * 28
VIDEO_MAX_PIXELS = 128 * 28 * 28


@dataclass
class DataConfig:
    """Where the samples are."""

    root: str | None = None
    """Folder that media paths are relative to and must stay under; default: the folder of the data file (remote data:
    the current folder)."""
    stream: bool | None = None
    """Read the data as a stream, in bounded memory, and not whole; default: whatever is not one .json or .jsonl file,
    and a .jsonl of 256 MiB or more."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    eval_path: str | None = None
    """Held-out data file (same format) for the periodic evaluation."""
    shuffle: bool = True
    """Draw the samples in a new seeded order each epoch; false: in file order."""
    shuffle_mb: int = 32
    """Stream: rows of pieces from all over the data are shuffled together, so many MiB of them."""
    workers: int = 2
    """Decode processes that work ahead of the step; 0 decodes in the training process (no timeout then)."""
    prefetch: int = 16
    """Samples decoded ahead at most (a step's, where that is more): bounds the memory (about 4.5 MB a video at the
    default size)."""
    timeout: float = 60.0
    """Seconds a worker may spend on one sample before it is killed and the sample is skipped and counted."""
    cache_mb: int = 512
    """Memory for decoded 8-bit patches kept across epochs, in MiB; 0 keeps none."""
    cache_dir: str | None = None
    """Folder for decoded 8-bit patches kept across runs; runs and ranks may share one; default: none."""
    cache_dir_mb: int = 20480
    """Size of data.cache_dir at most, in MiB: the least recently used files go."""


@dataclass
class VideoConfig:
    """How videos and images become patches."""

    max_frames: int = 16
    """Frames sampled from a video at most (even)."""
    fps: float = 2.0
    """Frames per second to sample."""
    max_pixels: int = VIDEO_MAX_PIXELS
    """Pixels of a video frame at most, after the resize (height and width are multiples of 28)."""
    min_pixels: int | None = None
    """Pixels of a video frame at least; default: as many as max_pixels, up to 128 * 28 * 28 (as in the reference)."""
    image_max_pixels: int = IMAGE_MAX_PIXELS
    """Pixels of an image at most."""
    image_min_pixels: int = 4 * 28 * 28
    """Pixels of an image at least."""
    backend: str = "auto"
    """Decoder: auto, pyav, pyav-nvdec, decord, torchcodec or pynvvideocodec; auto is pyav, with video.device cuda on
    the card's engine (NVDEC) where that is faster."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the decode workers decode and resize; cuda costs each of them a CUDA context (about 0.5 GB of the card)."""


@dataclass
class TemporalConfig:
    """The temporal reward: compare answers from frames in order with answers from shuffled frames."""

    enabled: bool = True
    """T-GRPO; false trains plain GRPO (no shuffled answers)."""
    rule: Literal["margin", "threshold", "reference"] = "margin"
    """margin: alpha * (p - p~) if p > p~; threshold: alpha if p > mu * p~; reference: alpha if p >= mu * p~."""
    alpha: float = 0.3
    """Size of the bonus."""
    mu: float = 0.8
    """Factor on p~ in the rules threshold and reference."""
    apply: Literal["reward", "advantage"] | None = None
    """Add the bonus to the reward (parity; the group's normalisation nearly cancels it) or to the normalised
    advantage; default: reward for threshold and reference, advantage for margin."""
    shuffle_unit: Literal["frame", "temporal_patch"] = "frame"
    """What is permuted: frames, or pairs of frames (which leaves the motion inside each pair visible)."""
    num_generations: int | None = None
    """Answers from shuffled frames per prompt; default: half of num_generations."""
    skip_shuffled: bool = True
    """Leave out, or stop, shuffled answers that can no longer change the advantages; these stay the same, rewards may
    lack a constant per group. false: run all, so that p~ is known for every prompt."""


@dataclass
class RewardConfig:
    """What an answer earns."""

    lenient: bool = False
    """Forgive case, trailing punctuation, thousands separators and equivalent numbers in answers; false: the
    reference's exact semantics."""
    correct_above: float = 0.1
    """An answer counts as correct for the temporal and the length bonus when its accuracy reward exceeds this."""
    format_weight: float = 1.0
    """Factor on the format reward."""
    length_bonus: float = 0.2
    """Bonus for a correct answer whose length is in length_range (omega: 0.2 in the reference's code, 0.1 in its
    paper)."""
    length_range: tuple[int, int] = (320, 512)
    """Tokens, both ends included, EOS counted."""
    functions: list[str] = field(default_factory=list)
    """More rewards, as module:function; called with (completions, samples), returns one float per completion, added
    to the format reward."""


@dataclass
class RolloutConfig:
    """Who samples the answers."""

    engine: Literal["local", "server"] = "local"
    """local: this process, from the training weights themselves; server: one that speaks OpenAI's API (vLLM,
    SGLang)."""
    kv_mib: int | None = None
    """Local: memory of the KV cache, in MiB, which bounds the answers in flight together with rollout_batch_size;
    default: 60% of what is free on a GPU, no bound on CPU."""
    cuda_graphs: bool = True
    """Local, on a GPU: replay decode steps as CUDA graphs."""
    url: str = "http://localhost:8000/v1"
    """Server: its base address. The key is taken from OPENAI_API_KEY."""
    model: str | None = None
    """Server: the name of the model there; default: the only one it has."""
    timeout: float = 600.0
    """Server: seconds for one answer."""
    retries: int = 3
    """Server: further tries of a request that failed, with growing pauses."""
    concurrency: int = 64
    """Server: requests at a time."""
    sync: Literal["vllm", "none"] = "vllm"
    """Server: how it gets new weights; vllm: from a checkpoint folder that both can read, by vLLM's development
    routes; none: never (its answers then come from another policy than the one that is trained)."""


@dataclass
class LoraConfig:
    """LoRA through peft; rank 0 trains the whole model."""

    rank: int = 0
    """Rank of the adapters; 0: no LoRA."""
    alpha: float = 32.0
    """Scale of the adapters (alpha / rank)."""
    dropout: float = 0.0
    """Dropout inside the adapters."""
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers of the language model that get an adapter."""


@dataclass
class ModelConfig:
    """The model: its positions, and other libraries' kernels inside it (their results agree to rounding)."""

    positions: Literal["paper", "transformers"] | None = None
    """Where text after a video goes on. paper: one past the video's largest position, as Qwen2-VL and Qwen2.5-VL were
    trained and vLLM serves them; transformers: past its height and width alone, as transformers since 5.3. Default: as
    the checkpoint was trained, and paper for a model that no run of this library has trained."""
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """Of the vision tower, and of prompts at the start of a rollout; flash_attention_2 needs flash-attn and a GPU
    (sdpa leaves prompts to videor1_kernels)."""
    liger: bool = False
    """liger-kernel's RMSNorm, SwiGLU and (M-)RoPE; needs a GPU."""


@dataclass
class DistributedConfig:
    """Several processes: GPUs of one machine or of many, started by torchrun or the deepspeed launcher."""

    engine: Literal["none", "deepspeed"] = "none"
    """none: this process alone; deepspeed: every process of the launcher, on DeepSpeed's ZeRO."""
    zero_stage: Literal[2, 3] = 2
    """What the processes share out: 2, gradients and optimizer state; 3, the weights too."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in main memory, and step there."""
    timeout: float = 45.0
    """Seconds without a sign of life from another process after which this one ends with a message."""


@dataclass
class CommonConfig:
    """What SFT and T-GRPO share."""

    model_name_or_path: str | None = None
    """A Qwen2.5-VL folder or hub id."""
    dataset_name: str | None = None
    """Data in the Video-R1 JSON format: a .json list or a .jsonl; or, as a stream, .jsonl, .jsonl.gz or .parquet shards
    (a folder, a glob, a URL, several joined by commas), a folder of datasets' save_to_disk, hf://user/name[/subset]."""
    output_dir: str | None = None
    """Run folder; default: runs/<command>-<date>-<time>."""
    data: DataConfig = field(default_factory=DataConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    max_prompt_length: int = 16384
    """Prompt tokens at most; a longer prompt is skipped and counted, never cut."""
    per_device_train_batch_size: int = 1
    """Prompts (SFT: samples) in one forward and backward."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes per optimizer step."""
    num_train_epochs: float = 1.0
    """Passes over the data; max_steps wins where it is set."""
    max_steps: int = -1
    """Optimizer steps; -1: from num_train_epochs."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule after the warm-up; cosine and linear end at zero."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's, on matrices only (not on biases and norms)."""
    adam_beta1: float = 0.9
    """AdamW's first beta."""
    adam_beta2: float = 0.999
    """AdamW's second beta."""
    max_grad_norm: float = 5.0
    """Clip the gradient to this norm."""
    max_nonfinite_steps: int = 3
    """Stop after this many steps in a row whose loss or gradient is NaN or Inf (each is skipped and counted)."""

    freeze_vision: bool = False
    """Keep the vision tower (and its merger) fixed."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    bf16: bool | None = None
    """Compute in bf16 with fp32 master weights; default: on a GPU yes, on CPU no."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Who computes attention, sampling, log-probs, losses and advantages; auto: Triton on a GPU, plain PyTorch
    elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    seed: int = 42
    """Seeds the data order, the sampling, the permutations and the initialisation, each with its own generator."""
    save_steps: int = 100
    """Write a checkpoint every so many steps, and at the end; 0: only at the end."""
    save_total_limit: int | None = 2
    """Checkpoints to keep; the oldest are deleted."""
    save_only_model: bool = False
    """Leave out the optimizer and the trainer state (no resume)."""
    resume: str | None = None
    """auto: go on from the newest checkpoint of output_dir; or a checkpoint's path."""
    logging_steps: int = 1
    """Steps between lines of metrics.jsonl."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Trackers beside metrics.jsonl, which is always written."""
    run_name: str | None = None
    """Name shown by the trackers; default: the run folder's name."""
    disable_tqdm: bool = False
    """No progress bar."""


@dataclass
class EvalOptions(CommonConfig):
    """What every command that answers questions shares."""

    max_completion_length: int = 768
    """New tokens per answer at most."""
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval_steps: int = 0
    """Evaluate on data.eval_path every so many steps, and at the end; 0: only at the end."""
    eval_samples: int = 256
    """Samples of data.eval_path to use, from the top; 0: all."""
    eval_temperature: float = 0.0
    """Sampling temperature of the evaluation; 0: greedy."""


@dataclass
class TrainConfig(EvalOptions):
    """T-GRPO."""

    num_generations: int = 8
    """Answers from ordered frames per prompt."""
    temperature: float = 1.0
    """Sampling temperature; log-probs use it too."""
    top_p: float = 0.95
    """Nucleus sampling; 1: off. Log-probs ignore it."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0: off. Log-probs ignore it."""
    rollout_batch_size: int = 64
    """Rows (ordered and shuffled answers) decoded together at most."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    max_tokens_per_row: int | None = None
    """Tokens of a packed row (prompts and answers) at most: a micro-batch over it takes several passes, with the same
    loss; default: no bound. A prompt that leaves no room for max_completion_length is skipped and counted."""

    len_control: bool = True
    """The length reward (reward.length_bonus for correct answers within reward.length_range)."""
    normalize: Literal["std", "none"] = "std"
    """Divide the centred rewards by the group's standard deviation (ddof 1), or only centre them."""
    advantage_eps: float = 1e-4
    """Added to the standard deviation."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """How token losses are averaged: per completion then over completions (grpo), over the micro-batch's tokens
    (bnpo), by a constant (dr_grpo), over the whole batch's tokens (dapo)."""
    importance_level: Literal["token", "sequence"] = "token"
    """Level of the importance ratio; sequence is GSPO."""
    beta: float = 0.04
    """Weight of the KL term; 0 needs no reference model."""
    kl_clamp: float = 10.0
    """Clamp on ref_logp - logp inside the KL term."""
    clip_low: float | None = None
    """Clip the ratio at 1 - clip_low; default: no clip."""
    clip_high: float | None = None
    """Clip the ratio at 1 + clip_high; default: no clip."""
    num_iterations: int = 1
    """Optimizer steps per rollout; more than one uses the rollout's log-probs, recomputed, as old log-probs."""
    dynamic_sampling: int = 0
    """Extra rollouts of up to this many batches a step to replace prompts whose group has no variance in reward; 0:
    off."""

    log_tokens: int = 1
    """Prompts per step whose answers rollouts.jsonl holds token by token with log-probs, for the report; 0: none."""

    compat: Literal["video-r1"] | None = None
    """video-r1: every default as in the reference code; explicit options still win."""

    def __post_init__(self) -> None:
        check_eval(self)
        group = self.num_generations
        _expect("num_generations", group, "at least 2 (the group is its own baseline)", group >= 2)
        _expect("temperature", self.temperature, "above 0", self.temperature > 0)
        _expect("top_p", self.top_p, "in (0, 1]", 0 < self.top_p <= 1)
        _expect("top_k", self.top_k, "0 (off) or more", self.top_k >= 0)
        _expect("rollout_batch_size", self.rollout_batch_size, "at least 1", self.rollout_batch_size >= 1)
        kv = self.rollout.kv_mib
        _expect("rollout.kv_mib", kv, "at least 1, or null", kv is None or kv >= 1)
        _expect("rollout.timeout", self.rollout.timeout, "above 0", self.rollout.timeout > 0)
        _expect("rollout.retries", self.rollout.retries, "0 or more", self.rollout.retries >= 0)
        _expect("rollout.concurrency", self.rollout.concurrency, "at least 1", self.rollout.concurrency >= 1)
        _expect("max_tokens_per_row", self.max_tokens_per_row, f"more than max_completion_length "
                f"({self.max_completion_length}), or null for no bound",
                self.max_tokens_per_row is None or self.max_tokens_per_row > self.max_completion_length)
        _expect("beta", self.beta, "0 or more", self.beta >= 0)
        _expect("kl_clamp", self.kl_clamp, "above 0", self.kl_clamp > 0)
        _expect("advantage_eps", self.advantage_eps, "0 or more", self.advantage_eps >= 0)
        _expect("dynamic_sampling", self.dynamic_sampling, "0 (off) or more", self.dynamic_sampling >= 0)
        _expect("log_tokens", self.log_tokens, "0 (none) or more", self.log_tokens >= 0)
        _expect("num_iterations", self.num_iterations, "at least 1", self.num_iterations >= 1)
        _expect("temporal.num_generations", self.temporal.num_generations, "at least 1 (or temporal.enabled false)",
                self.temporal.num_generations is None or self.temporal.num_generations >= 1)
        _expect("reward.length_range", self.reward.length_range, "(low, high) with low <= high",
                self.reward.length_range[0] <= self.reward.length_range[1])
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            _expect(name, value, "above 0", value is None or value > 0)

    @property
    def num_shuffled(self) -> int:
        """Shuffled answers per video prompt; 0 with the temporal reward off."""
        if not self.temporal.enabled:
            return 0
        return self.temporal.num_generations or max(1, self.num_generations // 2)

    @property
    def temporal_apply(self) -> str:
        """``temporal.apply`` with its default resolved."""
        return self.temporal.apply or ("advantage" if self.temporal.rule == "margin" else "reward")


@dataclass
class SFTConfig(EvalOptions):
    """SFT cold start on Video-R1-CoT data: loss on the assistant's tokens only, samples packed into rows."""

    max_length: int = 16384
    """Tokens of a packed row at most; a longer sample is skipped and counted."""
    stop_at_accuracy: float | None = None
    """Stop once the accuracy on data.eval_path reaches this: a cold start should leave RL room to improve."""

    def __post_init__(self) -> None:
        check_eval(self)
        _expect("max_length", self.max_length, "at least 1", self.max_length >= 1)
        _expect("stop_at_accuracy", self.stop_at_accuracy, "in (0, 1]",
                self.stop_at_accuracy is None or 0 < self.stop_at_accuracy <= 1)


@dataclass
class EvaluateConfig(EvalOptions):
    """Accuracy of a model on benchmarks or a data file, frames in order and shuffled."""

    benchmark: list[str] = field(default_factory=list)
    """Benchmarks to answer, from their published files in data.root/<benchmark>: mmvu, mvbench, tempcompass, videomme,
    videommmu, vsibench; or give dataset_name."""
    max_completion_length: int = 1024
    """New tokens per answer at most."""
    eval_samples: int = 0
    """Questions to ask (of each benchmark), from the top; 0: all."""
    eval_top_p: float = 1.0
    """Nucleus sampling, where eval_temperature is above 0; 1: off."""
    eval_num_samples: int = 1
    """Answers to each question, where eval_temperature is above 0; their mean accuracy counts."""
    resume: str | None = None
    """auto: go on with the evaluation in output_dir; what is answered is not asked again."""

    def __post_init__(self) -> None:
        check_eval(self)
        _expect("eval_top_p", self.eval_top_p, "in (0, 1]", 0 < self.eval_top_p <= 1)
        _expect("eval_num_samples", self.eval_num_samples, "at least 1", self.eval_num_samples >= 1)
        if self.eval_temperature == 0:
            greedy = "1, or eval_temperature above 0 (0 is greedy: every answer is the same)"
            _expect("eval_top_p", self.eval_top_p, greedy, self.eval_top_p == 1)
            _expect("eval_num_samples", self.eval_num_samples, greedy, self.eval_num_samples == 1)


# The reference code's values wherever they are defaults of its launch script or trainer.
COMPAT: dict[str, dict[str, object]] = {
    "video-r1": {
        "num_generations": 8, "max_completion_length": 768, "max_prompt_length": 16384,
        "temperature": 1.0, "top_p": 0.95, "top_k": 50,
        "temporal.enabled": True, "temporal.rule": "reference", "temporal.alpha": 0.3, "temporal.mu": 0.8,
        "temporal.apply": "reward", "temporal.shuffle_unit": "frame", "temporal.num_generations": None,
        "len_control": True, "reward.length_bonus": 0.2, "reward.length_range": (320, 512),
        "reward.correct_above": 0.1, "reward.lenient": False, "reward.format_weight": 1.0,
        "normalize": "std", "advantage_eps": 1e-4,
        "loss_type": "grpo", "importance_level": "token", "beta": 0.04, "kl_clamp": 10.0,
        "clip_low": None, "clip_high": None, "num_iterations": 1,
        "learning_rate": 1e-6, "lr_scheduler_type": "cosine", "weight_decay": 0.01, "max_grad_norm": 5.0,
        "freeze_vision": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
        "video.max_frames": 16, "video.fps": 2.0, "video.max_pixels": VIDEO_MAX_PIXELS,
        "video.min_pixels": None, "video.image_max_pixels": IMAGE_MAX_PIXELS,
    },
}  # fmt: skip


def check_common(config: CommonConfig) -> None:
    """Range checks of the shared options."""
    _check_finite(config, "")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_prompt_length", "logging_steps",
                 "max_nonfinite_steps"):
        _expect(name, getattr(config, name), "at least 1", getattr(config, name) >= 1)
    for name in ("warmup_steps", "save_steps", "weight_decay"):
        _expect(name, getattr(config, name), "0 or more", getattr(config, name) >= 0)
    _expect("learning_rate", config.learning_rate, "above 0", config.learning_rate > 0)
    _expect("max_grad_norm", config.max_grad_norm, "above 0", config.max_grad_norm > 0)
    _expect("num_train_epochs", config.num_train_epochs, "above 0", config.num_train_epochs > 0)
    _expect("save_total_limit", config.save_total_limit, "at least 1, or null to keep all",
            config.save_total_limit is None or config.save_total_limit >= 1)
    _expect("max_steps", config.max_steps, "0 or more, or -1 (from num_train_epochs)", config.max_steps >= -1)
    for name in ("adam_beta1", "adam_beta2"):
        _expect(name, getattr(config, name), "in [0, 1)", 0 <= getattr(config, name) < 1)
    _expect("lora.rank", config.lora.rank, "0 (off) or more", config.lora.rank >= 0)
    _expect("lora.dropout", config.lora.dropout, "in [0, 1)", 0 <= config.lora.dropout < 1)
    _expect("video.max_frames", config.video.max_frames, "an even number, at least 2",
            config.video.max_frames >= 2 and config.video.max_frames % 2 == 0)
    _expect("video.fps", config.video.fps, "above 0", config.video.fps > 0)
    for kind, low, high in (("video.", config.video.min_pixels, config.video.max_pixels),
                            ("video.image_", config.video.image_min_pixels, config.video.image_max_pixels)):
        _expect(f"{kind}max_pixels", high, "at least 1", high >= 1)
        _expect(f"{kind}min_pixels", low, f"at least 1 and at most {kind}max_pixels ({high})",
                low is None or 1 <= low <= high)
    _expect("data.workers", config.data.workers, "0 or more", config.data.workers >= 0)
    _expect("data.prefetch", config.data.prefetch, "at least 1", config.data.prefetch >= 1)
    _expect("data.shuffle_mb", config.data.shuffle_mb, "at least 1", config.data.shuffle_mb >= 1)
    _expect("data.timeout", config.data.timeout, "above 0", config.data.timeout > 0)
    _expect("data.cache_mb", config.data.cache_mb, "0 (none) or more", config.data.cache_mb >= 0)
    _expect("data.cache_dir_mb", config.data.cache_dir_mb, "at least 1", config.data.cache_dir_mb >= 1)


def check_eval(config: EvalOptions) -> None:
    """Range checks of the options of whatever answers questions."""
    check_common(config)
    _expect("max_completion_length", config.max_completion_length, "at least 1", config.max_completion_length >= 1)
    for name in ("eval_steps", "eval_samples", "eval_temperature"):
        _expect(name, getattr(config, name), "0 or more", getattr(config, name) >= 0)
    for name in ("alpha", "mu"):
        value = getattr(config.temporal, name)
        _expect(f"temporal.{name}", value, "0 or more", value >= 0)


def _check_finite(section: object, prefix: str) -> None:
    """YAML can write .inf and .nan, which no option means anything by."""
    for option in fields(section):  # type: ignore[arg-type]
        value = getattr(section, option.name)
        if is_dataclass(value):
            _check_finite(value, f"{prefix}{option.name}.")
        elif isinstance(value, float):
            _expect(f"{prefix}{option.name}", value, "a finite number", math.isfinite(value))


def _expect(name: str, value: object, expected: str, ok: bool) -> None:
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")
