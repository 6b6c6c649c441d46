"""Ranks on DeepSpeed's ZeRO-2 and ZeRO-3, started by torchrun or the deepspeed launcher.

Under ZeRO-3 parameters are partitioned over the ranks between uses. Training passes run inside the engine, which
gathers each module's parameters around its use, and the head's around the whole pass. Completions are sampled with all
weights gathered once, so that no token waits for another rank.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from videor1.config import DistributedConfig
from videor1.errors import ConfigError, TrainingStopped, install
from videor1.training.distributed.ranks import Ranks, T, Update

_FIELDS = ("exp_avg", "exp_avg_sq")
_HEARTBEAT_SECONDS = 2.0


class ZeroRanks(Ranks):
    """The ranks of a DeepSpeed run, see ``Ranks``.

    All ranks must call the methods (but not ``is_main``) in the same order.
    """

    def __init__(self, config: DistributedConfig) -> None:
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError(f"distributed.engine: deepspeed: {error}; {install('deepspeed')}") from error
        super().__init__()
        self._deepspeed, self._config = deepspeed, config
        self._engine: Any = None  # set by :meth:`prepare`, as is the model
        self._hf: Any = None
        if "RANK" not in os.environ:
            raise ConfigError("distributed.engine: deepspeed runs under a launcher: torchrun --nproc_per_node N -m ...")
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        else:
            # This extension makes sums on CPUs faster but takes a minute to compile; runs on CPUs are only for trials.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Ranks wait for the one that samples the longest completions, so that a wait of hours is no failure. _Heartbeat
        # detects dead ranks.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=1))
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._objects = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        self._heartbeat = _Heartbeat(self.rank, self.world, config.timeout)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world
        with _report_lost_rank():
            dist.all_gather_object(values, value, group=self._objects)
        return values

    def prepare(self, hf: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        module = _EngineModule(hf)
        if self._config.zero_stage == 3:
            self._deepspeed.zero.register_external_parameter(module, hf.lm_head.weight)
        self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._settings(next(hf.parameters()).dtype, max_grad_norm)
        )
        self._hf = hf

    def _settings(self, dtype: torch.dtype, max_grad_norm: float) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self._config.zero_stage, "overlap_comm": torch.cuda.is_available()}
        if self._config.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # The number of rows varies, so that _update sets the boundary itself.
            "gradient_clipping": max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},  # Sums over the rows of a step lose bits in bf16.
            "steps_per_print": 10**9,
        }

    @property
    def partitioned(self) -> bool:
        return self._config.zero_stage == 3

    def gathered(self, parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        return self._deepspeed.zero.GatheredParameters([*parameters], enabled=self.partitioned)

    @contextlib.contextmanager
    def gathered_parameters(self, held: Mapping[nn.Parameter, Tensor] = MappingProxyType({})) -> Iterator[None]:
        if not self.partitioned:
            yield
            return
        # DeepSpeed's hooks gather and partition parameters around each module: they would undo the gathering here.
        offload = self._optimizer.parameter_offload
        with self.gathered([p for p in self._hf.parameters() if p not in held]):
            for parameter in offload.module.parameters():
                parameter.ds_active_sub_modules.clear()
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks.clear()
            offload.backward_hooks.clear()
            empty = [(parameter, parameter.data) for parameter in held]  # what DeepSpeed has put in their place
            for parameter, value in held.items():
                parameter.data = value
            try:
                yield
            finally:
                for parameter, value in empty:
                    parameter.data = value
                offload._register_deepspeed_module(offload.module)

    def update(
        self,
        losses: Sequence[Callable[[], Tensor]],
        dummy_loss: Callable[[], Tensor],
        parameters: dict[str, nn.Parameter],
        rate: float,
    ) -> Update:
        with _report_lost_rank():
            return self._update(losses, dummy_loss, rate)

    def _update(self, losses: Sequence[Callable[[], Tensor]], dummy_loss: Callable[[], Tensor], rate: float) -> Update:
        passes, total = max(1, *self.gather(len(losses))), 0.0
        for i in range(passes):
            self._engine.set_gradient_accumulation_boundary(i == passes - 1)
            loss = self._engine(losses[i] if i < len(losses) else dummy_loss)
            total += float(loss.detach())
            self._engine.backward(loss * self.world)  # The engine averages over ranks; the loss is their sum.
            if i < passes - 1:
                self._engine.step()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()  # Where a gradient is not finite, this changes no weight on any rank.
        finite = not self._optimizer.overflow
        norm = float(self._engine.get_global_grad_norm()) if finite else math.nan
        return Update(sum(self.gather(total)), norm, finite)

    def trainer_tensors(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the whole optimizer state of every world-th parameter; all ranks together hold each exactly once."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        step = next((state["step"] for state in self._optimizer.optimizer.state.values()), None)
        if step is not None:
            self._link_optimizer_state()
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
        self._create_optimizer_state(step)
        for name, parameter in parameters.items():
            for field in _FIELDS:
                safe_set_full_optimizer_state(parameter, tensors[f"{name}/{field}"], field)

    def _create_optimizer_state(self, step: Tensor) -> None:
        """Create AdamW's state of this rank's partitions, which AdamW itself would create only at its first step."""
        optimizer = self._optimizer
        stage_3 = self._config.zero_stage == 3
        for part in optimizer.fp32_partitioned_groups_flat if stage_3 else optimizer.single_partition_of_fp32_groups:
            state = {field: torch.zeros_like(part) for field in _FIELDS}
            where = part.device if optimizer.optimizer.param_groups[0]["fused"] else step.device
            optimizer.optimizer.state[part] = {"step": step.to(where, copy=True), **state}
        self._link_optimizer_state()

    def _link_optimizer_state(self) -> None:
        """Have ZeRO-2 link each parameter to its optimizer state.

        DeepSpeed does so only once by itself, at a time when the last parameter group has no state yet.
        """
        if self._config.zero_stage == 2:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def close(self, *, failed: bool) -> None:
        self._heartbeat.stop("failed" if failed else "ended")
        if failed:  # The rest would wait for the other ranks.
            return
        if self._engine is not None:
            self._engine.destroy()
        self._deepspeed.comm.destroy_process_group()
        # Threads of a group that something still refers to would be ended by the interpreter's own end, too late.
        self._engine = self._optimizer = self._hf = self._objects = None
        gc.collect()


@contextlib.contextmanager
def _report_lost_rank() -> Iterator[None]:
    """Turn the error of a broken collective, which means that another rank has ended, into one message."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(word in text for word in ("gloo", "NCCL", "Connection")):
            raise
        raise TrainingStopped(
            f"another process of this run is gone ({text.splitlines()[0][:200]}); the last checkpoint is whole: go on "
            "with --resume auto"
        ) from error


class _EngineModule(nn.Module):
    """The module that the engine wraps; its forward pass calls a given function of the model."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        return call()


class _Heartbeat:
    """A thread that ends this process when another rank has died: a collective would wait for it for ever.

    Each rank writes a counter into the group's store every few seconds and reads those of the others. The process ends
    with status 1 and a message if the counter of a rank has not changed for ``timeout`` seconds, or the store does not
    respond. A rank that ends normally writes so first.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self._rank, self._world, self._timeout = rank, world, timeout
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("videor1-heartbeat", store)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self, status: Literal["ended", "failed"]) -> None:
        """End the thread, and tell the other ranks how this one has ended."""
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self._rank), status)

    def _run(self) -> None:
        last_seen: dict[int, tuple[bytes, float]] = {}  # by rank: its value, and when that was first read
        count = 0
        while not self._stopped.wait(_HEARTBEAT_SECONDS):
            count += 1
            try:
                self._store.set(str(self._rank), str(count))
                for other in range(self._world):
                    if other != self._rank:
                        value = self._store.get(str(other)) if self._store.check([str(other)]) else b""
                        if value == b"failed":
                            self._end(f"rank {other} has failed")
                        if other not in last_seen or last_seen[other][0] != value or value == b"ended":
                            last_seen[other] = value, time.monotonic()
                        elif time.monotonic() - last_seen[other][1] > self._timeout:
                            self._end(f"rank {other} has not been heard of for {self._timeout:g} s")
            except RuntimeError as error:
                self._end(f"the store of rank 0 does not answer ({str(error).splitlines()[0][:100]})")

    def _end(self, reason: str) -> None:
        if self._stopped.is_set():
            return
        sys.stderr.write(f"rank {self._rank}: {reason}; this run ends. Its last checkpoint is whole: --resume auto\n")
        sys.stderr.flush()
        os._exit(1)
