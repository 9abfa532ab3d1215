"""Hugging Face's Trainer, and what is made of it: Seq2SeqTrainer, TRL's SFTTrainer::

from stillhouse.adapters.hf import distilling

distillation = stillhouse.Distillation("kd", teacher=teacher, task="causal_lm", temperature=2.0)
trainer = distilling(Trainer)(model=student, args=args, train_dataset=data, distillation=distillation)
trainer.train()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from stillhouse.adapters import host, state
from stillhouse.adapters.means import Means
from stillhouse.contract.context import STUDENT
from stillhouse.contract.kinds import ID_NAMES
from stillhouse.errors import ConfigError, DataError, MissingExtra
from stillhouse.models.calling import unwrapped
from stillhouse.training.distillation import Distillation
from stillhouse.training.random_state import RandomState
from stillhouse.training.step import DistillStep

try:
    from transformers import Trainer, TrainerCallback
    from transformers.modeling_outputs import SequenceClassifierOutput
    from transformers.trainer_pt_utils import find_batch_size
except ImportError:
    raise MissingExtra("stillhouse.adapters.hf", "transformers", "hf") from None

_OURS = (*ID_NAMES, "mask", "teacher_inputs")  # columns of a data set that the step reads, and no model takes
_PROBE_ROWS = 4


def distilling(base: type[Trainer]) -> type[Any]:
    """A subclass of ``base`` that trains by ``distillation=`` in place of the model's own loss.

    base
        Trainer, or a subclass that leaves the loop to it (Seq2SeqTrainer, TRL's SFTTrainer).

    Its ``compute_loss`` is the step's, so that a subclass's own loss is not in use; everything else is the trainer's:
    data, optimizer, schedule, precision, checkpoints, ``evaluate``, logs (with each loss term by name).

    Raises TypeError for a class that is no Trainer.
    """
    if not (isinstance(base, type) and issubclass(base, Trainer)):
        raise TypeError(f"got {base!r}; expected transformers.Trainer or a subclass of it")
    return type(f"Distilling{base.__name__}", (_Distilling, base), {"__doc__": _Distilling.__doc__})


class _Distilling(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is a distillation's.

    distillation
        A stillhouse.Distillation. It is attached with rows of the training set, so that what does not fit is refused
        in the constructor.
    """

    # The step divides by the rows of the whole update, over all micro-batches and ranks.
    loss_is_scaled_for_ga = True

    _signature_columns: Any

    def __init__(self, *args: Any, distillation: Distillation, **named: Any) -> None:
        self.step: DistillStep | None = None
        self._distillation = distillation
        self._terms, self._means = host.Terms(), Means()
        super().__init__(*args, **named)
        self._refuse()
        self.add_callback(_AfterUpdate(self))
        if self.train_dataset is not None and self.model_init is None:
            self._attach()

    def _refuse(self) -> None:
        """Settings that this trainer would not follow."""
        wrong = ""
        if self.compute_loss_func is not None:
            wrong = "compute_loss_func is a loss of its own, and the loss is the distillation's: leave it out"
        elif self.label_smoother is not None:
            wrong = (
                "label_smoothing_factor smooths the model's own loss, which is not computed: leave it out, and put the "
                "method 'label_smoothing' into the distillation"
            )
        elif self.args.n_gpu > 1:
            wrong = (
                f"one process sees {self.args.n_gpu} GPUs, which Trainer serves by DataParallel: start one process a GPU "
                "(torchrun), or show it one (CUDA_VISIBLE_DEVICES)"
            )
        elif getattr(self.args, "loss_type", "nll") != "nll":  # TRL's
            wrong = f"loss_type='{self.args.loss_type}' is a loss of its own, and the loss is the distillation's: leave it out"
        elif getattr(self, "aux_loss_enabled", False):  # TRL's, for mixtures of experts
            wrong = (
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, and the distillation's loss has no such term: give "
                "router_aux_loss_coef=0.0"
            )
        elif self.is_fsdp_enabled:
            wrong = (
                "fsdp shards the student inside of Trainer, where its loss was never compared with one process's: use "
                "DistributedDataParallel, or fully_shard in a loop of your own"
            )
        elif self.is_deepspeed_enabled:
            wrong = "DeepSpeed makes the optimizer and scales the loss by itself: use DistributedDataParallel"
        if wrong:
            raise ConfigError(f"distilling({type(self).__mro__[2].__name__}): {wrong}")

    # Attaching.

    def _attach(self) -> DistillStep:
        if self.step is not None:
            self.step.close()
        probe, steps = self._look()
        host.place(self._distillation, next(self.model.parameters()).device)
        self.step = host.attach(
            self._distillation,
            self.model,
            trainer=type(self).__name__,
            probe=probe,
            steps=steps,
            seed=self.args.seed,
            divided_by=1.0,
            say=lambda message: print(message) if self.is_world_process_zero() else None,
        )
        return self.step

    def _look(self) -> tuple[Any, int | None]:
        """A few rows as the trainer's own loader gives them, and the updates of the whole training, where that is known.

        No random number is used up.
        """
        outside = RandomState.capture()
        try:
            training = self.train_dataset is not None
            if not training and self.eval_dataset is None:
                raise DataError(
                    "the trainer has no data to find shapes with; expected train_dataset or eval_dataset"
                )
            loader = self.get_train_dataloader() if training else self.get_eval_dataloader()
            rows, steps = loader.dataset, None
            if not isinstance(rows, IterableDataset):
                if not len(rows):
                    raise DataError("the training set is empty; expected one row at least")
                batch = loader.collate_fn([rows[i] for i in range(min(_PROBE_ROWS, len(rows)))])
            else:
                batch = next(iter(loader))
            if training:
                steps = self.set_initial_training_values(self.args, loader)[-1]
            return self._prepare_inputs(batch), steps
        finally:
            outside.restore()

    def _attached(self) -> DistillStep:
        return self.step or self._attach()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns
        self._signature_columns = [*known, *(name for name in _OURS if name not in known)]

    # Training.

    def _prepare_for_training(self, max_steps: int, *args: Any, **named: Any) -> Any:
        step = self.step
        if (
            step is None
            or step.schedule.at.step > 0
            or step.run.steps != max_steps
            or not self._is_student(step)
        ):
            step = self._attach()
        with step.modules.released():
            prepared = super()._prepare_for_training(max_steps, *args, **named)
        host.refuse_unused(step, prepared[0])
        return prepared

    def _is_student(self, step: DistillStep) -> bool:
        return step.run.models[STUDENT] is unwrapped(self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.step is not None:
            host.add_groups(optimizer, self.step, scheduled=self.lr_scheduler is not None)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._attached().begin_update(batches)
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        step = self._attached()
        with self.accelerator.autocast():
            output = step(model, inputs)
        host.sum_when_differentiated(step, output.loss)
        if not torch.is_grad_enabled():
            self._means.add(step, unwrapped(model), output, *self._real(inputs))
        if not return_outputs:
            return output.loss
        logits = None if output.outputs is None else output.outputs.logits
        return output.loss, SequenceClassifierOutput(loss=output.loss, logits=logits)

    def updated(self) -> None:
        """An update was made."""
        step = self._attached()
        self._terms.add(step.end_update())
        for name in step.auxiliary:
            step.run.models[name].zero_grad()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._whole(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._whole(model), grad_norm=grad_norm)

    def _whole(self, model: nn.Module) -> nn.Module:
        """The model, with what is trained beside it."""
        step = self._attached()
        beside = [step.run.models[name] for name in step.auxiliary]
        return nn.ModuleList([model, *beside]) if beside else model

    # Evaluating and logging.

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        # Trainer's own mean counts every batch alike; what is logged and compared is the mean over rows.
        self._means = Means(self._means.on_labels)
        found = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        found.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in self._means.take().items()})
        return found

    def _real(self, inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
        """The batch, and whether it is another than was given: without the rows that fill up the ranks' last one."""
        state, rows = self.accelerator.gradient_state, find_batch_size(inputs)
        if host.ranks() == 1 or not state.end_of_dataloader or state.remainder <= 0 or not rows:
            return inputs, False
        kept = min(max(state.remainder - self.args.process_index * rows, 0), rows)
        if kept == rows:
            return inputs, False
        cut = {k: v[:kept] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}
        return cut if kept else {}, True

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generating: Any,
    ) -> Any:
        # Trainer asks for a loss where there are labels; a teacher gives one without.
        prepared = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, prepared, return_outputs=True)
        if getattr(self.args, "predict_with_generate", False) and not prediction_loss_only:
            _, generated, labels = super().prediction_step(model, inputs, False, ignore_keys, **generating)
            return loss.detach(), generated, labels
        logits = None if prediction_loss_only or outputs.logits is None else outputs.logits.detach()
        labels = tuple(prepared.get(name) for name in self.label_names)
        given = None if prediction_loss_only or any(one is None for one in labels) else labels
        return loss.detach(), logits, given[0] if given is not None and len(given) == 1 else given

    def log(self, logs: dict[str, float], *args: Any, **named: Any) -> None:
        if "loss" in logs:
            logs.update(self._terms.take())
        super().log(logs, *args, **named)

    # Checkpoints: the student by save_pretrained, what stands beside it in a file of ours, the teacher nowhere.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.step is not None:
            state.save(self.step, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state.load(self._attached(), Path(checkpoint))


class _AfterUpdate(TrainerCallback):  # type: ignore[misc]
    """Tells the step of each update, before the trainer logs, evaluates or saves."""

    def __init__(self, trainer: _Distilling) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._trainer.updated()

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._trainer._attached().finish()  # noqa: SLF001
