"""Features of sequences against float64 by hand: GPT-2, BERT and T5 shapes, padded left and right, ragged micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.api import IGNORE, ConfigError
from stillhouse.contract.features import depth
from stillhouse.training.step import DistillStep

transformers = pytest.importorskip("transformers")
VOCABULARY, LENGTHS = 23, (6, 3, 5, 2)


def gpt2(width: int, layers: int, seed: int) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=width, n_layer=layers, n_head=2, attn_implementation="eager",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return built(lambda: transformers.GPT2LMHeadModel(config), seed)


def bert(width: int, layers: int, seed: int, kind: str = "BertForTokenClassification") -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, num_labels=4,
        intermediate_size=2 * width, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    return built(lambda: getattr(transformers, kind)(config), seed)


def t5(width: int, layers: int, seed: int) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=layers, num_heads=2,
        num_decoder_layers=layers, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return built(lambda: transformers.T5ForConditionalGeneration(config), seed)


def built(make, seed):
    torch.manual_seed(seed)
    return make().double()


def sentences(seed: int, lengths=LENGTHS, least: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(least, VOCABULARY, (size,), generator=generator) for size in lengths]


def padded(rows, side: str, filler: int, length: int = 0) -> torch.Tensor:
    length = max(length, *(len(row) for row in rows))
    made = torch.full((len(rows), length), filler)
    for number, row in enumerate(rows):
        made[number, slice(0, len(row)) if side == "right" else slice(length - len(row), length)] = row
    return made


def batch(model: str, rows: slice, side: str, more: int = 0):
    """What a tokenizer and a collator give for some of the sentences, padded to their own longest and ``more``."""
    tokens = sentences(3)[rows]
    length = max(map(len, tokens)) + more
    given = {
        "input_ids": padded(tokens, side, 0, length),
        "attention_mask": padded([torch.ones_like(row) for row in tokens], side, 0, length),
        "ids": torch.arange(len(LENGTHS))[rows],
    }
    if model != "t5":  # positions count from the first real token
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if model == "gpt2":
        given["labels"] = padded(tokens, side, IGNORE, length)
    elif model == "bert":
        given["labels"] = padded([row % 4 for row in tokens], side, IGNORE, length)
    else:
        given["labels"] = padded(sentences(4, (3, 5, 2, 4))[rows], "right", IGNORE)
    return given


MODELS = {
    "gpt2": (gpt2, "causal_lm"),
    "bert": (bert, "token_classification"),
    "t5": (t5, "seq2seq_lm"),
}
MICRO = {
    "whole": [slice(0, 4)],
    "four": [slice(n, n + 1) for n in range(4)],
    "ragged": [slice(0, 1), slice(1, 4)],
}


def attached(name: str, method, steps: int | None = None) -> DistillStep:
    make, task = MODELS[name]
    student, teacher = make(8, 2, 1), make(12, 4, 2)
    torch.manual_seed(5)
    return DistillStep(
        method,
        student=student,
        teacher=teacher,
        probe=batch(name, slice(0, 4), "right"),
        task=task,
        steps=steps,
    )


def update(step: DistillStep, name: str, micro: str, side: str, more: int = 0):
    """Metrics and gradients of one update, by parameter."""
    parts = [batch(name, rows, side, more) for rows in MICRO[micro]]
    step.zero_grad()
    step.begin_update(parts)
    for part in parts:
        torch.manual_seed(7)
        step(step.run.student, part).loss.backward()
    metrics = step.end_update()
    models = {**step.run.models}
    return metrics, {
        f"{m}.{n}": p.grad
        for m, model in models.items()
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def rows_by_hand(name: str, student: nn.Module, teacher: nn.Module, hidden):
    """For each sentence alone, without padding: both models' hidden states at the rows that count."""
    for number in range(len(LENGTHS)):
        given = batch(name, slice(number, number + 1), "right")
        inputs = {key: given[key] for key in ("input_ids", "attention_mask")}
        labels = given["labels"]
        if name == "t5":
            inputs["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(labels=labels)
        found = []
        for model, layer in zip((student, teacher), hidden, strict=True):
            out = model(**inputs, output_hidden_states=True)
            states = out.decoder_hidden_states if name == "t5" else out.hidden_states
            found.append(states[layer][0, :-1] if name == "gpt2" else states[layer][0])
        yield found


def hint_by_hand(name, student, teacher, regressors, layers):
    """The squared error over the teacher's width, its mean over all rows of all sentences, and over layers."""
    losses = []
    for regressor, hidden in zip(regressors, layers, strict=True):
        errors = [
            (regressor.map(own) - given.detach()).square().mean(-1)
            for own, given in rows_by_hand(name, student, teacher, hidden)
        ]
        losses.append(torch.cat(errors).mean())
    return torch.stack(losses).mean()


def same_gradients(ours, loss, models, rtol=1e-5):
    named = {
        f"{m}.{n}": p
        for m, model in models.items()
        for n, p in model.named_parameters()
        if f"{m}.{n}" in ours
    }
    theirs = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    largest = max(float(g.abs().max()) for g in theirs if g is not None)
    assert largest > 0
    for entry, gradient in zip(named, theirs, strict=True):
        expected = torch.zeros_like(ours[entry]) if gradient is None else gradient
        torch.testing.assert_close(
            ours[entry], expected, rtol=rtol, atol=rtol * largest, msg=lambda text, e=entry: f"{e}: {text}"
        )


@pytest.mark.parametrize("micro", MICRO)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_fitnets_compares_tokens_over_the_rows_that_count(name, side, micro):
    step = attached(
        name,
        {
            "name": "fitnets",
            "layers": {"hidden_states.1": "hidden_states.3", "hidden_states.2": "hidden_states.4"},
        },
    )
    metrics, ours = update(step, name, micro, side, more=0 if micro == "whole" else 2)
    regressors = step.run.models["fitnets.regressor"]
    expected = hint_by_hand(name, step.run.student, step.teacher, regressors, [(1, 3), (2, 4)])
    torch.testing.assert_close(metrics["fitnets.hint"], expected.detach(), rtol=1e-6, atol=0)
    same_gradients(ours, expected, step.run.models)


def ibmd_by_hand(name, step, layers, settings):
    """The bottleneck's loss in stage 1 without noise, from closed forms in float64."""
    student, teacher = step.run.student, step.teacher
    sides = [step.run.models[f"ibmd.{side}_encoder"] for side in ("student", "teacher")]
    decoder, temperature = step.run.models["ibmd.decoder"], settings["temperature"]
    total: dict[str, list[torch.Tensor]] = {}
    soft = []
    for number in range(len(LENGTHS)):
        given = batch(name, slice(number, number + 1), "right")
        inputs = {key: given[key] for key in ("input_ids", "attention_mask")}
        if name == "t5":
            inputs["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(
                labels=given["labels"]
            )
        logits = teacher(**inputs).logits[0]
        soft.append(((logits[:-1] if name == "gpt2" else logits) / temperature).softmax(-1).detach())
    for place, hidden in enumerate(layers):
        for target, features in zip(soft, rows_by_hand(name, student, teacher, hidden), strict=True):
            means = [
                encoders[place].net(feature.detach() / feature.shape[-1] ** 0.5 if role else feature)
                for role, (encoders, feature) in enumerate(zip(sides, features, strict=True))
            ]
            for who, mean in zip(("student", "teacher"), means, strict=True):
                logs = (decoder(mean) / temperature).log_softmax(-1)
                total.setdefault(f"distortion_{who}", []).append((target * (target.log() - logs)).sum(-1))
                total.setdefault(f"rate_{who}", []).append(0.5 * mean.square().sum(-1))
            total.setdefault("match", []).append(0.5 * (means[0] - means[1]).square().sum(-1))
    return {entry: torch.cat(values).mean() for entry, values in total.items()}


@pytest.mark.parametrize("micro", MICRO)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_ibmd_codes_tokens_over_the_rows_that_count(name, side, micro):
    settings = {"temperature": 3.0, "beta": 0.3, "gamma": 0.7, "dim": 5, "deterministic": True, "alpha": 1.0}
    layers = {"hidden_states.1": "hidden_states.2", "hidden_states.2": "hidden_states.4"}
    step = attached(name, {"name": "ibmd", "layers": layers, **settings}, steps=4)
    metrics, _ = update(step, name, micro, side, more=0 if micro == "whole" else 2)
    expected = ibmd_by_hand(name, step, [(1, 2), (2, 4)], settings)
    for entry, value in expected.items():
        torch.testing.assert_close(
            metrics[f"ibmd.{entry}"],
            value.detach(),
            rtol=1e-5,
            atol=1e-8,
            msg=lambda text, e=entry: f"{e}: {text}",
        )


@pytest.mark.parametrize("method", ["ibmd", "minilm", "at", "rkd", "fsp"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_and_its_side_change_neither_loss_nor_gradient(name, method):
    # Behind a layer norm every token has one mean square, and attention is flat: taken inside of a layer instead.
    inner = "bert.encoder.layer.0.intermediate.dense"
    settings = {
        "ibmd": {"deterministic": True},
        "at": {"layers": {inner: inner} if name == "bert" else "last"},
        "rkd": {"layers": "last"},
        "fsp": {"layers": "last"},
    }
    step = attached(name, {"name": method, **settings.get(method, {})}, steps=100)
    metrics, gradients = update(step, name, "whole", "right")
    for side, more in (("left", 0), ("right", 4), ("left", 3)):
        other, theirs = update(step, name, "whole", side, more)
        torch.testing.assert_close(other["loss"], metrics["loss"], rtol=1e-5, atol=0)
        largest = max(float(g.abs().max()) for g in gradients.values())
        assert largest > 0
        for entry, gradient in gradients.items():
            torch.testing.assert_close(theirs[entry], gradient, rtol=1e-4, atol=1e-5 * largest)


# Rows that are samples.


def classified(rows: slice, side: str, more: int = 0):
    given = batch("bert", rows, side, more)
    return {**given, "labels": torch.arange(len(LENGTHS))[rows] % 4}


@pytest.mark.parametrize("micro", ["whole", "ragged"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_where_a_row_is_a_sample_its_tokens_mean_counts_once(side, micro):
    student, teacher = (
        bert(width, layers, seed, "BertForSequenceClassification")
        for width, layers, seed in ((8, 2, 1), (12, 4, 2))
    )
    method = {"name": "fitnets", "layers": "uniform"}
    step = DistillStep(
        method,
        student=student,
        teacher=teacher,
        probe=classified(slice(0, 4), "right"),
        task="classification",
    )
    parts = [classified(rows, side, 1) for rows in MICRO[micro]]
    step.begin_update(parts)
    for part in parts:
        step(student, part).loss.backward()
    metrics = step.end_update()
    regressors, samples = step.run.models["fitnets.regressor"], []
    for number in range(len(LENGTHS)):
        given = classified(slice(number, number + 1), "right")
        inputs = {key: given[key] for key in ("input_ids", "attention_mask")}
        own, their = (
            model(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher)
        )
        hints = [
            (regressor.map(own[a]) - their[b]).square().mean()
            for regressor, (a, b) in zip(regressors, ((1, 2), (2, 4)), strict=True)
        ]
        samples.append(torch.stack(hints).mean())
    torch.testing.assert_close(
        metrics["fitnets.hint"], torch.stack(samples).mean().detach(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_minilm_relations_are_the_papers_formula(side):
    step = attached("bert", {"name": "minilm", "heads": 4})
    metrics, _ = update(step, "bert", "whole", side, more=3)
    for part, value in (("query", "queries"), ("key", "keys"), ("value", "values")):
        rows = []
        for number in range(len(LENGTHS)):
            given = batch("bert", slice(number, number + 1), "right")
            relations = []
            for model, layer in ((step.run.student, 1), (step.teacher, 3)):
                states = model(input_ids=given["input_ids"], output_hidden_states=True).hidden_states[layer]
                vectors = getattr(model.bert.encoder.layer[layer].attention.self, part)(states)[0].unflatten(
                    -1, (4, -1)
                )
                scores = torch.einsum("ihd,jhd->hij", vectors, vectors) / vectors.shape[-1] ** 0.5
                relations.append(scores.log_softmax(-1))
            own, their = relations
            rows.append((their.exp() * (their - own)).sum(-1).mean(0))
        torch.testing.assert_close(
            metrics[f"minilm.{value}"], torch.cat(rows).mean().detach(), rtol=1e-6, atol=0
        )


# Which layers.


@pytest.mark.parametrize(
    ("rule", "pairs"),
    [
        ("uniform", [(1, 2), (2, 4)]),
        ("last", [(1, 3), (2, 4)]),
        ("middle", [(1, 2)]),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_layers_are_paired_by_rule(name, rule, pairs):
    step = attached(name, {"name": "fitnets", "layers": rule})
    found = [(pair.student.name, pair.teacher.name) for pair in step.plugins.plugins[0].method.pairs]
    assert found == [(f"hidden_states.{own}", f"hidden_states.{their}") for own, their in pairs]


def test_layers_of_a_model_that_is_not_of_transformers_are_its_longest_stack():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 3), nn.Linear(8, 2))
    assert depth(model) == ["1.layers.0", "1.layers.1", "1.layers.2"]
    assert depth(nn.Linear(2, 2)) == []


def test_a_rule_without_a_stack_of_layers_is_refused():
    import toys

    with pytest.raises(
        ConfigError, match=r"fitnets.layers is uniform, and the student \(Sequential\) has no stack"
    ):
        toys.loop(["kd", {"name": "fitnets", "layers": "uniform"}])


def test_an_encoders_states_are_compared_over_the_encoders_own_tokens():
    """They are no rows of the outputs: each sample's mean over its input's tokens counts as often as it has rows."""
    layers = {"encoder_hidden_states.2": "encoder_hidden_states.4"}
    step = attached("t5", {"name": "fitnets", "layers": layers})
    metrics, _ = update(step, "t5", "whole", "left", more=2)
    (regressor,) = step.run.models["fitnets.regressor"]
    values, rows = [], []
    for number in range(len(LENGTHS)):
        given = batch("t5", slice(number, number + 1), "right")
        own, their = (
            model.encoder(input_ids=given["input_ids"], output_hidden_states=True).hidden_states[layer]
            for model, layer in ((step.run.student, 2), (step.teacher, 4))
        )
        values.append((regressor.map(own) - their).square().mean())
        rows.append(given["labels"].shape[1])
    weights = torch.tensor(rows, dtype=torch.float64) / sum(rows)
    torch.testing.assert_close(
        metrics["fitnets.hint"], (torch.stack(values) * weights).sum().detach(), rtol=1e-6, atol=0
    )


class Convolved(nn.Module):
    """Signals ``(B, 10)`` to ``(B, 10, 4)`` class scores a position, through channels first as many as there are positions."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.deep, self.head = nn.Conv1d(1, 10, 3, padding=1), nn.Conv1d(10, 4, 1)

    def forward(self, inputs):
        return self.head(self.deep(inputs[:, None]).tanh()).transpose(1, 2)


def test_a_convolutions_channels_are_no_tokens_though_they_be_as_many():
    inputs, labels = torch.randn(3, 10), torch.randint(4, (3, 10))
    labels[0, 4:] = IGNORE
    step = DistillStep(
        {"name": "fitnets", "layers": {"deep": "deep"}},
        student=Convolved(1), teacher=Convolved(2), probe=(inputs, labels), task="token_classification",
    )  # fmt: skip
    out = step(step.run.student, (inputs, labels))
    (regressor,) = step.run.models["fitnets.regressor"]
    own, their = (model.deep(inputs[:, None]).transpose(1, 2) for model in (step.run.student, step.teacher))
    expected = (regressor.map(own) - their).square().mean(-1)[labels != IGNORE].mean()
    torch.testing.assert_close(out.metrics["fitnets.hint"], expected.detach())


def test_teacher_and_student_with_other_tokens_each_are_refused():
    student, teacher = (
        bert(8, 2, 1, "BertForSequenceClassification"),
        bert(12, 4, 2, "BertForSequenceClassification"),
    )
    given = classified(slice(0, 4), "right")
    probe = {**given, "teacher_inputs": {key: given[key][:, :4] for key in ("input_ids", "attention_mask")}}
    with pytest.raises(
        ConfigError, match=r"features of shape \(4, 6, 8\) and \(4, 4, 12\); expected the same tokens"
    ):
        DistillStep(
            {"name": "fitnets", "layers": "last"},
            student=student,
            teacher=teacher,
            probe=probe,
            task="classification",
        )
