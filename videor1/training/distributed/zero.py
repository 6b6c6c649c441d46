"""Ranks on DeepSpeed's ZeRO-2 and ZeRO-3, started by torchrun or the deepspeed launcher.

Under ZeRO-3 a parameter is in pieces between uses. Training passes run inside the engine, which gathers each module's
parameters around its use, the head's around the whole pass; answers are sampled with all weights gathered once, so that
no token waits for another rank.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from videor1.config import DistributedConfig
from videor1.errors import ConfigError, TrainingStopped, install
from videor1.training.distributed.ranks import Ranks, T, Update

_FIELDS = ("exp_avg", "exp_avg_sq")
_BEAT_SECONDS = 2.0


class ZeroRanks(Ranks):
    """See ``Ranks``; every method but ``is_main`` must be called by all ranks in the same order."""

    def __init__(self, config: DistributedConfig) -> None:
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError(f"distributed.engine: deepspeed: {error}; {install('deepspeed')}") from error
        super().__init__()
        self._deepspeed, self._config = deepspeed, config
        self._engine: Any = None  # from :meth:`prepare` on, and the model in it
        self._hf: Any = None
        if "RANK" not in os.environ:
            raise ConfigError("distributed.engine: deepspeed runs under a launcher: torchrun --nproc_per_node N -m ...")
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        else:  # compiled at the start, for a minute, for faster sums on CPUs: those are for trying things out
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Ranks meet after answers of different lengths: a wait of hours is no failure. Dead ranks are found by _Pulse.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=1))
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._objects = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        self._pulse = _Pulse(self.rank, self.world, config.timeout)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world
        with _lost_rank():
            dist.all_gather_object(values, value, group=self._objects)
        return values

    def prepare(self, hf: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        runner = _Runner(hf)
        if self._config.zero_stage == 3:
            self._deepspeed.zero.register_external_parameter(runner, hf.lm_head.weight)
        self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
            model=runner, optimizer=optimizer, config=self._settings(next(hf.parameters()).dtype, max_grad_norm)
        )
        self._hf = hf

    def _settings(self, dtype: torch.dtype, max_grad_norm: float) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self._config.zero_stage, "overlap_comm": torch.cuda.is_available()}
        if self._config.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # rows differ from step to step: the boundary is set by hand
            "gradient_clipping": max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "steps_per_print": 10**9,
        }

    @contextlib.contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        if self._config.zero_stage < 3:
            yield
            return
        # The hooks that gather and scatter around each module would scatter what is gathered here.
        offload = self._optimizer.parameter_offload
        with self._deepspeed.zero.GatheredParameters(list(self._hf.parameters())):
            for parameter in offload.module.parameters():
                parameter.ds_active_sub_modules.clear()
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks.clear()
            offload.backward_hooks.clear()
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)

    def update(
        self, losses: Iterator[Tensor], count: int, dummy_loss: Callable[[], Tensor],
        parameters: dict[str, nn.Parameter], rate: float,
    ) -> Update:  # fmt: skip
        with _lost_rank():
            return self._update(losses, count, dummy_loss, rate)

    def _update(self, losses: Iterator[Tensor], count: int, dummy_loss: Callable[[], Tensor], rate: float) -> Update:
        passes, total = max(1, *self.gather(count)), 0.0
        for i in range(passes):
            self._engine.set_gradient_accumulation_boundary(i == passes - 1)
            loss = self._engine(lambda i=i: next(losses) if i < count else dummy_loss())
            total += float(loss.detach())
            self._engine.backward(loss * self.world)  # the engine averages over ranks
            if i < passes - 1:
                self._engine.step()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()  # leaves the weights alone where the gradient is not finite, on all ranks alike
        finite = not self._optimizer.overflow
        norm = float(self._engine.get_global_grad_norm()) if finite else math.nan
        return Update(sum(self.gather(total)), norm, finite)

    def trainer_tensors(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Each rank holds the whole state of every world-th parameter: together, all of it, once."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        step = next((state["step"] for state in self._optimizer.optimizer.state.values()), None)
        if step is not None:
            self._link_state()
        tensors: dict[str, Tensor] = {}
        for i, (name, parameter) in enumerate(parameters.items()):
            known = () if step is None else _FIELDS
            fields = {field: safe_get_full_optimizer_state(parameter, field) for field in known}
            if parameter.dtype != torch.float32:
                fields["master"] = safe_get_full_fp32_param(parameter)
            if i % self.world == self.rank:
                tensors |= {f"{name}/{field}": value.cpu() for field, value in fields.items()}
                if step is not None:
                    tensors[f"{name}/step"] = torch.tensor(float(step))
        return tensors

    def load_trainer_tensors(self, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32 and f"{name}/master" in tensors:
                safe_set_full_fp32_param(parameter, tensors[f"{name}/master"])
        step = next((value for key, value in tensors.items() if key.endswith("/step")), None)
        if step is None:
            return
        self._make_state(step)
        for name, parameter in parameters.items():
            for field in _FIELDS:
                safe_set_full_optimizer_state(parameter, tensors[f"{name}/{field}"], field)

    def _make_state(self, step: Tensor) -> None:
        """AdamW's state of the pieces this rank holds, which it would make at its first step."""
        optimizer = self._optimizer
        stage_3 = self._config.zero_stage == 3
        for piece in optimizer.fp32_partitioned_groups_flat if stage_3 else optimizer.single_partition_of_fp32_groups:
            state = {field: torch.zeros_like(piece) for field in _FIELDS}
            optimizer.optimizer.state[piece] = {"step": step.clone(), **state}
        self._link_state()

    def _link_state(self) -> None:
        """Have ZeRO-2 find the state of each parameter; it does so once by itself, before the last group has any."""
        if self._config.zero_stage == 2:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def close(self, *, failed: bool) -> None:
        self._pulse.stop("failed" if failed else "ended")
        if not failed:  # which waits for the others
            dist.destroy_process_group()


@contextlib.contextmanager
def _lost_rank() -> Iterator[None]:
    """A collective that broke off is another rank's end, told in one line."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not isinstance(error, dist.DistError) and not any(word in said for word in ("gloo", "NCCL", "Connection")):
            raise
        raise TrainingStopped(
            f"another process of this run is gone ({said.splitlines()[0][:200]}); the last checkpoint is whole: go on "
            "with --resume auto"
        ) from error


class _Runner(nn.Module):
    """What the engine wraps: runs any function of the model as its forward pass."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        return call()


class _Pulse:
    """Ends this process when another rank has died: a collective would wait for it for ever.

    Each rank writes its time into the group's store every few seconds and reads the others'. A rank that says nothing
    for ``timeout`` seconds, or a store that does not answer, ends the process with status 1 and a message. (A rank that
    has ended well says so first.)
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self._rank, self._world, self._timeout = rank, world, timeout
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("videor1-pulse", store)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def stop(self, last_words: Literal["ended", "failed"]) -> None:
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self._rank), last_words)

    def _beat(self) -> None:
        heard: dict[int, tuple[bytes, float]] = {}
        count = 0
        while not self._stopped.wait(_BEAT_SECONDS):
            count += 1
            try:
                self._store.set(str(self._rank), str(count))
                for other in range(self._world):
                    if other != self._rank:
                        said = self._store.get(str(other)) if self._store.check([str(other)]) else b""
                        if said == b"failed":
                            self._end(f"rank {other} has failed")
                        if other not in heard or heard[other][0] != said or said == b"ended":
                            heard[other] = said, time.monotonic()
                        elif time.monotonic() - heard[other][1] > self._timeout:
                            self._end(f"rank {other} has not been heard of for {self._timeout:g} s")
            except RuntimeError as error:
                self._end(f"the store of rank 0 does not answer ({str(error).splitlines()[0][:100]})")

    def _end(self, reason: str) -> None:
        if self._stopped.is_set():
            return
        sys.stderr.write(f"rank {self._rank}: {reason}; this run ends. Its last checkpoint is whole: --resume auto\n")
        sys.stderr.flush()
        os._exit(1)
