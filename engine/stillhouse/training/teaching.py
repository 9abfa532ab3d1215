"""The teachers of a step: by name, frozen, counted, and watched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.contract.context import STUDENT, TARGET, TEACHER
from stillhouse.contract.outputs import TeacherOut
from stillhouse.errors import ConfigError
from stillhouse.models.integrity import Counter, checksum, freeze, sharded, version
from stillhouse.models.stand_in import AdaptersOff
from stillhouse.plugin.dispatch import Plugins


class Teachers:
    """One teacher, several by name, the student's own base, or none.

    first
        The one that is called ``teacher``; None where there is none.
    models
        By name; ``teacher`` is the first of them.
    several
        Their names where there are several.
    """

    def __init__(
        self,
        given: nn.Module | Mapping[str, nn.Module] | str | None,
        models: Mapping[str, nn.Module],
        *,
        moving: bool,
    ) -> None:
        self.models = _named(given, models)
        self.first = next(iter(self.models.values()), None)
        names = [name for name in self.models if name != TEACHER]
        self.several = tuple(names) if len(names) > 1 else ()
        self.counter = Counter()
        self.moving = moving
        every = {id(model): model for model in self.models.values()}
        for model in every.values():
            _refuse_shared(models, model)
            freeze(model)
        self._handles = [model.register_forward_pre_hook(self.counter) for model in every.values()]
        self._every = tuple(every.values())
        # Held as a list: walking through the modules at each update would cost more than looking at the counts.
        self._tensors = [
            tensor for model in every.values() for tensor in (*model.parameters(), *model.buffers())
        ]
        self._writes = sum(map(version, self._tensors))
        # fully_shard puts other tensors in place while a model is called: their bits and writes say nothing.
        self._sharded = any(sharded(model) for model in every.values())
        look = not moving and not self._sharded
        self._bits = [(model, checksum(model)) for model in every.values()] if look else []

    def check(self, plugins: Plugins, *, whole: bool = False) -> None:
        """Raise ConfigError if anything wrote to a frozen teacher.

        whole
            Look at every bit and at modes too, one pass over the weights; else at the counts of writes alone. Of a teacher
            under fully_shard the modes alone are looked at.
        """
        if self.moving or not self.models:
            return
        written = not self._sharded and sum(map(version, self._tensors)) != self._writes
        if written or (whole and any(checksum(model) != before for model, before in self._bits)):
            who = ", ".join(str(plugin) for plugin in plugins.plugins)
            raise ConfigError(
                f"the teacher's weights or buffers were written to, by the trainer or one of {who}; a teacher stays as "
                "it is, bit for bit: copy it to train it, or say teacher_moves=True where it follows the student"
            )
        if whole:
            self.check_modes(plugins)

    def check_modes(self, plugins: Plugins) -> None:
        """Raise ConfigError if a teacher is no longer frozen and in eval mode."""
        who = ", ".join(str(plugin) for plugin in plugins.plugins)
        for model in self._every:
            loose = [name for name, weight in model.named_parameters() if weight.requires_grad]
            if loose or any(module.training for module in model.modules()):
                what = f"unfroze the teacher's '{loose[0]}'" if loose else "put the teacher into train mode"
                raise ConfigError(
                    f"the trainer or one of {who} {what}; a teacher stays frozen and in eval mode: copy it to train it"
                )

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _named(
    given: nn.Module | Mapping[str, nn.Module] | str | None, models: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    if given is None:
        return {}
    if isinstance(given, str):
        if given != "self":
            raise ConfigError(
                f"teacher is '{given}'; expected a module, a mapping of them by name, or 'self'"
            )
        return {TEACHER: AdaptersOff(models[STUDENT])}
    if isinstance(given, nn.Module):
        return {TEACHER: _hookable(given)}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"teacher is {type(given).__name__}; expected a module, a mapping of them by name, or 'self'"
        )
    if len(given) > 1 and TEACHER in given:
        raise ConfigError(
            f"one of several teachers is called '{TEACHER}', which stands for all of them; call it otherwise"
        )
    for name in given:
        if name in (STUDENT, TARGET) or "." in name:
            raise ConfigError(
                f"a teacher is called '{name}'; expected a name that is not student or target, and without a dot"
            )
    if not given:
        raise ConfigError("teacher is an empty mapping; expected at least one teacher by name, or None")
    made = {name: _hookable(model) for name, model in given.items()}
    return {TEACHER: next(iter(made.values())), **made}


class _Scripted(nn.Module):
    """A scripted model, which takes no hooks of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.model(*given, **named)


def _hookable(model: nn.Module) -> nn.Module:
    return _Scripted(model) if isinstance(model, torch.jit.ScriptModule) else model


def _refuse_shared(models: Mapping[str, nn.Module], teacher: nn.Module) -> None:
    """A tensor that teacher and student share may not be one that is trained."""
    own = {id(parameter) for parameter in teacher.parameters()}
    for role, model in models.items():
        for name, parameter in model.named_parameters():
            if id(parameter) in own and parameter.requires_grad:
                raise ConfigError(
                    f"the {role}'s '{name}' is the same tensor as one of the teacher's, which stays frozen; "
                    "expected models of their own: copy.deepcopy one of them, or freeze what they share"
                )


def together(found: Mapping[str, TeacherOut], *, classes: bool) -> TeacherOut:
    """Several teachers as one: the mean of their log-probabilities, or of their outputs where these are none.

    The geometric mean of the distributions (Hinton et al. 2015, arXiv:1503.02531, section 3): it commutes with the
    temperature.
    """
    given: list[Tensor] = []
    for name, out in found.items():
        if not isinstance(out.logits, Tensor) or (given and out.logits.shape != given[0].shape):
            raise ConfigError(
                f"teacher '{name}' gives other outputs than the first; expected the same shape of each"
            )
        given.append(out.logits.float().log_softmax(-1) if classes else out.logits.float())
    features = {key: value for name, out in found.items() for key, value in named(name, out).items()}
    return TeacherOut(torch.stack(given).mean(0), features, dict(found))


def named(teacher: str, out: TeacherOut) -> dict[str, Tensor]:
    """A teacher's features with its name before them."""
    return {f"{teacher}.{module}": value for module, value in out.features.items()}
