"""The one place that knows Lightning's private parts.

Everything here was measured with Lightning 2.6 and stands under test in ``tests/test__host.py``. The rest of the
package speaks to a Trainer through documented names and through this module.
"""

from typing import Any

from lightning_continual._host.gradients import (
    gradient_scale,
    loss_of,
    loss_scale,
    needs_every_gradient,
    require_visible_gradients,
    training_loss,
    training_output,
)
from lightning_continual._host.loaders import (
    drop_early_loaders,
    in_order,
    load_loaders,
    num_batches,
    num_train_samples,
    prepare_loader,
    reload_loaders,
    reloads_every,
    repeated_samples,
    set_reloads_every,
    to_device,
    train_batch_size,
    train_data,
    train_loader,
    validation_limit,
)
from lightning_continual._host.loops import (
    batches_processed,
    callbacks_of,
    data_module_of,
    epoch_was_cut_short,
    epochs_processed,
    fast_dev_run,
    forget_broken_epoch,
    is_between_epochs,
    is_checkpoint,
    is_compiled,
    is_overridden,
    leave_epoch,
    logs_now,
    position,
    set_callbacks,
    set_limits,
    steps_now,
)
from lightning_continual._host.methods import batch_hook_owner, require_batch_hooks, unwrap_methods, wrap_method
from lightning_continual._host.processes import (
    all_sum,
    gather,
    gather_everywhere,
    is_distributed,
    leave_process_group_at_exit,
    random_state,
    random_state_kept,
    set_random_state,
)
from lightning_continual._host.progress import progress
from lightning_continual._host.scoring import score
from lightning_continual._host.sharding import reshard, unsharded
from lightning_continual._host.steps import (
    after_step,
    forget_steps,
    held_by_others,
    hold,
    holders,
    is_of_average,
    parameters_of,
    put_back_others,
)
from lightning_continual._host.traces import observing, without_trace


def release(key: Any) -> None:
    """Take away every wrapped method and everything after steps that was put there under ``key``."""
    unwrap_methods(key)
    forget_steps(key)


__all__ = [
    "after_step",
    "all_sum",
    "batch_hook_owner",
    "batches_processed",
    "callbacks_of",
    "data_module_of",
    "drop_early_loaders",
    "epoch_was_cut_short",
    "epochs_processed",
    "fast_dev_run",
    "forget_broken_epoch",
    "forget_steps",
    "gather",
    "gather_everywhere",
    "gradient_scale",
    "held_by_others",
    "hold",
    "holders",
    "in_order",
    "is_between_epochs",
    "is_checkpoint",
    "is_compiled",
    "is_distributed",
    "is_of_average",
    "is_overridden",
    "leave_epoch",
    "leave_process_group_at_exit",
    "load_loaders",
    "logs_now",
    "loss_of",
    "loss_scale",
    "needs_every_gradient",
    "num_batches",
    "num_train_samples",
    "observing",
    "parameters_of",
    "position",
    "prepare_loader",
    "progress",
    "put_back_others",
    "random_state",
    "random_state_kept",
    "release",
    "reload_loaders",
    "reloads_every",
    "repeated_samples",
    "require_batch_hooks",
    "require_visible_gradients",
    "reshard",
    "score",
    "set_callbacks",
    "set_limits",
    "set_random_state",
    "set_reloads_every",
    "steps_now",
    "to_device",
    "train_batch_size",
    "train_data",
    "train_loader",
    "training_loss",
    "training_output",
    "unsharded",
    "unwrap_methods",
    "validation_limit",
    "without_trace",
    "wrap_method",
]
