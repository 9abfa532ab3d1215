"""The teachers of a step: by name, frozen, counted, and watched."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from stillhouse.contract.context import STUDENT, TARGET, TEACHER
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
        return {TEACHER: given}
    for name in given:
        if name in (STUDENT, TARGET):
            raise ConfigError(
                f"a teacher is called '{name}', which is the {name}'s own name; call it otherwise"
            )
    if not given:
        raise ConfigError("teacher is an empty mapping; expected at least one teacher by name, or None")
    return {TEACHER: next(iter(given.values())), **given}


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
