"""Every option of the trainer, with its default, its range and its meaning. The command line (``cli.py``) is made from
this file.

Names are the reference's (Video-R1) where it has one. A field's docstring is its ``--help`` text, and what its type is
annotated with is checked. What two options ask of each other stands in ``__post_init__``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from videor1.config.ranges import Range, above, at_least, check_values, expect

IMAGE_MAX_PIXELS = 256 * 28 * 28
VIDEO_MAX_PIXELS = 128 * 28 * 28
UP_TO_ONE = Range("in (0, 1]", gt=0, le=1)
BELOW_ONE = Range("in [0, 1)", ge=0, lt=1)


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
    shuffle_mb: Annotated[int, at_least(1)] = 32
    """Stream: rows of pieces from all over the data are shuffled together, so many MiB of them."""
    workers: Annotated[int, at_least(0)] = 2
    """Decode processes that work ahead of the step; 0 decodes in the training process (no timeout then)."""
    prefetch: Annotated[int, at_least(1)] = 16
    """Samples decoded ahead at most (a step's, where that is more): bounds the memory (about 4.5 MB a video at the
    default size)."""
    timeout: Annotated[float, above(0)] = 60.0
    """Seconds a worker may spend on one sample before it is killed and the sample is skipped and counted."""
    cache_mb: Annotated[int, at_least(0, "0 (none) or more")] = 512
    """Memory for decoded 8-bit patches kept across epochs, in MiB; 0 keeps none."""
    cache_dir: str | None = None
    """Folder for decoded 8-bit patches kept across runs; runs and ranks may share one; default: none."""
    cache_dir_mb: Annotated[int, at_least(1)] = 20480
    """Size of data.cache_dir at most, in MiB: the least recently used files go."""


@dataclass
class VideoConfig:
    """How videos and images become patches."""

    max_frames: Annotated[int, Range("an even number, at least 2", ge=2, multiple_of=2)] = 16
    """Frames sampled from a video at most (even)."""
    fps: Annotated[float, above(0)] = 2.0
    """Frames per second to sample."""
    max_pixels: Annotated[int, at_least(1)] = VIDEO_MAX_PIXELS
    """Pixels of a video frame at most, after the resize (height and width are multiples of 28)."""
    min_pixels: Annotated[int | None, at_least(1, "at least 1 and at most video.max_pixels")] = None
    """Pixels of a video frame at least; default: as many as max_pixels, up to 128 * 28 * 28 (as in the reference)."""
    image_max_pixels: Annotated[int, at_least(1)] = IMAGE_MAX_PIXELS
    """Pixels of an image at most."""
    image_min_pixels: Annotated[int, at_least(1, "at least 1 and at most video.image_max_pixels")] = 4 * 28 * 28
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
    alpha: Annotated[float, at_least(0)] = 0.3
    """Size of the bonus."""
    mu: Annotated[float, at_least(0)] = 0.8
    """Factor on p~ in the rules threshold and reference."""
    apply: Literal["reward", "advantage"] | None = None
    """Add the bonus to the reward (parity; the group's normalisation nearly cancels it) or to the normalised
    advantage; default: reward for threshold and reference, advantage for margin."""
    shuffle_unit: Literal["frame", "temporal_patch"] = "frame"
    """What is permuted: frames, or pairs of frames (which leaves the motion inside each pair visible)."""
    num_generations: Annotated[int | None, at_least(1, "at least 1 (or temporal.enabled false)")] = None
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
    kv_mib: Annotated[int | None, at_least(1, "at least 1, or null")] = None
    """Local: memory of the KV cache, in MiB, which bounds the answers in flight together with rollout_batch_size;
    default: 60% of what is free on a GPU, no bound on CPU."""
    cuda_graphs: bool = True
    """Local, on a GPU: replay decode steps as CUDA graphs."""
    url: str = "http://localhost:8000/v1"
    """Server: its base address. The key is taken from OPENAI_API_KEY."""
    model: str | None = None
    """Server: the name of the model there; default: the only one it has."""
    timeout: Annotated[float, above(0)] = 600.0
    """Server: seconds for one answer."""
    retries: Annotated[int, at_least(0)] = 3
    """Server: further tries of a request that failed, with growing pauses."""
    concurrency: Annotated[int, at_least(1)] = 64
    """Server: requests at a time."""
    sync: Literal["vllm", "none"] = "vllm"
    """Server: how it gets new weights; vllm: from a checkpoint folder that both can read, by vLLM's development
    routes; none: never (its answers then come from another policy than the one that is trained)."""


@dataclass
class LoraConfig:
    """LoRA through peft; rank 0 trains the whole model."""

    rank: Annotated[int, at_least(0, "0 (off) or more")] = 0
    """Rank of the adapters; 0: no LoRA."""
    alpha: float = 32.0
    """Scale of the adapters (alpha / rank)."""
    dropout: Annotated[float, BELOW_ONE] = 0.0
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
    timeout: Annotated[float, above(0)] = 45.0
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

    max_prompt_length: Annotated[int, at_least(1)] = 16384
    """Prompt tokens at most; a longer prompt is skipped and counted, never cut."""
    per_device_train_batch_size: Annotated[int, at_least(1)] = 1
    """Prompts (SFT: samples) in one forward and backward."""
    gradient_accumulation_steps: Annotated[int, at_least(1)] = 1
    """Forward and backward passes per optimizer step."""
    num_train_epochs: Annotated[float, above(0)] = 1.0
    """Passes over the data; max_steps wins where it is set."""
    max_steps: Annotated[int, at_least(-1, "0 or more, or -1 (from num_train_epochs)")] = -1
    """Optimizer steps; -1: from num_train_epochs."""
    learning_rate: Annotated[float, above(0)] = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule after the warm-up; cosine and linear end at zero."""
    warmup_steps: Annotated[int, at_least(0)] = 0
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, at_least(0)] = 0.01
    """AdamW's, on matrices only (not on biases and norms)."""
    adam_beta1: Annotated[float, BELOW_ONE] = 0.9
    """AdamW's first beta."""
    adam_beta2: Annotated[float, BELOW_ONE] = 0.999
    """AdamW's second beta."""
    max_grad_norm: Annotated[float, above(0)] = 5.0
    """Clip the gradient to this norm."""
    max_nonfinite_steps: Annotated[int, at_least(1)] = 3
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
    save_steps: Annotated[int, at_least(0)] = 100
    """Write a checkpoint every so many steps, and at the end; 0: only at the end."""
    save_total_limit: Annotated[int | None, at_least(1, "at least 1, or null to keep all")] = 2
    """Checkpoints to keep; the oldest are deleted."""
    save_only_model: bool = False
    """Leave out the optimizer and the trainer state (no resume)."""
    resume: str | None = None
    """auto: go on from the newest checkpoint of output_dir; or a checkpoint's path."""
    logging_steps: Annotated[int, at_least(1)] = 1
    """Steps between lines of metrics.jsonl."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Trackers beside metrics.jsonl, which is always written."""
    run_name: str | None = None
    """Name shown by the trackers; default: the run folder's name."""
    disable_tqdm: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        check_values(self)
        pixels = {
            "video.": (self.video.min_pixels, self.video.max_pixels),
            "video.image_": (self.video.image_min_pixels, self.video.image_max_pixels),
        }
        for kind, (low, high) in pixels.items():
            expected = f"at least 1 and at most {kind}max_pixels ({high})"
            expect(f"{kind}min_pixels", low, expected, low is None or low <= high)


@dataclass
class EvalOptions(CommonConfig):
    """What every command that answers questions shares."""

    max_completion_length: Annotated[int, at_least(1)] = 768
    """New tokens per answer at most."""
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval_steps: Annotated[int, at_least(0)] = 0
    """Evaluate on data.eval_path every so many steps, and at the end; 0: only at the end."""
    eval_samples: Annotated[int, at_least(0)] = 256
    """Samples of data.eval_path to use, from the top; 0: all."""
    eval_temperature: Annotated[float, at_least(0)] = 0.0
    """Sampling temperature of the evaluation; 0: greedy."""


@dataclass
class TrainConfig(EvalOptions):
    """T-GRPO."""

    num_generations: Annotated[int, at_least(2, "at least 2 (the group is its own baseline)")] = 8
    """Answers from ordered frames per prompt."""
    temperature: Annotated[float, above(0)] = 1.0
    """Sampling temperature; log-probs use it too."""
    top_p: Annotated[float, UP_TO_ONE] = 0.95
    """Nucleus sampling; 1: off. Log-probs ignore it."""
    top_k: Annotated[int, at_least(0, "0 (off) or more")] = 0
    """Sample among the k likeliest tokens; 0: off. Log-probs ignore it."""
    rollout_batch_size: Annotated[int, at_least(1)] = 64
    """Rows (ordered and shuffled answers) decoded together at most."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    max_tokens_per_row: Annotated[int | None, above(0, "more than max_completion_length, or null for no bound")] = None
    """Tokens of a packed row (prompts and answers) at most: a micro-batch over it takes several passes, with the same
    loss; default: no bound. A prompt that leaves no room for max_completion_length is skipped and counted."""

    len_control: bool = True
    """The length reward (reward.length_bonus for correct answers within reward.length_range)."""
    normalize: Literal["std", "none"] = "std"
    """Divide the centred rewards by the group's standard deviation (ddof 1), or only centre them."""
    advantage_eps: Annotated[float, at_least(0)] = 1e-4
    """Added to the standard deviation."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """How token losses are averaged: per completion then over completions (grpo), over the micro-batch's tokens
    (bnpo), by a constant (dr_grpo), over the whole batch's tokens (dapo)."""
    importance_level: Literal["token", "sequence"] = "token"
    """Level of the importance ratio; sequence is GSPO."""
    beta: Annotated[float, at_least(0)] = 0.04
    """Weight of the KL term; 0 needs no reference model."""
    kl_clamp: Annotated[float, above(0)] = 10.0
    """Clamp on ref_logp - logp inside the KL term."""
    clip_low: Annotated[float | None, above(0)] = None
    """Clip the ratio at 1 - clip_low; default: no clip."""
    clip_high: Annotated[float | None, above(0)] = None
    """Clip the ratio at 1 + clip_high; default: no clip."""
    num_iterations: Annotated[int, at_least(1)] = 1
    """Optimizer steps per rollout; more than one uses the rollout's log-probs, recomputed, as old log-probs."""
    dynamic_sampling: Annotated[int, at_least(0, "0 (off) or more")] = 0
    """Extra rollouts of up to this many batches a step to replace prompts whose group has no variance in reward; 0:
    off."""

    log_tokens: Annotated[int, at_least(0, "0 (none) or more")] = 1
    """Prompts per step whose answers rollouts.jsonl holds token by token with log-probs, for the report; 0: none."""

    compat: Literal["video-r1"] | None = None
    """video-r1: every default as in the reference code (the recipe video_r1); explicit options still win."""

    def __post_init__(self) -> None:
        super().__post_init__()
        row, completion = self.max_tokens_per_row, self.max_completion_length
        expected = f"more than max_completion_length ({completion}), or null for no bound"
        expect("max_tokens_per_row", row, expected, row is None or row > completion)
        low, high = self.reward.length_range
        expect("reward.length_range", self.reward.length_range, "(low, high) with low <= high", low <= high)

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

    max_length: Annotated[int, at_least(1)] = 16384
    """Tokens of a packed row at most; a longer sample is skipped and counted."""
    stop_at_accuracy: Annotated[float | None, UP_TO_ONE] = None
    """Stop once the accuracy on data.eval_path reaches this: a cold start should leave RL room to improve."""


@dataclass
class EvaluateConfig(EvalOptions):
    """Accuracy of a model on benchmarks or a data file, frames in order and shuffled."""

    benchmark: list[str] = field(default_factory=list)
    """Benchmarks to answer, from their published files in data.root/<benchmark>: mmvu, mvbench, tempcompass, videomme,
    videommmu, vsibench; or give dataset_name."""
    max_completion_length: Annotated[int, at_least(1)] = 1024
    """New tokens per answer at most."""
    eval_samples: Annotated[int, at_least(0)] = 0
    """Questions to ask (of each benchmark), from the top; 0: all."""
    eval_top_p: Annotated[float, UP_TO_ONE] = 1.0
    """Nucleus sampling, where eval_temperature is above 0; 1: off."""
    eval_num_samples: Annotated[int, at_least(1)] = 1
    """Answers to each question, where eval_temperature is above 0; their mean accuracy counts."""
    resume: str | None = None
    """auto: go on with the evaluation in output_dir; what is answered is not asked again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_temperature == 0:
            greedy = "1, or eval_temperature above 0 (0 is greedy: every answer is the same)"
            expect("eval_top_p", self.eval_top_p, greedy, self.eval_top_p == 1)
            expect("eval_num_samples", self.eval_num_samples, greedy, self.eval_num_samples == 1)
