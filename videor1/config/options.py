"""Every option of the commands, with its default, range and meaning.

The command line (``cli.py``) is built from this file: a field's docstring is the option's ``--help`` text, and the
range in its annotation is checked. Conditions on two options together are checked in ``__post_init__``. Names are those
of the reference code (Video-R1) where it has the option.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from videor1.config.ranges import Range, above, at_least, check_values, expect, is_text

IMAGE_MAX_PIXELS = 256 * 28 * 28
VIDEO_MAX_PIXELS = 128 * 28 * 28
# The most that can be meant. Larger numbers are slips, and would only fail where memory is allocated by them.
MOST_TOKENS = 2**24  # of a prompt, a completion or a row
MOST_ROW = 2**31  # tokens of a packed row, and of all completions of a prompt
MOST_COMPLETIONS = 2**16  # of a prompt, or at a time
MOST_MIB = 2**26  # 64 TiB
MOST_PIXELS = 2**32  # of a frame or an image
MOST_PROCESSES = 2**12

# Those of types.ProblemType, whose module loads torch; a test holds the two equal.
PROBLEM_TYPES = (
    "multiple choice",
    "numerical",
    "OCR",
    "free-form",
    "regression",
    "temporal grounding",
    "spatial grounding",
    "spatial-temporal grounding",
    "tracking",
    "boolean",
    "math",
    "open-ended",
)

UP_TO_ONE = Range("in (0, 1]", gt=0, le=1)
BELOW_ONE = Range("in [0, 1)", ge=0, lt=1)


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@dataclass
class DataConfig:
    """Where the samples are read from, and how they are decoded ahead and cached."""

    root: str | None = None
    """Folder that media paths are relative to and must stay inside; default: the folder of the data file (for remote
    data: the current folder)."""
    stream: bool | None = None
    """Read the data as a stream, in bounded memory, instead of loading it whole; default: true for a .jsonl file of 256
    MiB or more and for everything that is not a single .json or .jsonl file."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    format: Literal["auto", "video-r1", "easyr1", "verl", "swift", "trl", "onethinker"] = "auto"
    """Format of the rows, of dataset_name and data.eval_path alike: this trainer's own (video-r1) or another trainer's;
    auto takes each row for the one that it fits, prints which, and counts a row that two formats read differently as
    ambiguous."""
    problem_type: str | None = None
    """Kind of question of the rows that do not say it, in another trainer's format; default: such a row is an error."""
    eval_path: str | None = None
    """Held-out data file for the periodic evaluation, read by the same data.format."""
    changed_ok: bool = False
    """Resume a run whose data are no longer what its checkpoint was trained on: a list goes on at its position in the
    new order, a stream with its next epoch."""
    shuffle: bool = True
    """Draw the samples in a new seeded order in each epoch; false: in file order."""
    shuffle_mb: Annotated[int, at_least(1, most=MOST_MIB)] = 32
    """Size in MiB of the buffer that a stream is shuffled in; it is filled with rows of pieces from all over the
    data."""
    workers: Annotated[int, at_least(0, most=MOST_PROCESSES)] = 2
    """Processes that decode samples ahead of the training step; 0 decodes in the training process, without a
    timeout."""
    prefetch: Annotated[int, at_least(1, most=MOST_COMPLETIONS)] = 16
    """Maximum number of samples decoded ahead (a step's samples, if there are more of them); bounds the memory, of
    which a video takes about 4.5 MB at the default size."""
    timeout: Annotated[float, above(0, most=1e7)] = 60.0
    """Seconds a worker may spend on one sample before it is killed and the sample is skipped and counted."""
    max_decoded_mb: Annotated[int, at_least(64, most=MOST_MIB)] = 1024
    """Memory in MiB that decoding one sample may take, estimated from the size, the number and the format of its frames
    before they are decoded; a sample that needs more is skipped and counted as too_large."""
    cache_mb: Annotated[int, at_least(0, "0 (none) or more", most=MOST_MIB)] = 512
    """Memory in MiB for decoded 8-bit patches that are kept across epochs; 0 keeps none."""
    cache_dir: str | None = None
    """Folder for decoded 8-bit patches that are kept across runs; runs and ranks may share it; default: none."""
    cache_dir_mb: Annotated[int, at_least(1, most=MOST_MIB)] = 20480
    """Maximum size of data.cache_dir in MiB; the least recently used files are deleted."""


@dataclass
class VideoConfig:
    """How videos and images become patches."""

    max_frames: Annotated[int, Range("an even number, at least 2", ge=2, multiple_of=2, most=2**20)] = 16
    """Maximum number of frames sampled from a video (even)."""
    fps: Annotated[float, above(0, most=1e6)] = 2.0
    """Frames per second to sample."""
    max_pixels: Annotated[int, at_least(1, most=MOST_PIXELS)] = VIDEO_MAX_PIXELS
    """Maximum pixels of a video frame after resizing (height and width are multiples of 28; of Qwen3-VL's and
    Qwen3.5's, of 32)."""
    min_pixels: Annotated[int | None, at_least(1, "at least 1 and at most video.max_pixels", most=MOST_PIXELS)] = None
    """Minimum pixels of a video frame after resizing; default: max_pixels, but not more than 128 * 28 * 28 (as in the
    reference). Qwen3-VL and Qwen3.5: of all frames together; default: 4 * 32 * 32, as its processor has it."""
    total_pixels: Annotated[int | None, at_least(1, most=MOST_PIXELS)] = None
    """Maximum pixels of all frames of a video together, for Qwen3-VL and Qwen3.5; default: 24576 * 32 * 32, as their
    processor has it. Frames become smaller for it; a video that stays above it at the smallest size is skipped and
    counted (over_budget), never cut."""
    image_max_pixels: Annotated[int, at_least(1, most=MOST_PIXELS)] = IMAGE_MAX_PIXELS
    """Maximum pixels of an image after resizing."""
    image_min_pixels: Annotated[int, at_least(1, "at least 1 and at most video.image_max_pixels", most=MOST_PIXELS)] = (
        4 * 28 * 28
    )
    """Minimum pixels of an image after resizing."""
    backend: str = "auto"
    """Decoder: auto, pyav, pyav-nvdec, decord, torchcodec or pynvvideocodec; auto is pyav, which with video.device cuda
    decodes on the GPU's video engine (NVDEC) where that is faster."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the decode workers decode and resize; with cuda each of them has a CUDA context (about 0.5 GB of GPU
    memory)."""


@dataclass
class TemporalConfig:
    """The temporal reward, which compares completions from frames in order with completions from shuffled frames."""

    enabled: bool = True
    """Train with T-GRPO; false: plain GRPO, without completions from shuffled frames."""
    rule: Literal["margin", "threshold", "reference"] = "margin"
    """How the bonus follows from the accuracy p with frames in order and p~ with shuffled frames. margin: alpha *
    (p - p~) if p > p~; threshold: alpha if p > mu * p~; reference: alpha if p >= mu * p~."""
    alpha: Annotated[float, at_least(0)] = 0.3
    """Size of the bonus."""
    mu: Annotated[float, at_least(0)] = 0.8
    """Factor on p~ in the rules threshold and reference."""
    apply: Literal["reward", "advantage"] | None = None
    """Add the bonus to the reward (as the reference does; the group's normalisation nearly cancels it) or to the
    normalised advantage; default: reward for threshold and reference, advantage for margin."""
    shuffle_unit: Literal["frame", "temporal_patch"] = "frame"
    """What is shuffled: single frames, or pairs of frames (which leaves the motion inside each pair visible)."""
    num_generations: Annotated[
        int | None, at_least(1, "at least 1 (or temporal.enabled false)", most=MOST_COMPLETIONS)
    ] = None
    """Completions from shuffled frames per prompt; default: half of num_generations."""
    skip_shuffled: bool = True
    """Skip or stop shuffled completions that can no longer change the advantages. The advantages stay the same; the
    logged rewards may lack a constant per group. false: sample all, so that p~ is known for every prompt."""


@dataclass
class JudgeConfig:
    """The judge: a language model on a server that scores answers which no rule can."""

    url: str | None = None
    """Base URL of a server of OpenAI's API whose model gives the accuracy of answers, from 0 to 1; default: no
    judge."""
    model: str | None = None
    """Name of the model on the server; needed, as the scores that are kept are this model's."""
    problem_types: list[str] = field(default_factory=lambda: ["open-ended", "free-form"])
    """Problem types whose accuracy the judge gives, in training and in evaluations of data files."""
    prompt_file: str | None = None
    """Text file of what the judge is asked, with {question}, {answer} (what stands in the answer's tags) and {solution}
    in it; default: a comparison of the answer with the solution."""
    max_tokens: Annotated[int, at_least(1, most=MOST_TOKENS)] = 1024
    """Maximum number of tokens of the judge's reply, its reasoning included."""
    concurrency: Annotated[int, at_least(1, most=MOST_COMPLETIONS)] = 64
    """Maximum number of requests at a time, of each rank."""
    timeout: Annotated[float, above(0, most=1e7)] = 60.0
    """Seconds that one request may take, to the end of its reply."""
    retries: Annotated[int, at_least(0, most=1000)] = 3
    """How often a request is repeated that fails, or whose reply holds no score, with growing pauses; then the prompt
    is dropped, and counted in rewards/failed."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the API key."""
    cache_dir: str | None = None
    """Folder of the scores that the judge has given, which are not asked for again; runs and ranks may share it;
    default: judge_cache in the run's folder."""


@dataclass
class RewardConfig:
    """The reward of a completion."""

    lenient: bool = False
    """Ignore case, trailing punctuation and thousands separators in answers, read numbers with units, currencies,
    fractions and LaTeX by their value, and score free-form answers in every script; false: the reference's exact
    semantics."""
    correct_above: float = 0.1
    """A completion counts as correct for the temporal and the length bonus when its accuracy reward exceeds this. An
    entry whose own solution would earn no more is left out and counted, unless reward.functions add rewards."""
    correct_above_for: list[str] = field(default_factory=list)
    """Other values of correct_above for some problem types, as type=value, such as "temporal grounding=0.5"."""
    regression: Literal["error", "mra"] = "error"
    """How regression is scored. error: 1 - the relative error, at least 0, as in the reference; mra: mean relative
    accuracy, the share of ten bounds, from 0.5 to 0.05, that the relative error stays within."""
    structure_bonus: Annotated[float, at_least(0)] = 0.0
    """Factor on a reward for the right JSON structure in answers of grounding and tracking, whatever they say, added to
    the format reward of completions that have the form; 0: off (0.5: OneThinker's)."""
    format_weight: float = 1.0
    """Factor on the format reward."""
    length_bonus: float = 0.2
    """Bonus for a correct completion whose length is in length_range (omega: 0.2 in the reference's code, 0.1 in its
    paper)."""
    length_range: tuple[int, int] = (320, 512)
    """Shortest and longest completion that gets the length bonus, in tokens, EOS counted."""
    functions: list[str] = field(default_factory=list)
    """Further reward functions, as module:function; each is called with (completions, samples) and returns one float
    per completion, which is added to the format reward. A completion is the whole answer here, with what the chat
    template opened it with. One that is async def is called with (completion, sample), as soon as that completion has
    ended, and returns one float."""
    concurrency: Annotated[int, at_least(1, most=MOST_COMPLETIONS)] = 64
    """Maximum number of calls at a time of each async function, of each rank."""
    timeout: Annotated[float, above(0, most=1e7)] = 60.0
    """Seconds that one call of an async function may take."""
    retries: Annotated[int, at_least(0, most=1000)] = 3
    """How often a call of an async function is repeated that raises, takes too long or gives no finite number, with
    growing pauses; then the prompt is dropped, and counted in rewards/failed."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def check(self) -> None:
        """Raise a ConfigError for a value of a type that no problem has, or that is not a number."""
        for pair in self.correct_above_for:
            name, _, value = pair.partition("=")
            known = f"type=number with a type of {list(PROBLEM_TYPES)}"
            expect("reward.correct_above_for", pair, known, name in PROBLEM_TYPES and _is_finite(value))

    def above(self, problem_type: str) -> float:
        """Return the accuracy that a correct completion of this type exceeds; the last of several values counts."""
        values = dict(pair.split("=", 1) for pair in self.correct_above_for)
        return float(values.get(problem_type, self.correct_above))


@dataclass
class RolloutConfig:
    """The engine that samples the completions, and its settings."""

    engine: Literal["local", "server"] = "local"
    """local: sample in this process, with the training weights themselves; server: send requests to a server of
    OpenAI's API (vLLM, SGLang)."""
    kv_mib: Annotated[int | None, at_least(1, "at least 1, or null", most=MOST_MIB)] = None
    """Local: memory of the KV cache in MiB, which together with rollout_batch_size bounds the completions sampled at
    once; default: 60% of the free memory of a GPU, no bound on CPU."""
    cuda_graphs: bool = True
    """Local, on a GPU: replay decode steps as CUDA graphs."""
    keep_cache: bool | Literal["auto"] = "auto"
    """Local, on a GPU: keep the KV cache and the graphs of a rollout for the next one, while the model trains too.
    auto: where the plan of the run (--plan) leaves room for them beside training; in several processes, where they take
    at most a tenth of the GPU's memory."""
    decode_weights: Literal["auto", "packed", "model"] = "auto"
    """Local: what a decode step multiplies with. packed: the weights of layers with one input as one matrix, which the
    model's parameters become parts of, or which copies them where they cannot; model: the model's own, in more
    products. auto: packed, unless that takes a copy for which there is no room (as for keep_cache)."""
    url: str = "http://localhost:8000/v1"
    """Server: base URL. The API key is read from the environment variable OPENAI_API_KEY."""
    model: str | None = None
    """Server: name of the model on the server; default: the only one it has."""
    timeout: Annotated[float, above(0, most=1e7)] = 600.0
    """Server: seconds that one request may take, to the end of its reply."""
    retries: Annotated[int, at_least(0, most=1000)] = 3
    """Server: how often a failed request is repeated, with growing pauses."""
    concurrency: Annotated[int, at_least(1, most=MOST_COMPLETIONS)] = 64
    """Server: maximum number of requests at a time."""
    sync: Literal["vllm", "none"] = "vllm"
    """Server: how it gets new weights. vllm: from a checkpoint folder that both can read, through vLLM's development
    routes; none: never (its completions then come from another policy than the one that is trained)."""


@dataclass
class LoraConfig:
    """LoRA through peft. With rank 0 the whole model is trained."""

    rank: Annotated[int, at_least(0, "0 (off) or more", most=MOST_COMPLETIONS)] = 0
    """Rank of the adapters; 0: no LoRA."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: Annotated[float, BELOW_ONE] = 0.0
    """Dropout probability inside the adapters."""
    target_modules: list[str] = field(default_factory=lambda: ["default"])
    """Linear layers of the language model that get an adapter; default: those of the model's family, which are q_proj,
    k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj."""


@dataclass
class ModelConfig:
    """The model's position rule, and kernels of other libraries inside it (results agree up to rounding)."""

    positions: Literal["paper", "transformers"] | None = None
    """Position at which text after a video continues. paper: one past the video's largest position, as Qwen2-VL and
    Qwen2.5-VL were trained and as vLLM serves them; transformers: past its height and width alone, as transformers does
    since 5.3. Default: as the checkpoint was trained, and paper for a model that no run of this library has trained."""
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """Attention of the vision tower, and of prompts at the start of a rollout; flash_attention_2 needs flash-attn and a
    GPU (with sdpa, videor1_kernels computes the prompts' attention)."""
    liger: bool | None = None
    """Use liger-kernel's RMSNorm, SwiGLU and (M-)RoPE; needs a GPU. Default: on a GPU, if liger-kernel is installed."""


@dataclass
class DistributedConfig:
    """Training in several processes on GPUs of one or many machines, started by torchrun or the deepspeed launcher."""

    engine: Literal["none", "deepspeed"] = "none"
    """none: train in this process alone; deepspeed: train in every process of the launcher with DeepSpeed's ZeRO."""
    zero_stage: Literal[2, 3] = 2
    """What is divided among the processes: 2, gradients and optimizer state; 3, the weights too."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in main memory, and run the optimizer step on the CPU."""
    timeout: Annotated[float, above(0, most=1e7)] = 45.0
    """Seconds without a sign of life from another process after which this one ends with a message."""


@dataclass
class CommonConfig:
    """The options that all commands share."""

    model_name_or_path: str | None = None
    """Folder of a model, or its id on the Hugging Face hub: a Qwen2-VL, Qwen2.5-VL, Qwen3-VL (dense) or
    Qwen3.5."""
    dataset_name: str | None = None
    """Data in the Video-R1 JSON format: a .json list or a .jsonl file; or, as a stream, .jsonl, .jsonl.gz or .parquet
    shards (a folder, a glob, a URL, or several joined by commas), a folder that datasets' save_to_disk wrote, or
    hf://user/name[/subset]."""
    output_dir: str | None = None
    """Folder that the run writes to; default: runs/<command>-<date>-<time>."""
    data: DataConfig = field(default_factory=DataConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    system: str | None = None
    """System prompt of every question that brings none of its own; default: the chat template's, if it has one."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's chat template, as a JSON object, such as {"enable_thinking": false}; those of a question
    itself take precedence."""
    max_prompt_length: Annotated[int, at_least(1, most=MOST_TOKENS)] = 16384
    """Maximum number of prompt tokens; a longer prompt is skipped and counted, never cut."""
    per_device_train_batch_size: Annotated[int, at_least(1, most=MOST_COMPLETIONS)] = 1
    """Prompts (SFT: samples) in one forward and backward pass."""
    gradient_accumulation_steps: Annotated[int, at_least(1, most=MOST_COMPLETIONS)] = 1
    """Forward and backward passes per optimizer step."""
    num_train_epochs: Annotated[float, above(0, most=1e6)] = 1.0
    """Passes over the data; max_steps takes precedence where it is set."""
    max_steps: Annotated[int, at_least(-1, "0 or more, or -1 (from num_train_epochs)")] = -1
    """Number of optimizer steps; -1: computed from num_train_epochs."""
    learning_rate: Annotated[float, above(0)] = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule after the warm-up; cosine and linear end at zero."""
    warmup_steps: Annotated[int, at_least(0)] = 0
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, at_least(0)] = 0.01
    """Weight decay of AdamW, applied to matrices only (not to biases and norms)."""
    adam_beta1: Annotated[float, BELOW_ONE] = 0.9
    """AdamW's first beta."""
    adam_beta2: Annotated[float, BELOW_ONE] = 0.999
    """AdamW's second beta."""
    max_grad_norm: Annotated[float, above(0)] = 5.0
    """Maximum norm that the gradient is clipped to."""
    max_nonfinite_steps: Annotated[int, at_least(1)] = 3
    """Stop after this many steps in a row whose loss or gradient is NaN or Inf (each is skipped and counted)."""

    freeze_vision: bool = False
    """Do not train the vision tower and its mergers (Qwen3-VL: those of deepstack too)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    checkpoint_layers: Annotated[int | None, at_least(0)] = None
    """With gradient_checkpointing: recompute only this many of the language model's layers, and keep the activations of
    the others, which saves their recomputation (a third of a layer's training FLOPs). Default: videor1.train on a GPU
    chooses as few as the plan says its free memory needs, and all recompute elsewhere. --plan shows its choice."""
    bf16: bool | None = None
    """Compute in bf16 with fp32 master weights; default: true on a GPU, false on CPU."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Backend of attention, sampling, log-probs, losses and advantages; auto: Triton on a GPU, plain PyTorch
    elsewhere."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda or cuda:N."""

    seed: int = 42
    """Seed of the data order, the sampling, the permutations and the initialisation, each of which has its own
    generator."""
    save_steps: Annotated[int, at_least(0)] = 100
    """Steps between checkpoints, one of which is also written at the end; 0: only at the end."""
    save_total_limit: Annotated[int | None, at_least(1, "at least 1, or null to keep all")] = 2
    """Number of checkpoints to keep; the oldest are deleted."""
    save_only_model: bool = False
    """Leave the optimizer and the trainer state out of checkpoints, which can then not be resumed from."""
    resume: str | None = None
    """auto: continue from the newest checkpoint of output_dir; or the path of a checkpoint to continue from."""
    logging_steps: Annotated[int, at_least(1)] = 1
    """Steps between lines of metrics.jsonl."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Trackers to log to in addition to metrics.jsonl, which is always written."""
    run_name: str | None = None
    """Name of the run in the trackers; default: the run folder's name."""
    disable_tqdm: bool = False
    """Show no progress bar."""

    def __post_init__(self) -> None:
        check_values(self)
        folder = self.output_dir or ""
        # Tokenizers, which every checkpoint holds, can only be written to such a folder.
        expect("output_dir", folder, "a folder whose name is UTF-8 text without null characters", is_text(folder))
        system = self.system
        expect("system", system, "a text", system is None or (is_text(system) and bool(system.strip())))
        pixels = {
            "video.": (self.video.min_pixels, self.video.max_pixels),
            "video.image_": (self.video.image_min_pixels, self.video.image_max_pixels),
        }
        for kind, (low, high) in pixels.items():
            expected = f"at least 1 and at most {kind}max_pixels ({high})"
            expect(f"{kind}min_pixels", low, expected, low is None or low <= high)


@dataclass
class EvalOptions(CommonConfig):
    """The options that every command that samples completions shares."""

    max_completion_length: Annotated[int, at_least(1, most=MOST_TOKENS)] = 768
    """Maximum number of tokens of a completion."""
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval_steps: Annotated[int, at_least(0)] = 0
    """Steps between evaluations on data.eval_path, one of which also runs at the end; 0: only at the end."""
    eval_samples: Annotated[int, at_least(0)] = 256
    """Number of samples of data.eval_path to use, from the top; 0: all."""
    eval_temperature: Annotated[float, at_least(0)] = 0.0
    """Sampling temperature of the evaluation; 0: greedy decoding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reward.check()


@dataclass
class TrainConfig(EvalOptions):
    """T-GRPO."""

    num_generations: Annotated[
        int, at_least(2, "at least 2 (the group is its own baseline)", most=MOST_COMPLETIONS)
    ] = 8
    """Completions from ordered frames per prompt."""
    num_offline: Annotated[int | None, at_least(0, "at least 0, and less than num_generations")] = None
    """Slots of a group that answers in the data (completions) may take, in the place of sampled ones; default: all but
    one. Their log-probs at sampling are not known: their ratio is that of the policy to itself, 1 at a rollout's first
    update."""
    temperature: Annotated[float, above(0)] = 1.0
    """Sampling temperature; log-probs use it too."""
    top_p: Annotated[float, UP_TO_ONE] = 0.95
    """Nucleus sampling: sample among the likeliest tokens whose probabilities sum to this; 1: off. Log-probs ignore
    it."""
    top_k: Annotated[int, at_least(0, "0 (off) or more")] = 0
    """Sample among the k likeliest tokens; 0: off. Log-probs ignore it."""
    rollout_batch_size: Annotated[int, at_least(1, most=MOST_COMPLETIONS)] = 64
    """Maximum number of completions (ordered and shuffled) decoded together."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    max_tokens_per_row: Annotated[
        int | None, above(0, "more than max_completion_length, or null for no bound", most=MOST_ROW)
    ] = None
    """Maximum number of tokens of a packed row (prompts and completions); a larger micro-batch takes several passes,
    with the same loss; default: no bound. A prompt that leaves no room for max_completion_length is skipped and
    counted."""

    len_control: bool = True
    """Give the length reward: reward.length_bonus for correct completions within reward.length_range."""
    normalize: Literal["std", "none", "batch", "gdpo", "ema_task"] = "std"
    """What the rewards, centred in their group, are divided by. std: the group's standard deviation (ddof 1); none:
    nothing; batch: the standard deviation of all rewards of the batch, over all ranks; gdpo: each reward (accuracy,
    format with reward.functions, length bonus, temporal bonus) by its own deviation in the group, and then summed;
    ema_task: a moving average, over batches, of the deviation of the rewards of its problem type."""
    advantage_eps: Annotated[float, at_least(0)] = 1e-4
    """Constant added to the standard deviation before dividing by it."""
    advantage_decay: Annotated[float, BELOW_ONE] = 0.99
    """With normalize ema_task: decay of the moving averages, in each batch that has the problem type."""
    advantage_baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a completion's reward is compared with: the mean of its group, or of the others of its group (RLOO, with
    normalize none)."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"] = "grpo"
    """How token losses are averaged: per completion and then over completions (grpo), over the micro-batch's tokens
    (bnpo), by a constant (dr_grpo), over the whole batch's tokens (dapo), their sums over completions (luspo). Three
    have a policy term of their own: the log-prob times a clipped ratio without a gradient (cispo), a soft gate on the
    ratio (sapo), a weight of the whole completion (vespo)."""
    sapo_temperature_pos: Annotated[float, above(0)] = 1.0
    """Of loss_type sapo: temperature of the gate of completions with a positive advantage."""
    sapo_temperature_neg: Annotated[float, above(0)] = 1.05
    """Of loss_type sapo: temperature of the gate of the other completions."""
    vespo_k_pos: Annotated[float, above(0)] = 2.0
    """Of loss_type vespo: power of the weight of completions with an advantage of 0 or more."""
    vespo_lambda_pos: Annotated[float, above(0)] = 3.0
    """Of loss_type vespo: how fast such a weight falls."""
    vespo_k_neg: Annotated[float, above(0)] = 3.0
    """Of loss_type vespo: power of the weight of the other completions."""
    vespo_lambda_neg: Annotated[float, above(0)] = 2.0
    """Of loss_type vespo: how fast such a weight falls."""
    importance_level: Literal["token", "sequence"] = "token"
    """Level of the importance ratio; sequence is GSPO."""
    beta: Annotated[float, at_least(0)] = 0.04
    """Weight of the KL term; 0 needs no reference model."""
    kl_clamp: Annotated[float, above(0)] = 10.0
    """Bound that ref_logp - logp is clamped to inside the KL term."""
    use_bias_correction_kl: bool = False
    """Multiply the KL term by the importance ratio."""
    clip_low: Annotated[float | None, above(0)] = None
    """Clip the ratio at 1 - clip_low; default: no clip."""
    clip_high: Annotated[float | None, above(0)] = None
    """Clip the ratio at 1 + clip_high; default: no clip."""
    delta: Annotated[float | None, above(0)] = None
    """Bound of the ratio of a completion with a negative advantage, as far as it lies above 1 + clip_high, and of any
    other ratio (two-sided clipping); default: none."""
    clip_dual: Annotated[float | None, above(1)] = None
    """Bound of the ratio of a completion with a negative advantage (dual clip); default: none."""
    entropy_coef: Annotated[float, at_least(0)] = 0.0
    """Weight of an entropy bonus in the loss."""
    importance_correction: Literal["none", "token", "sequence"] = "none"
    """Correct for a rollout that was sampled from another policy than the one that is trained (a server, a quantised
    engine): the policy term is multiplied by exp(log-prob in training - log-prob at sampling), of each token, or as
    the geometric mean of its completion's tokens (sequence)."""
    correction_mode: Literal["truncate", "mask"] = "truncate"
    """What becomes of such a weight outside of its bounds: it is set to the bound (truncate), or its token, or its
    completion, has no loss (mask)."""
    correction_min: Annotated[float | None, at_least(0)] = None
    """Lower bound of these weights; default: none."""
    correction_max: Annotated[float | None, above(0)] = 2.0
    """Upper bound of these weights; null: none."""
    mask_truncated_completions: bool = False
    """Leave completions without an end (cut off at max_completion_length) out of the loss, and out of what it is
    divided by."""
    mask_overlong: Annotated[int, at_least(0)] = 0
    """Tokens below max_completion_length within which a completion's reward falls, linearly, by up to 1, as a part of
    the format reward: DAPO's soft punishment of overlong answers; 0: off."""
    num_iterations: Annotated[int, at_least(1, most=MOST_COMPLETIONS)] = 1
    """Optimizer steps per rollout; more than one uses the rollout's log-probs, recomputed, as old log-probs."""
    dynamic_sampling: Annotated[int, at_least(0, "0 (off) or more", most=MOST_COMPLETIONS)] = 0
    """Maximum number of extra batches that a step samples to replace prompts whose group has no variance in reward; 0:
    off."""

    log_tokens: Annotated[int, at_least(0, "0 (none) or more")] = 1
    """Prompts per step whose completions are written to rollouts.jsonl token by token with log-probs, for the report;
    0: none."""

    demo: Literal["qwen2_5_vl", "qwen3_vl", "qwen3_5"] | None = None
    """The family of the demonstration's tiny model, without a model and data of your own; default: qwen2_5_vl."""
    compat: Literal["video-r1"] | None = None
    """video-r1: every default as in the reference code (the recipe video_r1); options that are given take
    precedence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        row, completion = self.max_tokens_per_row, self.max_completion_length
        expected = f"more than max_completion_length ({completion}), or null for no bound"
        expect("max_tokens_per_row", row, expected, row is None or row > completion)
        tokens = f"at most {MOST_ROW:,} / num_generations ({self.num_generations})"
        expect("max_completion_length", completion, tokens, completion * self.num_generations <= MOST_ROW)
        offline = self.num_offline or 0
        slots = f"at least 0, and less than num_generations ({self.num_generations})"
        expect("num_offline", self.num_offline, slots, offline < self.num_generations)
        cache = self.mask_overlong
        expect("mask_overlong", cache, f"at most max_completion_length ({completion})", cache <= completion)
        low, high = self.correction_min or 0.0, self.correction_max
        at_most = "at most correction_max" if high is None else f"at most correction_max ({high:g})"
        expect("correction_min", self.correction_min, at_most, high is None or low <= high)
        low, high = self.reward.length_range
        expect("reward.length_range", self.reward.length_range, "(low, high) with low <= high", low <= high)

    @property
    def num_shuffled(self) -> int:
        """The number of shuffled completions per video prompt; 0 with the temporal reward off."""
        if not self.temporal.enabled:
            return 0
        return self.temporal.num_generations or max(1, self.num_generations // 2)

    @property
    def scales_by_batch(self) -> bool:
        """Whether rewards are divided by a standard deviation of more than their group."""
        return self.normalize in ("batch", "ema_task")

    @property
    def temporal_apply(self) -> str:
        """``temporal.apply`` with its default resolved."""
        return self.temporal.apply or ("advantage" if self.temporal.rule == "margin" else "reward")


@dataclass
class SFTConfig(EvalOptions):
    """SFT cold start on Video-R1-CoT data: loss on the assistant's tokens only, samples packed into rows."""

    max_length: Annotated[int, at_least(1, most=MOST_ROW)] = 16384
    """Maximum number of tokens of a packed row; a longer sample is skipped and counted."""
    stop_at_accuracy: Annotated[float | None, UP_TO_ONE] = None
    """Stop training once the accuracy on data.eval_path reaches this, because a cold start should leave room for RL to
    improve."""


@dataclass
class EvaluateConfig(EvalOptions):
    """Accuracy of a model on benchmarks or a data file, with frames in order and shuffled."""

    benchmark: list[str] = field(default_factory=list)
    """Benchmarks to evaluate, from their published files in data.root/<benchmark>: mmvu, mvbench, tempcompass,
    videomme, videommmu, vsibench; or give dataset_name."""
    max_completion_length: Annotated[int, at_least(1, most=MOST_TOKENS)] = 1024
    """Maximum number of tokens of a completion."""
    eval_samples: Annotated[int, at_least(0)] = 0
    """Number of questions to use (of each benchmark), from the top; 0: all."""
    eval_top_p: Annotated[float, UP_TO_ONE] = 1.0
    """Nucleus sampling where eval_temperature is above 0; 1: off."""
    eval_num_samples: Annotated[int, at_least(1, most=MOST_COMPLETIONS)] = 1
    """Answers to each question where eval_temperature is above 0; their mean accuracy counts."""
    resume: str | None = None
    """auto: continue the evaluation in output_dir; questions that have been answered are not asked again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_temperature == 0:
            greedy = "1, or eval_temperature above 0 (0 is greedy: every answer is the same)"
            expect("eval_top_p", self.eval_top_p, greedy, self.eval_top_p == 1)
            expect("eval_num_samples", self.eval_num_samples, greedy, self.eval_num_samples == 1)
