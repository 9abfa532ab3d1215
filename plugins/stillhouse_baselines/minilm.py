"""Relations of self-attention: MiniLMv2, Wang et al. 2021, ACL Findings, arXiv:2012.15828."""

from __future__ import annotations

import math

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from stillhouse.api import (
    SUPPORTS,
    Batch,
    ConfigError,
    Conformance,
    FeaturePair,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    StepInfo,
    StudentOut,
    TeacherOut,
    feature_mean,
    feature_pairs,
    hookimpl,
    kept,
    wide,
)
from stillhouse.kernels import softmax_kl

PARTS = ("queries", "keys", "values")
MOST_HEADS = 48
NAMES = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("c_attn",),
    ("qkv_proj",),
    ("query_key_value",),
)
"""How transformers models name the maps to queries, keys and values: three modules, or one that gives all."""
_CROSS = ("crossattention", "cross_attn", "encoder_attn", "EncDecAttention")


class MiniLMConfig(MethodConfig):
    """Settings of MiniLMv2 relations."""

    student: tuple[str, ...] | None = Field(
        None,
        description="The modules that give queries, keys, values, or one that gives all; default: the last layer's.",
    )
    teacher: tuple[str, ...] | None = Field(
        None, description="The teacher's; the paper takes an upper middle layer of a large teacher."
    )
    heads: int | None = Field(
        None,
        gt=0,
        description="Relation heads; default: the most, up to 48, that both models' widths divide into.",
    )
    weight: float = Field(1.0, gt=0, description="Weight of the three terms together.")

    @field_validator("student", "teacher")
    @classmethod
    def _three_or_one(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(value) not in (1, 3):
            raise ValueError("expected three modules (queries, keys, values), or one that gives all three")
        return value


class MiniLM(Method):
    """``weight / 3 sum over Q, K, V of KL(R_T || R_S)``, ``R = softmax(A_h A_h^T / sqrt(d))`` over the tokens.

    A_h is the part of queries, keys or values that falls to relation head h, of which both models have equally many
    whatever their own heads. KL is the mean over heads and tokens; padding is no token. The relations of a causal model
    are taken between all tokens of a sample. Name it beside ``kd``: alone it trains no output layer, as the paper does
    before it trains on a task.
    """

    api_version = 1
    Config = MiniLMConfig
    requires = frozenset({"hidden_states"})
    supports = SUPPORTS
    config: MiniLMConfig
    conformance = Conformance(
        task="token_classification", minimum=dict.fromkeys(PARTS, 0.0)
    )  # a vector has no relations

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        assert run.teacher is not None
        own = self.config.student or attention_maps(run.target, run.target_name)
        given = self.config.teacher or attention_maps(run.teacher, "teacher")
        both = [names * 3 if len(names) == 1 else names for names in (own, given)]
        pairs = feature_pairs(run, list(zip(*both, strict=True)))
        self.parts = dict(zip(PARTS, pairs, strict=True))
        self._fused = {"student": len(own) == 1, "teacher": len(given) == 1}
        widths = []
        for pair in pairs:
            for who, side in (("student", pair.student), ("teacher", pair.teacher)):
                if not side.tokens:
                    raise ConfigError(
                        f"{run.caller}: {side.role}.{side.name} gives {side.shape}; expected tokens (B, L, H): say which "
                        "modules give queries, keys and values"
                    )
                widths.append(side.width // 3 if self._fused[who] else side.width)
        self.heads = self.config.heads or most_heads(widths)
        if any(width % self.heads for width in widths):
            raise ConfigError(
                f"{run.caller}.heads is {self.heads}, and the widths are {sorted(set(widths))}; expected a number that "
                "divides them: leave it out to have one chosen"
            )
        run.chose("relations", f"{', '.join(own)} -> {', '.join(given)}", f"{self.heads} relation heads")

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, teacher_out: TeacherOut, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        return {
            name: LossTerm(
                self._part(place, pair, student_out, teacher_out, batch, info), self.config.weight / 3
            )
            for place, (name, pair) in enumerate(self.parts.items())
        }

    def _part(
        self,
        place: int,
        pair: FeaturePair,
        student_out: StudentOut,
        teacher_out: TeacherOut,
        batch: Batch,
        info: StepInfo,
    ) -> Tensor:
        student, teacher = pair.of(student_out, teacher_out)
        mask = pair.student.mask(student, batch)
        own, given = (
            self._relations(value.chunk(3, -1)[place] if self._fused[who] else value, mask)
            for who, value in (("student", student), ("teacher", teacher))
        )
        queries = None if mask is None else mask[:, None].expand(own.shape[:-1])
        kl = softmax_kl(own, given, mask=queries, reduction="none").mean(1)  # (B, L)
        return feature_mean(kl, pair.student, batch, info)

    def _relations(self, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """Scores ``(B, heads, L, L)`` of ``(B, L, H)`` before the softmax; what is no token gets none."""
        vectors = wide(kept(vectors, mask)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = vectors @ vectors.transpose(-1, -2) / math.sqrt(vectors.shape[-1])
        return scores if mask is None else scores.masked_fill(~mask[:, None, None], -torch.inf)


def most_heads(widths: list[int]) -> int:
    """The greatest number, up to 48, that divides every width."""
    common = math.gcd(*widths)
    return max(count for count in range(1, MOST_HEADS + 1) if common % count == 0)


def attention_maps(model: nn.Module, role: str) -> tuple[str, ...]:
    """The modules that give the last self-attention's queries, keys and values.

    Raises ConfigError where none has one of the usual names.
    """
    modules = dict(model.named_modules())
    for path in reversed(modules):
        parent, _, name = path.rpartition(".")
        if any(part in _CROSS for part in path.split(".")):
            continue
        for names in NAMES:
            found = tuple(f"{parent}.{other}" if parent else other for other in names)
            if name == names[0] and all(other in modules for other in found):
                return found
    usual = ", ".join("/".join(names) for names in NAMES)
    raise ConfigError(
        f"the {role} ({type(model).__name__}) has no self-attention with modules of the usual names ({usual}); expected "
        f"their names under {'teacher' if role == 'teacher' else 'student'}"
    )
