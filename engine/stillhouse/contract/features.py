"""Features of two models side by side: which layers are paired, which positions count, and the mean over them.

A feature is what a named module gives: one vector a sample ``(B, H)``, tokens ``(B, L, H)``, or channels first
``(B, C, positions...)`` as convolutions give it. Tokens are compared over the last axis, one position at a time,
and where the batch's rows are those tokens, over the rows that count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.contract.batch import Batch
from stillhouse.contract.context import TEACHER, RunContext, StepInfo
from stillhouse.contract.outputs import StudentOut, TeacherOut
from stillhouse.errors import ConfigError

Layers = Literal["middle", "penultimate", "ends", "uniform", "last"] | dict[str, str]
"""How layers are paired: by a rule, or the student's layer to the teacher's by name.

``middle``: the middle layer of each. ``penultimate``: what each model's head reads. ``ends``: the
first layer and the penultimate one. ``uniform``: layer m of the
student's M with layer ``m N / M`` of the teacher's N; ``last``: the student's last layers with the teacher's last
ones, one by one (Sun et al. 2019, arXiv:1908.09355, there "PKD-Skip" and "PKD-Last").
"""
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)  # noqa: SLF001
_NO_LAYER = nn.Dropout | nn.Identity


@dataclass(frozen=True)
class Feature:
    """One module's output.

    role, name
        Whose (``teacher``, one of several teachers by name, or a model's name), and its dotted name,
        ``hidden_states.N`` or ``name:input``.
    shape
        On the probe.
    tokens
        Whether it is ``(B, L, H)``.
    own_rows
        Whether its positions may be the batch's rows; an encoder's, before a decoder, are not.
    taught
        Whether it is a teacher's under a name of its own; ``teacher`` is one in any case. A teacher may read other inputs.
    """

    role: str
    name: str
    shape: tuple[int, ...]
    tokens: bool
    own_rows: bool
    taught: bool = False

    @property
    def key(self) -> str:
        """Its name in a model's answer: of several teachers with the teacher's name before it."""
        return f"{self.role}.{self.name}" if self.taught and self.role != TEACHER else self.name

    @property
    def width(self) -> int:
        """Numbers a position: H of tokens, C of channels first."""
        return self.shape[-1] if self.tokens else self.shape[1]

    def of(self, out: StudentOut | TeacherOut) -> Tensor:
        """The feature in a model's answer; ConfigError where the model was not called."""
        found = out.features.get(self.key)
        if found is None:
            raise ConfigError(
                f"no feature {self.role}.{self.name} came with this batch; expected the model to be called: kept soft "
                "labels hold no features, and a stage reads those of its own model alone"
            )
        return found

    def mask(self, value: Tensor, batch: Batch) -> Tensor | None:
        """Bool ``(B, L)``: which tokens of ``value`` count; ``(B,)``: which samples, of other features; None: all."""
        if not self.tokens:
            return batch.mask if batch.mask is None or batch.mask.dim() == 1 else batch.mask.flatten(1).any(1)
        inputs = batch.for_teacher if self.taught or self.role == TEACHER else batch.inputs
        mask = token_mask(inputs, batch, own_rows=self.own_rows)
        return mask if mask is not None and mask.shape == value.shape[:2] else None

    def pooled(self, value: Tensor, batch: Batch) -> Tensor:
        """One vector a sample ``(B, D)``: the mean of the tokens that count; anything else is flattened."""
        if not self.tokens:
            return kept(value.flatten(1), self.mask(value, batch))
        mask = self.mask(value, batch)
        if mask is None:
            return value.mean(1)
        return kept(value, mask).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class FeaturePair:
    """A layer of the student beside one of the teacher."""

    student: Feature
    teacher: Feature

    def of(self, student_out: StudentOut, teacher_out: TeacherOut) -> tuple[Tensor, Tensor]:
        """Both features; ConfigError where they have another number of tokens each."""
        student, teacher = self.student.of(student_out), self.teacher.of(teacher_out)
        if self.student.tokens and student.shape[:2] != teacher.shape[:2]:
            raise ConfigError(_unlike_tokens(self, tuple(student.shape), tuple(teacher.shape)))
        return student, teacher

    def __str__(self) -> str:
        return f"{self.student.role}.{self.student.name} -> {self.teacher.role}.{self.teacher.name}"


def token_mask(inputs: Any, batch: Batch, *, own_rows: bool = True) -> Tensor | None:
    """Bool ``(B, L)``: the batch's mask where rows are tokens, else the attention mask; None where nothing says it.

    own_rows
        False: the positions are the input's, whatever the rows are.
    """
    if own_rows and batch.mask is not None and batch.mask.dim() == 2:
        return batch.mask
    found = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(found, Tensor) or found.dim() != 2:
        return None
    samples = (
        None if batch.mask is None else batch.mask.flatten(1).any(1) if batch.mask.dim() > 1 else batch.mask
    )
    return found.bool() if samples is None else found.bool() & samples[:, None]


def kept(value: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where ``mask`` is False, so that what stands there reaches neither loss nor gradient.

    value ``(B, ...)`` or ``(B, L, ...)``, mask of its leading shape.
    """
    if mask is None:
        return value
    return value.where(mask.reshape(*mask.shape, *[1] * (value.dim() - mask.dim())), value.new_zeros(()))


def wide(value: Tensor) -> Tensor:
    """In float32; float64 stays: what differences and sums are taken in."""
    return value if value.dtype == torch.float64 else value.float()


def feature_mean(values: Tensor, feature: Feature, batch: Batch, info: StepInfo) -> Tensor:
    """The mean over the update's rows of a value a position ``(B, positions...)`` or a sample ``(B,)``: a scalar.

    Where the positions are the batch's rows each is one. Else a sample's value is the mean of its positions, over the
    tokens that are no padding, and where rows are positions it stands for each of the sample's rows.
    """
    rows = batch.mask
    if values.dim() > 1 and rows is not None and rows.shape == values.shape and feature.own_rows:
        return info.mean(values, rows)
    if values.dim() > 1:
        mask = feature.mask(values, batch) if feature.tokens else None
        flat = kept(values, mask).flatten(1)
        values = flat.mean(1) if mask is None else flat.sum(1) / mask.sum(1).clamp(min=1)
    if rows is None or rows.dim() == 1:
        return info.mean(values, rows)
    each = rows.flatten(1).sum(1)
    return info.mean(values * each, each > 0)


# Which layers.


def feature_pairs(run: RunContext, layers: Layers | Sequence[tuple[str, str]]) -> list[FeaturePair]:
    """The pairs that ``layers`` says, asked of the engine and measured on the probe. For ``on_run_start``.

    With several teachers a teacher's layer has the teacher's name before it, as in ``{"layers.2": "big.layers.5"}``.

    Raises ConfigError for a layer that is not there (with the nearest names), that gives no floats ``(B, ...)``, or
    whose tokens are not the partner's.
    """
    role = run.target_name
    assert run.teacher is not None
    several = [name for name in run.teachers if name != TEACHER]
    if isinstance(layers, str):
        if len(several) > 1:
            raise ConfigError(
                f"{run.caller}.layers is {layers}, and there are several teachers ({', '.join(several)}); expected the "
                f"student's layers with a teacher's by name, as in {{layer: {several[0]}.layer}}"
            )
        named = _ruled(run, role, layers)
    else:
        named = list(layers.items()) if isinstance(layers, Mapping) else list(layers)
    pairs = [
        FeaturePair(feature(run, role, own), feature(run, *_whose(run, several, other)))
        for own, other in named
    ]
    for pair in pairs:
        if pair.student.tokens != pair.teacher.tokens or (
            pair.student.tokens and pair.student.shape[:2] != pair.teacher.shape[:2]
        ):
            raise ConfigError(_unlike_tokens(pair, pair.student.shape, pair.teacher.shape))
        if isinstance(layers, str):
            shapes = f"{pair.student.shape[1:]} -> {pair.teacher.shape[1:]}"
            run.chose(f"layer.{pair.student.name}", str(pair), f"{layers}, features {shapes}")
    return pairs


def _whose(run: RunContext, several: Sequence[str], layer: str) -> tuple[str, str]:
    """The teacher that a layer is named of, and the layer's own name."""
    if len(several) < 2:
        return TEACHER, layer
    for name in several:
        if layer.startswith(f"{name}."):
            return name, layer.removeprefix(f"{name}.")
    raise ConfigError(
        f"{run.caller}.layers: '{layer}' says no teacher, and there are several; expected "
        + " or ".join(f"{name}.{layer}" for name in several)
    )


def _model(run: RunContext, role: str) -> nn.Module:
    model = run.teachers.get(role, run.teacher) if _teaches(run, role) else run.models[role]
    assert model is not None
    return model


def _teaches(run: RunContext, role: str) -> bool:
    return role == TEACHER or role in run.teachers


def feature(run: RunContext, role: str, name: str) -> Feature:
    """Ask the engine for a module's output, and measure it on the probe."""
    run.capture(role, name)
    found = run.outputs(role).features.get(name)
    if not isinstance(found, Tensor) or found.dim() < 2 or not found.is_floating_point():
        got = "nothing" if found is None else f"{getattr(found, 'dtype', type(found).__name__)}"
        shape = tuple(found.shape) if isinstance(found, Tensor) else ()
        raise ConfigError(
            f"{run.caller}: {role}.{name} gives {got} of shape {shape}; expected floats (B, ...): name another module"
        )
    model = _model(run, role)
    tokens = _tokens(run, model, role, name, found)
    return Feature(role, name, tuple(found.shape), tokens, _decodes(model, name), _teaches(run, role))


def _ruled(run: RunContext, role: str, rule: str) -> list[tuple[str, str]]:
    models = {role: run.models[role], TEACHER: run.teacher}
    if rule == "penultimate":
        own, other = (called(run, name)[-2] for name in models)
        return [(own, other)]
    if rule == "ends":
        own_order, other_order = (called(run, name)[:-1] for name in models)
        if min(len(own_order), len(other_order)) < 2:
            raise ConfigError(
                f"{run.caller}.layers is ends, and a model has one layer before its head; name them"
            )
        return [(own_order[0], other_order[0]), (own_order[-1], other_order[-1])]
    assert run.teacher is not None
    own_layers, others = depth(run.models[role]), depth(run.teacher)
    if rule == "middle":
        own, other = (
            layers[(len(layers) - 1) // 2] if layers else _middle(run, name)
            for name, layers in ((role, own_layers), (TEACHER, others))
        )
        return [(own, other)]
    for name, layers in ((role, own_layers), (TEACHER, others)):
        if not layers:
            raise ConfigError(
                f"{run.caller}.layers is {rule}, and the {name} ({type(models[name]).__name__}) has no stack of layers; "
                "expected a mapping from its modules to the teacher's"
            )
    count, deep = len(own_layers), len(others)
    if rule == "last":
        return list(zip(own_layers[-deep:], others[-count:], strict=True))
    return [(own, others[max(1, (m * deep) // count) - 1]) for m, own in enumerate(own_layers, 1)]


def depth(model: nn.Module) -> list[str]:
    """The names of a model's layers, first to last: hidden states of a transformers model, else its longest stack.

    Of an encoder and a decoder the decoder's, whose positions are the outputs'. Empty where there is no stack.
    """
    config = getattr(model, "config", None)
    names = ("num_decoder_layers", "decoder_layers") if _two_sided(model) else ("num_hidden_layers",)
    for name in names:
        count = getattr(config, name, None)
        if isinstance(count, int):
            return [f"hidden_states.{number}" for number in range(1, count + 1)]
    stacks = [
        [f"{name}.{number}" if name else number for number, _ in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(list(module.children())) > 1
        and all(list(child.children()) for child in module.children())
    ]
    return max(reversed(stacks), key=len, default=[])


def called(run: RunContext, role: str) -> list[str]:
    """The innermost modules that give floats, in the order in which a forward pass last called them.

    Raises ConfigError for fewer than two: then no module stands before the head.
    """
    model = _model(run, role)
    seen: dict[str, bool] = {}

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            seen.pop(name, None)
            seen[name] = isinstance(output, Tensor) and output.is_floating_point()

        return keep

    handles = [module.register_forward_hook(keeper(name)) for name, module in model.named_modules() if name]
    try:
        run.outputs(role)
    finally:
        for handle in handles:
            handle.remove()
    inner = [
        name
        for name, floats in seen.items()
        if floats and not any(other.startswith(f"{name}.") for other in seen)
    ]
    if len(inner) < 2:
        raise ConfigError(
            f"{run.caller}: the {role} has no module before its head; expected at least two: wrap its layers in modules, "
            "or name the layers"
        )
    return inner


def _middle(run: RunContext, role: str) -> str:
    """The middle one of the modules without children and dropout."""
    model = _model(run, role)
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if name and not list(module.children()) and not isinstance(module, _NO_LAYER)
    ]
    if not found:
        raise ConfigError(f"{run.caller}: the {role} has no inner module; expected one to take features from")
    return found[(len(found) - 1) // 2]


# What a feature is.


def _tokens(run: RunContext, model: nn.Module, role: str, name: str, found: Tensor) -> bool:
    """Whether ``(B, L, H)``: a transformers model's hidden state, or as many positions as there are tokens."""
    if found.dim() != 3:
        return False
    if "hidden_states." in name:
        return True
    module = dict(model.named_modules()).get(name.partition(":")[0])
    if isinstance(module, _CHANNELS_FIRST):
        return False
    assert run.probe is not None
    inputs = run.probe.for_teacher if _teaches(run, role) else run.probe.inputs
    fits = [run.probe.mask]
    if isinstance(inputs, Mapping):
        fits += [
            inputs.get(key) for key in ("attention_mask", "input_ids", "inputs_embeds", "decoder_input_ids")
        ]
    return any(
        isinstance(item, Tensor) and item.shape[:2] == found.shape[:2] for item in fits if item is not None
    )


def _two_sided(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _decodes(model: nn.Module, name: str) -> bool:
    """Whether a feature's positions may be those of the outputs: not in the encoder of an encoder and a decoder."""
    encoder = "encoder" in name.split(".") or name.startswith("encoder_")
    return not (_two_sided(model) and encoder)


def _unlike_tokens(pair: FeaturePair, own: tuple[int, ...], other: tuple[int, ...]) -> str:
    return (
        f"{pair}: features of shape {own} and {other}; expected the same tokens of both (B, L, ...), or none of either: "
        "pair other layers, or give teacher and student one tokenisation"
    )
