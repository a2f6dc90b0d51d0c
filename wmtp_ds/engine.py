"""DeepSpeed, wrapped thinly. This is the only file that imports it.

The wrapper holds what is easy to get wrong: clipping that is always set, losses that are normalised over the global
batch (so DeepSpeed must neither average over ranks nor over accumulation steps), weights loaded before the float32
masters are made, a frozen engine without optimizer, and checkpoints that name their tag.
"""

import functools
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmtp_ds import distributed
from wmtp_ds.config.deepspeed_file import offloads
from wmtp_ds.errors import RunError
from wmtp_ds.missing import as_if_missing
from wmtp_ds.peers import Peers, meet
from wmtp_ds.shards import check_shards, plain_data_only

# NCCL ends a process whose collective has timed out, and says so in its own words: not before ours are said.
_NCCL_GRACE = timedelta(seconds=60)


def _import_deepspeed() -> Any:
    warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")
    # Its autotuner, which is never used here, imports mlflow if it is there: two seconds of every rank's start.
    with as_if_missing("mlflow"):
        import deepspeed
    _import_muon()

    # Its chatter is for its developers; warnings are for everyone.
    deepspeed.utils.logger.setLevel(logging.WARNING)
    for handler in deepspeed.utils.logger.handlers:
        handler.setLevel(logging.WARNING)
    return deepspeed


@functools.cache
def _import_muon() -> None:
    """Import an optimizer that is not used here, but that ZeRO-3 looks for, without compiling it.

    That imports torch's compiler: seconds of every rank's start.
    """
    compiler, uncompiled = torch.compile, lambda function, **_: function
    torch.compile = uncompiled  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compiler


def saved_classes() -> list[type]:
    """The classes that DeepSpeed pickles into its shards, besides tensors and plain types."""
    _import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return [ZeroStageEnum, LossScaler, DynamicLossScaler]


def start(device: str, peer_timeout: float = 1800.0) -> torch.device:
    """Form the process group (nccl on GPUs, gloo on CPUs) from the launcher's environment; return this rank's device.

    Args:
        device: "cuda" or "cpu".
        peer_timeout: seconds that a rank waits for another before it gives up.

    Raises:
        RunError: if the group cannot form.
        UserError: if machines were started for different runs.
    """
    os.environ["DS_ACCELERATOR"] = device
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    deepspeed = _import_deepspeed()
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    # An op for inference on CPUs that DeepSpeed would compile here, for a minute and more, and training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if Peers.current is None:
        Peers.current = meet(rank, world_size, peer_timeout)
    timeout = timedelta(seconds=peer_timeout)
    try:
        if device == "cuda":
            deepspeed.init_distributed(dist_backend="nccl", verbose=False, timeout=timeout + _NCCL_GRACE)
        else:
            deepspeed.init_distributed(dist_backend="gloo", verbose=False, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the ranks could not form a process group: {error}") from error
    if Peers.current is not None:
        Peers.current.start()
    return torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")


class Zero3Sharding:
    """Parameters partitioned over ranks as they are made: ``models.loading.Sharding`` for ZeRO-3."""

    def __init__(self, ds_config: dict[str, Any]):
        self._zero = _import_deepspeed().zero
        self._config = ds_config
        self.is_main = distributed.is_main()

    def construct(self) -> AbstractContextManager[Any]:
        """Modules made inside are partitioned module by module."""
        # The config alone: with a dtype of its own, zero.Init turns float32 into bfloat16 on CPUs.
        context: AbstractContextManager[Any] = self._zero.Init(config_dict_or_path=self._config)
        return context

    @contextmanager
    def gathered(self, parameter: nn.Parameter, modify: bool = False) -> Iterator[None]:
        """Inside, the parameter is whole; with ``modify`` rank 0's change is handed to all ranks."""
        if not hasattr(parameter, "ds_id"):  # not partitioned (yet)
            yield
            return
        with self._zero.GatheredParameters([parameter], modifier_rank=0 if modify else None):
            yield

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The parameter's full shape, gathered or not."""
        return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Engine:
    """A module trained under ZeRO-3, whose losses are shares of the global batch's loss.

    Args:
        module: its forward returns whatever the caller wants; the loss inside is given to :meth:`backward`.
        ds_config: a complete DeepSpeed config (``Resolved.deepspeed``).
        param_groups: what to train, as for a torch optimizer.
        optimizer: "adamw" or "sgd".
        betas: AdamW's.
        schedule: optimizer step (from 0) -> factor of the learning rates.
    """

    def __init__(
        self,
        module: nn.Module,
        ds_config: dict[str, Any],
        *,
        param_groups: list[dict[str, Any]],
        optimizer: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Any = None,
    ):
        deepspeed = _import_deepspeed()
        self.world_size = distributed.world_size()
        torch_optimizer = _make_optimizer(deepspeed, ds_config, param_groups, optimizer, betas)
        scheduler = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(torch_optimizer, schedule)
        # DeepSpeed vouches for Adam alone; SGD equals torch's too (tests/test_launch_parity.py).
        ours = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        self._engine, *_ = deepspeed.initialize(
            model=module, config=ds_config | ours, optimizer=torch_optimizer, lr_scheduler=scheduler
        )
        self.sharding = Zero3Sharding(ds_config)
        self.rescaled = False
        self._never_raise_for_loss_scale()

    @property
    def module(self) -> Any:
        """The module itself; its parameters are partitioned."""
        return self._engine.module

    @property
    def step_count(self) -> int:
        """Optimizer steps taken, skipped ones included."""
        return int(self._engine.global_steps)

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a loss or a gradient was not finite."""
        return int(self._engine.skipped_steps)

    @property
    def grad_norm(self) -> Tensor:
        """Gradient norm before clipping, of the last optimizer step, a scalar on its device; NaN before the first."""
        norm = self._engine.get_global_grad_norm()
        return norm if isinstance(norm, Tensor) else torch.tensor(float("nan") if norm is None else float(norm))

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group, for the next step."""
        return float(self._engine.get_lr()[0])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with its parameters gathered as they are needed."""
        return self._engine(*args, **kwargs)

    @contextmanager
    def without_gradient(self, *, evaluate: bool = False) -> Iterator[None]:
        """Forward passes inside need no gradient; with ``evaluate`` the module is in evaluation mode, too."""
        self._engine.train(not evaluate)
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this micro-batch's share of the global batch's loss."""
        # DeepSpeed averages over ranks; shares are to be summed. They are of the whole window already.
        # It skips an update whose gradient is not finite, on all ranks alike, but never looks at the loss, which can be
        # NaN or infinite while the gradient is finite. 0·loss is 0, or NaN for such a loss: it makes the gradient NaN,
        # too, and nobody has had to wait for the loss to come to the host.
        self._engine.backward(loss * (self.world_size + 0 * loss.detach()), scale_wrt_gas=False)

    def step(self) -> None:
        """After each backward; updates the weights when the accumulation window is complete.

        The update is skipped, on all ranks, if the loss of any micro-batch or the gradient is not finite; the learning
        rate stays where it is then. ``rescaled`` is True if that is only because float16's loss scale was too large:
        it is lowered, as long as it can be.
        """
        scaler = self._engine.optimizer.loss_scaler
        can_be_lowered = scaler.dynamic and scaler.cur_scale > scaler.min_scale
        self._engine.step()
        self.rescaled = can_be_lowered and self._engine.optimizer.overflow

    def _never_raise_for_loss_scale(self) -> None:
        # At its smallest, the loss scale is not what is wrong: whoever counts bad steps ends the run, and says why.
        self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False

    def full_value(self, parameter: nn.Parameter) -> Tensor:
        """A trained parameter's float32 master, whole, on every rank (all must call)."""
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter)
        assert value is not None, "only trained parameters have a master"
        tensor: Tensor = value.view(self.sharding.shape(parameter))
        return tensor

    def save_state(self, folder: Path, tag: str, state: dict[str, Any], *, exclude_frozen: bool) -> None:
        """Write this rank's shards (and rank 0's part of the model state) to ``folder/tag``; no ``latest``.

        Raises:
            OSError, RuntimeError: if a file cannot be written, after DeepSpeed's collectives, so that a rank whose
                disk is full leaves no other one waiting.
        """
        writer, failures = self._engine.checkpoint_engine, []

        def save(*arguments: Any, **keywords: Any) -> None:
            try:
                type(writer).save(writer, *arguments, **keywords)
            except (OSError, RuntimeError) as error:
                failures.append(error)

        writer.save = save
        # A copy of DeepSpeed's scripts in each run's folder; exports need none.
        self._engine._copy_recovery_script = lambda _: None
        try:
            self._engine.save_checkpoint(
                str(folder),
                tag=tag,
                # One key of our own: others would overwrite the engine's fields.
                client_state={"wmtp": state},
                save_latest=False,
                exclude_frozen_parameters=exclude_frozen,
            )
        finally:
            del writer.save
        if failures:
            raise failures[0]

    def load_state(self, folder: Path, tag: str, *, strict: bool) -> dict[str, Any]:
        """Restore weights, optimizer and schedule from ``folder/tag``; return this rank's state.

        Learning rates, betas and weight decay stay those that this engine was made with.

        Raises:
            RunError: if the weights do not fit, or DeepSpeed loads nothing, which it does without raising.
            UserError: if a shard asks for code to be run.
        """
        distributed.on_main(lambda: check_shards(folder / tag, saved_classes()))
        settings = self._settings()
        try:
            with plain_data_only(saved_classes()):
                path, client_state = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
        except RuntimeError as error:
            raise RunError(
                f"checkpoint {folder / tag} does not fit this run's model: {' '.join(str(error).split())[:400]}. "
                "Resume with the policy and value head that it was made with."
            ) from error
        self._never_raise_for_loss_scale()  # the scaler is the checkpoint's now
        if path is None or "wmtp" not in client_state:
            raise RunError(f"checkpoint {folder / tag} could not be loaded; resume from another one (--resume PATH).")
        self._apply(settings)
        state: dict[str, Any] = client_state["wmtp"]
        return state

    def load_universal(self, folder: Path, tag: str) -> dict[str, Any]:
        """As :meth:`load_state`, from a universal checkpoint, on any number of ranks; the state is rank 0's.

        Frozen parameters stay as they are.
        """
        self._engine._config.load_universal_checkpoint = True
        try:
            own = self.load_state(folder, tag, strict=False)
        finally:
            self._engine._config.load_universal_checkpoint = False
        # DeepSpeed gives all groups one tensor to count Adam's steps in, which each of them would then count up.
        for state in self._engine.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
        return own

    def _settings(self) -> list[dict[str, Any]]:
        """Of each parameter group all but the parameters."""
        groups = self._engine.optimizer.optimizer.param_groups
        return [{name: value for name, value in group.items() if name != "params"} for group in groups]

    def _apply(self, settings: list[dict[str, Any]]) -> None:
        """Give each group its own settings: a universal load gives the first one's to all, any load those saved."""
        groups, schedule = self._engine.optimizer.optimizer.param_groups, self._engine.lr_scheduler
        for group, own in zip(groups, settings, strict=True):
            group.update(own)
        if schedule is None:
            return
        schedule.base_lrs = [group["initial_lr"] for group in groups]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        for group, base, factor in zip(groups, schedule.base_lrs, factors, strict=True):
            group["lr"] = base * factor
        schedule._last_lr = [group["lr"] for group in groups]

    def communication(self) -> list[tuple[Any, str]]:
        """Objects and names of their methods in which ZeRO-3 gathers and releases weights and reduces gradients.

        Called between computations, by hooks that look them up on the object: replacing them there times them.
        """
        optimizer = self._engine.optimizer
        reductions = ("reduce_independent_p_g_buckets_and_remove_grads", "independent_gradient_partition_epilogue")
        return [
            *_gathers(optimizer.parameter_offload),
            *((optimizer, name) for name in (*reductions, "_partition_all_parameters", "_post_step")),
        ]

    def close(self) -> None:
        """Release memory and hooks, so that another engine can be made in this process."""
        self._engine.destroy()


def _gathers(offload: Any) -> list[tuple[Any, str]]:
    moments = (
        "pre_sub_module_forward",
        "post_sub_module_forward",
        "pre_sub_module_backward",
        "post_sub_module_backward",
    )
    return [(offload, f"{moment}_function") for moment in moments]


def _make_optimizer(
    deepspeed: Any,
    ds_config: dict[str, Any],
    param_groups: Iterable[dict[str, Any]],
    name: str,
    betas: tuple[float, float],
) -> torch.optim.Optimizer:
    groups = list(param_groups)
    if name == "sgd":
        return torch.optim.SGD(groups)
    if offloads(ds_config, "offload_optimizer"):
        # Where optimizer states live in host memory, DeepSpeed's vectorised Adam is several times faster there.
        adam: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, betas=betas, adamw_mode=True)
        return adam
    return torch.optim.AdamW(groups, betas=betas, fused=True)


class FrozenEngine:
    """A module under ZeRO-3 that is only read: the reference model, or a reward model."""

    def __init__(self, module: nn.Module, ds_config: dict[str, Any]):
        deepspeed = _import_deepspeed()
        module.eval().requires_grad_(False)
        # Without an optimizer section, at stage 3: DeepSpeed refuses other stages here.
        self._engine, *_ = deepspeed.initialize(model=module, config=ds_config)
        self._engine.eval()

    @property
    def module(self) -> Any:
        """The module itself; its parameters are partitioned."""
        return self._engine.module

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, without gradient."""
        return self._engine(*args, **kwargs)

    def communication(self) -> list[tuple[Any, str]]:
        """As :meth:`Engine.communication`."""
        return _gathers(self._engine.optimizer)

    def close(self) -> None:
        """Release memory and hooks."""
        self._engine.destroy()
