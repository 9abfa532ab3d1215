"""What goes wrong in silence where a step is used outside of the engine's own loop: one test for each kind.

Losses are compared with a float64 computation by hand over the real positions.
"""

from __future__ import annotations

import copy
import io
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import net, rows

import stillhouse
from stillhouse.api import Batch, LossTerm, Method, Stage, hookimpl
from stillhouse.errors import CheckpointError, ConfigError, DataError

transformers = pytest.importorskip("transformers")

VOCABULARY, T, ALPHA = 50, 2.0, 0.9
TEXTS = [
    [7, 3, 9, 4, 1],
    [2, 8, 8, 5, 1, 6, 9, 3, 1],
    [4, 4, 1],
    [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 1],
]


def gpt2(seed: int, **changed: object) -> nn.Module:
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    off = {name: 0.0 for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop")}
    config = transformers.GPT2Config(**settings, **off, bos_token_id=1, eos_token_id=1, **changed)
    return transformers.GPT2LMHeadModel(config)


def padded(side: str = "right", extra: int = 0, *, labels: bool = True) -> dict[str, torch.Tensor]:
    """The texts as a transformers batch."""
    length = max(map(len, TEXTS)) + extra
    shape = (len(TEXTS), length)
    ids, real = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, text in enumerate(TEXTS):
        place = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
        ids[row, place], real[row, place] = torch.tensor(text), 1
    batch = {"input_ids": ids, "attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
    return {**batch, "labels": ids.masked_fill(real == 0, -100)} if labels else batch


def by_hand(student: nn.Module, teacher: nn.Module, *, labels: bool = True) -> tuple[float, torch.Tensor]:
    """KD over every real next-token position, in float64, one text at a time; and its gradient."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for text in TEXTS:
        ids = torch.tensor([text])
        own, given = student(ids).logits[0, :-1], teacher(ids).logits[0, :-1].detach()
        p = F.softmax(given / T, -1)
        kl = T**2 * (p * (p.log() - F.log_softmax(own / T, -1))).sum()
        ce = F.cross_entropy(own, ids[0, 1:], reduction="sum")
        total = total + (ALPHA * kl + (1 - ALPHA) * ce if labels else kl)
        count += len(text) - 1
    (total / count).backward()
    return float(total / count), gradient(student)


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def kd(teacher: nn.Module, **more: object) -> stillhouse.Distillation:
    return stillhouse.Distillation("kd", teacher=teacher, temperature=T, alpha=ALPHA, **more)


def assert_as_by_hand(student: nn.Module, loss: float, expected: tuple[float, torch.Tensor]) -> None:
    assert loss == pytest.approx(expected[0], abs=1e-6)
    assert (gradient(student) - expected[1]).norm() <= 1e-5 * expected[1].norm()


class TestTokens:
    """Causal models: the shift, the pads, the mask, the divisor."""

    @pytest.mark.parametrize("micros", [1, 4])
    @pytest.mark.parametrize("extra", [0, 4, 12])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_is_the_mean_over_the_real_next_token_positions(self, side, extra, micros):
        student, teacher = gpt2(1), gpt2(2)
        expected = by_hand(student, teacher)
        batch = padded(side, extra)
        parts = [{k: v[n::micros] for k, v in batch.items()} for n in range(micros)]
        with kd(teacher, task="causal_lm").attach(student, probe=batch) as step:
            step.begin_update(parts)
            loss = 0.0
            for part in parts:
                given, _ = step(student, part)
                given.backward()
                loss += float(given)
        assert_as_by_hand(student, loss, expected)

    def test_without_labels_too(self):
        student, teacher = gpt2(1), gpt2(2)
        expected = by_hand(student, teacher, labels=False)
        distillation = stillhouse.Distillation(
            "kd", teacher=teacher, temperature=T, alpha=1.0, task="causal_lm"
        )
        batch = padded("left", 3, labels=False)
        with distillation.attach(student, probe=batch) as step:
            loss, _ = step(student, batch)
            loss.backward()
        assert_as_by_hand(student, float(loss), expected)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_labels_on_pads_count_nowhere_either(self, side):
        student, teacher = gpt2(1), gpt2(2)
        expected = by_hand(student, teacher)
        batch = padded(side, 3)
        batch["labels"] = batch["input_ids"]  # as whoever forgets the -100
        with kd(teacher, task="causal_lm").attach(student, probe=batch) as step:
            loss, _ = step(student, batch)
            loss.backward()
        assert_as_by_hand(student, float(loss), expected)

    @pytest.mark.parametrize("labels", [True, False, "all"])
    def test_packed_rows_are_read_as_the_texts_they_hold(self, labels):
        student, teacher = gpt2(1), gpt2(2)
        expected = by_hand(student, teacher, labels=bool(labels))
        ids = torch.tensor([[token for text in TEXTS for token in text]])
        places = torch.tensor([[place for text in TEXTS for place in range(len(text))]])
        batch = {"input_ids": ids, "position_ids": places}
        if labels:
            batch["labels"] = ids if labels == "all" else ids.masked_fill(places == 0, -100)
        alpha = ALPHA if labels else 1.0
        settings = {"temperature": T, "alpha": alpha, "task": "causal_lm"}
        with stillhouse.Distillation("kd", teacher=teacher, **settings).attach(student, probe=batch) as step:
            loss, _ = step(student, batch)
            loss.backward()
        assert_as_by_hand(student, float(loss), expected)

    def test_a_batch_of_tokens_without_a_task_is_refused_with_the_choice(self):
        with pytest.raises(ConfigError, match=r"(?s)no task.*causal_lm.*seq2seq_lm"):
            kd(gpt2(2)).attach(gpt2(1), probe=padded())

    def test_token_batches_without_labels_are_divided_by_their_positions(self):
        embed = lambda seed: nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 5))
        torch.manual_seed(0)
        student, teacher, ids = embed(1), embed(2), torch.randint(0, 20, (3, 7))
        step = stillhouse.DistillStep(
            {"name": "kd", "temperature": 1.0}, student=student, teacher=teacher, probe=ids
        )
        p, q = teacher(ids).double().softmax(-1), student(ids).double().log_softmax(-1)
        expected = 0.9 * float((p * (p.log() - q)).sum() / 21)
        assert float(step(student, ids).loss) == pytest.approx(expected, abs=1e-6)

    def test_logits_whose_rows_are_not_the_batchs_are_refused(self):
        class Late(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(4, 3)

            def forward(self, inputs):
                return self.head(inputs)[:, 1:]

        x, y = torch.randn(4, 6, 4), torch.zeros(4, 6, dtype=torch.long)
        with pytest.raises(DataError, match=r"outputs of shape \(4, 5, 3\).*\(4, 6\).*same rows"):
            stillhouse.DistillStep("hard_labels", student=Late(), probe=(x, y), task="token_classification")


def bert(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**settings, intermediate_size=32, **off))


def test_masked_language_models_count_the_hidden_tokens_alone():
    student, teacher = bert(1), bert(2)
    batch = padded("right", 2)
    del batch["position_ids"]
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, 1::2] = -100  # nothing is asked there
    own, given = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    kept = batch["labels"] != -100
    p, q = given(**inputs).logits[kept].div(T).softmax(-1).detach(), own(**inputs).logits[kept]
    kl = T**2 * (p * (p.log() - q.div(T).log_softmax(-1))).sum(-1).mean()
    expected = ALPHA * kl + (1 - ALPHA) * F.cross_entropy(q, batch["labels"][kept])
    expected.backward()
    with kd(teacher, task="masked_lm").attach(student, probe=batch) as step:
        loss, _ = step(student, batch)
        loss.backward()
    assert_as_by_hand(student, float(loss), (float(expected), gradient(own)))


def test_encoder_decoder_models_are_not_shifted_twice():
    def t5(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        shape = {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
        }
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(**shape, dropout_rate=0.0, decoder_start_token_id=0)
        )

    student, teacher = t5(1), t5(2)
    source = padded("right", 2, labels=False)
    del source["position_ids"]
    labels = torch.tensor([[5, 6, 1, -100], [7, 8, 9, 1], [3, 1, -100, -100], [4, 4, 4, 1]])
    batch = {**source, "labels": labels}
    own = copy.deepcopy(student).double()
    expected = own(**source, labels=labels)  # transformers' own loss and shift
    expected.loss.backward()
    with stillhouse.Distillation("hard_labels", task="seq2seq_lm").attach(student, probe=batch) as step:
        loss, _ = step(student, batch)
        loss.backward()
    assert_as_by_hand(student, float(loss), (float(expected.loss), gradient(own)))
    with kd(teacher, task="seq2seq_lm").attach(student, probe=batch) as step:
        kept = labels != -100
        p = teacher(**source, labels=labels).logits[kept].double().div(T).softmax(-1)
        q = student(**source, labels=labels).logits[kept].double().detach()
        kl = T**2 * (p * (p.log() - q.div(T).log_softmax(-1))).sum(-1).mean()
        hand = ALPHA * kl + (1 - ALPHA) * F.cross_entropy(q, labels[kept])
        assert float(step(student, batch).loss) == pytest.approx(float(hand), abs=1e-6)


def test_segmentation_has_its_classes_on_axis_1():
    torch.manual_seed(0)
    student, teacher = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
    x, y = torch.randn(4, 2, 5, 6), torch.randint(0, 3, (4, 5, 6))
    y[0, :2] = -100
    step = kd(teacher, task="segmentation").attach(student, probe=(x, y))
    kept = y != -100
    p = teacher(x).movedim(1, -1)[kept].double().div(T).softmax(-1)
    q = student(x).movedim(1, -1)[kept].double()
    kl = T**2 * (p * (p.log() - q.div(T).log_softmax(-1))).sum(-1).mean()
    expected = float(ALPHA * kl + (1 - ALPHA) * F.cross_entropy(q, y[kept]))
    assert float(step(student, (x, y)).loss) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(DataError, match="task='segmentation'"):
        kd(teacher).attach(student, probe=(x, y))


def test_several_labels_at_once_and_several_numbers():
    torch.manual_seed(0)
    student, teacher, x = nn.Linear(6, 3), nn.Linear(6, 3), torch.randn(8, 6)
    flags = torch.randint(0, 2, (8, 3))
    step = stillhouse.Distillation("hard_labels", task="multi_label").attach(student, probe=(x, flags))
    expected = F.binary_cross_entropy_with_logits(student(x).double(), flags.double())
    assert float(step(student, (x, flags)).loss) == pytest.approx(float(expected), abs=1e-6)
    step = kd(teacher, task="multi_label").attach(student, probe=(x, flags))
    p, q = teacher(x).double().div(T).sigmoid(), student(x).double().div(T).sigmoid()
    kl = T**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert float(step(student, (x, flags)).loss) == pytest.approx(
        float(ALPHA * kl + (1 - ALPHA) * expected), abs=1e-6
    )
    numbers = torch.randn(8, 3)
    step = stillhouse.Distillation("hard_labels").attach(student, probe=(x, numbers))
    expected = F.mse_loss(student(x).double(), numbers.double())
    assert float(step(student, (x, numbers)).loss) == pytest.approx(float(expected), abs=1e-6)


class TestCounting:
    """What a loss is divided by."""

    def test_ranks_with_unequal_rows_give_the_gradient_of_one_process(self):
        student, teacher = net(seed=1), net(seed=2)
        x, y = rows(12)
        whole = kd(teacher).attach(student, probe=(x, y))
        whole(student, (x, y)).loss.backward()
        expected = gradient(student)
        student.zero_grad()
        everyone = torch.tensor([12.0, 12.0], dtype=torch.float64)
        total = torch.zeros_like(expected)
        for part in (
            slice(0, 3),
            slice(3, 12),
        ):  # each rank in turn; DistributedDataParallel averages the gradients
            step = kd(teacher).attach(student, probe=(x, y), reduce=lambda own: everyone, divided_by=2.0)
            step(student, (x[part], y[part])).loss.backward()
            total += gradient(student) / 2
            student.zero_grad()
            step.close()
        assert torch.allclose(total, expected, atol=1e-7)

    def test_a_batch_transform_that_halves_the_rows_is_counted_after_it(self):
        class Halves(Method):
            api_version = 1
            requires = frozenset()

            @hookimpl
            def batch_transform(self, batch):
                return batch.part(slice(0, len(batch) // 2))

        student, teacher = net(seed=1), net(seed=2)
        x, y = rows(8)
        step = stillhouse.DistillStep([Halves(), "kd"], student=student, teacher=teacher, probe=(x, y))
        alone = stillhouse.DistillStep("kd", student=student, teacher=teacher, probe=(x, y))
        assert float(step(student, (x, y)).loss) == float(alone(student, (x[:4], y[:4])).loss)

    def test_a_step_after_one_that_failed_divides_by_its_own_rows(self):
        student, teacher = net(seed=1), net(seed=2)
        x, y = rows(8)
        step = kd(teacher).attach(student, probe=(x, y))
        expected = float(step(student, (x, y)).loss)
        step.begin_update([(x, y), (x, y)])
        with pytest.raises(RuntimeError):
            step(nn.Linear(3, 4), (x, y))
        assert float(step(student, (x, y)).loss) == expected

    def test_another_micro_batch_than_was_announced_is_refused(self):
        student = net(seed=1)
        x, y = rows(8)
        step = kd(net(seed=2)).attach(student, probe=(x, y))
        step.begin_update([(x[:5], y[:5]), (x[5:], y[5:])])
        with pytest.raises(ConfigError, match=r"\(5, 6\).*\(3, 6\).*order"):
            step(student, (x[5:], y[5:]))

    def test_labels_that_a_transform_gives_are_counted(self):
        class Named(Method):
            api_version = 1

            @hookimpl
            def label_transform(self, targets):
                return replace(targets, labels=targets.soft.argmax(-1))

        student, teacher = net(seed=1), net(seed=2)
        x, y = rows(8)
        y = y.where(torch.arange(8) < 3, -100)
        step = stillhouse.DistillStep([Named(), "kd"], student=student, teacher=teacher, probe=(x, y))
        expected = F.cross_entropy(student(x).double(), teacher(x).argmax(-1))
        assert float(step(student, (x, y)).metrics["kd.ce"]) == pytest.approx(float(expected), abs=1e-6)
        step.begin_update([(x[2:], y[2:]), (x[:2], y[:2])])
        with pytest.raises(ConfigError, match=r"labelled rows.*counted before it"):
            step(student, (x[2:], y[2:]))

    def test_a_transform_that_leaves_no_sample_is_refused(self):
        class Empties(Method):
            api_version = 1
            requires = frozenset()

            @hookimpl
            def batch_transform(self, batch):
                return batch.part(slice(0, 0))

        student = net(seed=1)
        step = stillhouse.DistillStep([Empties(), "kd"], student=student, teacher=net(seed=2), probe=rows(4))
        with pytest.raises(DataError, match="left no sample"):
            step(student, rows(4))

    def test_more_micro_batches_than_a_trainer_counted_are_refused(self):
        student = net(seed=1)
        step = kd(net(seed=2)).attach(student, probe=rows(4))
        step.begin_update(rows=4)
        step(student, rows(4))
        with pytest.raises(ConfigError, match="has 1 micro-batches, and a further one came"):
            step(student, rows(4))

    def test_what_is_looked_at_is_not_multiplied_by_what_a_host_divides_by(self):
        student, teacher = net(seed=1), net(seed=2)
        plain, four = (kd(teacher).attach(student, probe=rows(8), divided_by=by) for by in (1.0, 4.0))
        with torch.no_grad():
            assert float(four(student, rows(8)).loss) == float(plain(student, rows(8)).loss)

    @pytest.mark.parametrize("kind", ["regression", "multi_label"])
    def test_a_mask_of_another_shape_is_refused(self, kind):
        student, x = nn.Linear(6, 3), torch.randn(8, 6)
        batch = Batch(x, torch.zeros(8, 3), mask=torch.ones(8, 3, dtype=torch.bool))
        with pytest.raises(DataError, match=r"the mask is \(8, 3\)"):
            stillhouse.Distillation("hard_labels", task=kind).attach(student, probe=batch)

    def test_micro_batches_are_even(self):
        from stillhouse.training.loop import micro_batches

        sizes = [len(part) for part in micro_batches(Batch(torch.zeros(33, 1)), 32)]
        assert sizes == [16, 17]

    def test_what_a_host_divides_by_itself_is_given_back(self):
        student, teacher = net(seed=1), net(seed=2)
        x, y = rows(8)
        plain = kd(teacher).attach(student, probe=(x, y))(student, (x, y))
        four = kd(teacher).attach(student, probe=(x, y), divided_by=4.0)(student, (x, y))
        assert float(four.loss) == 4 * float(plain.loss)
        assert float(four.metrics["loss"]) == float(plain.loss)


class TestAuxiliaryModules:
    """A method's own modules in somebody's loop."""

    def attached(self):
        student, teacher = net(8, seed=1), net(12, seed=2)
        return student, stillhouse.DistillStep(
            ["fitnets", "kd"], student=student, teacher=teacher, probe=rows(8)
        )

    def test_are_in_the_parameter_groups_and_move(self):
        student, step = self.attached()
        regressor = step.auxiliary["fitnets.regressor"].module
        before = [p.detach().clone() for p in regressor.parameters()]
        optimizer = torch.optim.SGD(step.parameter_groups(), lr=0.1)
        for _ in range(3):
            step(student, rows(8)).loss.backward()
            optimizer.step()
            step.zero_grad()
        step.finish()
        assert all(not torch.equal(p, old) for p, old in zip(regressor.parameters(), before, strict=True))
        assert step.info.index == 3

    def test_that_are_never_trained_are_told_of(self):
        student, step = self.attached()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)

        def update():
            step(student, rows(8)).loss.backward()
            optimizer.step()
            step.zero_grad()

        update()
        with pytest.raises(ConfigError, match=r"fitnets\.regressor.*was not.*parameter_groups"):
            update()

    def test_whose_gradients_pile_up_are_told_of(self):
        student, step = self.attached()
        optimizer = torch.optim.SGD(step.parameter_groups(), lr=0.1)

        def update():
            student.zero_grad()  # as a trainer does that knows the student alone
            step(student, rows(8)).loss.backward()
            optimizer.step()

        update()
        with pytest.raises(ConfigError, match=r"fitnets\.regressor.*not cleared.*zero_grad"):
            update()

    def test_are_placed_with_the_students_numbers_and_come_back_from_a_state(self):
        student = net(8, seed=1).to(torch.bfloat16)
        step = stillhouse.DistillStep(
            ["fitnets", "kd"], student=student, teacher=net(12, seed=2).to(torch.bfloat16),
            probe=(rows(8)[0].bfloat16(), rows(8)[1]),
        )  # fmt: skip
        regressor = step.auxiliary["fitnets.regressor"].module
        weight = next(regressor.parameters())
        assert weight.dtype == torch.bfloat16
        kept = copy.deepcopy(step.state_dict())
        nn.init.zeros_(weight)
        step.load_state_dict(kept)
        assert weight.abs().sum() > 0


class TestStages:
    """A method with stages, sequenced by the step."""

    def test_begin_and_end_in_order_without_a_word_from_the_loop(self):
        said: list[str] = []

        class Two(Method):
            api_version = 1
            requires = frozenset({"labels"})

            @hookimpl
            def stages(self):
                return [Stage("one", 1.0, teacher=None), Stage("two", 2.0, teacher=None)]

            @hookimpl
            def on_stage_start(self, stage):
                said.append(f"start {stage.name}")

            @hookimpl
            def on_stage_end(self, stage):
                said.append(f"end {stage.name}")

            @hookimpl
            def on_update_end(self, info):
                said.append(f"{info.stage.name} {info.index}")

            @hookimpl
            def on_run_end(self):
                said.append("run end")

            @hookimpl
            def loss_terms(self, student_out, info):
                return {"square": LossTerm(info.mean(student_out.logits.square().mean(-1)))}

        student = net(seed=1)
        with stillhouse.Distillation(Two()).attach(student, probe=rows(4), steps=3) as step:
            for _ in range(3):
                step(student, rows(4)).loss.backward()
        assert said == [
            "start one", "one 0", "end one", "start two", "two 1", "two 2", "end two", "run end",
        ]  # fmt: skip

    def test_a_state_from_before_the_first_update_begins_the_first_stage(self):
        said: list[str] = []

        class Says(Method):
            api_version = 1
            requires = frozenset()

            @hookimpl
            def on_stage_start(self, stage):
                said.append(stage.name)

        made = lambda: stillhouse.DistillStep(
            [Says(), "kd"], student=net(seed=1), teacher=net(seed=2), probe=rows(4)
        )
        first, second = made(), made()
        second.load_state_dict(first.state_dict())
        second(second.run.student, rows(4))
        assert said == ["train"]

    def test_a_state_of_another_run_is_refused(self):
        def made(method, steps):
            return stillhouse.DistillStep(
                method, student=net(seed=1), teacher=net(seed=2), probe=rows(4), steps=steps
            )

        state = made("kd", 9).state_dict()
        for method, steps, what in ((["kd", "fitnets"], 9, "methods"), ("kd", 90, "stages")):
            with pytest.raises(CheckpointError, match=f"made with {what}"):
                made(method, steps).load_state_dict(state)

    def test_without_a_length_are_refused(self):
        step = stillhouse.DistillStep("sld", student=net(seed=1), teacher=net(seed=2), probe=rows(4))
        with pytest.raises(ConfigError, match=r"distil, relabel, target.*steps="):
            step(net(seed=1), rows(4))

    def test_what_a_stage_offers_is_compared_with_what_each_method_requires(self):
        with pytest.raises(
            ConfigError, match=r"'fitnets'.*can't stand beside 'hard_labels'.*calls no teacher"
        ):
            stillhouse.DistillStep(
                ["fitnets", "hard_labels"], student=net(seed=1), teacher=net(seed=2), probe=rows(4)
            )


class TestWhatTheCallerSetUp:
    """Frozen parts, modes, wrappers and patches stay as they are."""

    def test_parts_that_are_frozen_later_stay_frozen(self):
        student = net(seed=1)
        with kd(net(seed=2)).attach(student, probe=rows(8), steps=9) as step:
            student[0].requires_grad_(False)
            step(student, rows(8)).loss.backward()
            assert not student[0].weight.requires_grad
            assert student[0].weight.grad is None
        assert not student[0].weight.requires_grad

    def test_a_part_in_eval_mode_keeps_its_statistics(self):
        backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).requires_grad_(False).eval()
        student = nn.Sequential(backbone, nn.Linear(8, 4))
        before = backbone[1].running_mean.clone()
        x, y = rows(64)
        stillhouse.distill(student, net(seed=2), (x + 5, y), method="kd", steps=5, batch_size=16)
        assert torch.equal(backbone[1].running_mean, before)
        assert not backbone.training
        assert student.training

    def test_a_stand_in_of_a_patched_student_stands_still(self):
        student = net(seed=1)
        original = student.forward

        def patched(self, inputs):  # as trainers do for mixed precision: it holds the original
            return original(inputs)

        student.forward = types.MethodType(patched, student)
        step = stillhouse.DistillStep("sld", student=student, teacher=net(seed=2), probe=rows(4), steps=9)
        step.begin(step.stages[2])
        assert float(step(student, rows(4)).loss) == pytest.approx(0, abs=1e-7)
        step.update.abandon()
        with torch.no_grad():
            student[0].weight += 1
        assert float(step(student, rows(4)).loss) > 1e-3

    def test_the_student_can_be_pickled_and_copied_during_training(self):
        student = net(seed=1)
        step = stillhouse.DistillStep(["kd", "fitnets"], student=student, teacher=net(seed=2), probe=rows(4))
        copied = copy.deepcopy(student)
        torch.save(student, io.BytesIO())
        step.close()
        torch.save(copied, io.BytesIO())
        assert not any(module._forward_hooks for module in student.modules())

    def test_a_hint_inside_of_a_reentrantly_checkpointed_layer_is_refused(self):
        class Checkpointed(nn.Module):
            def __init__(self, reentrant):
                super().__init__()
                self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
                self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
                self.reentrant = reentrant

            def forward(self, inputs):
                hidden = checkpoint(self.inner, self.first(inputs), use_reentrant=self.reentrant)
                return self.head(hidden)

        method = {"name": "fitnets", "layers": {"inner.0": "0"}}
        for reentrant in (True, False):
            student = Checkpointed(reentrant)
            step = stillhouse.DistillStep([method, "kd"], student=student, teacher=net(seed=2), probe=rows(4))
            if reentrant:
                with pytest.raises(ConfigError, match=r"student\.inner\.0 has no graph.*use_reentrant=False"):
                    step(student, rows(4))
                continue
            loss, _ = step(student, rows(4))
            loss.backward()
            assert student.inner[0].weight.grad.abs().sum() > 0
            assert not step.captures.take("student")

    def test_evaluation_counts_no_update_and_changes_nothing(self):
        student = net(seed=1)
        step = kd(net(seed=2)).attach(student, probe=rows(8))
        trained = float(step(student, rows(8)).loss)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert float(step(student, rows(8)).loss) == trained
        step.end_update()
        assert step.info.index == 1


class TestTeachers:
    def test_a_teacher_may_be_made_in_inference_mode(self):
        with torch.inference_mode():
            teacher = net(seed=2)
        student = net(seed=1)
        step = kd(teacher).attach(student, probe=rows(4))
        loss, _ = step(student, rows(4))
        loss.backward()
        assert student[0].weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("first", [0, 4])
    def test_one_that_moves_is_refused_whenever_it_does_unless_that_was_said(self, first):
        for moves in (False, True):
            student, teacher = net(seed=1), net(seed=2)
            step = kd(teacher, teacher_moves=moves).attach(student, probe=rows(4))

            def train(step=step, student=student, teacher=teacher):
                for update in range(8):
                    step(student, rows(4))
                    if update >= first:
                        teacher.load_state_dict(net(seed=3 + update).state_dict())

            if moves:
                train()
            else:
                with pytest.raises(ConfigError, match=r"written to.*teacher_moves=True"):
                    train()

    def test_frozen_tensors_may_be_shared_and_trained_ones_may_not(self):
        student, teacher = net(seed=1), net(seed=2)
        teacher[0] = student[0]
        with pytest.raises(ConfigError, match="same tensor"):
            kd(teacher).attach(student, probe=rows(4))
        student[0].requires_grad_(False)
        kd(teacher).attach(student, probe=rows(4))(student, rows(4))

    def test_the_students_own_base_with_its_adapters_off(self):
        peft = pytest.importorskip("peft")
        base = gpt2(1)
        expected = copy.deepcopy(base)
        student = peft.get_peft_model(
            base, peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
        )
        batch = padded()
        with kd("self", task="causal_lm").attach(student, probe=batch) as step:
            loss, metrics = step(student, batch)
            loss.backward()
        with torch.no_grad():
            kept = padded()["labels"][:, 1:] != -100
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            p = expected(**inputs).logits[:, :-1][kept].double().div(T).softmax(-1)
            q = student(**inputs).logits[:, :-1][kept].double().div(T).log_softmax(-1)
        assert float(metrics["kd.kl"]) == pytest.approx(
            float(T**2 * (p * (p.log() - q)).sum(-1).mean()), abs=1e-6
        )
        graded = {name for name, p in student.named_parameters() if p.grad is not None}
        assert graded
        assert all("lora" in name for name in graded)

    def test_padded_vocabularies_share_a_prefix(self):
        torch.manual_seed(0)
        student, teacher, x = nn.Linear(6, 48), nn.Linear(6, 50), torch.randn(5, 6)
        step = stillhouse.Distillation("kd", teacher=teacher, alpha=1.0, temperature=1.0).attach(
            student, probe=x
        )
        given = teacher(x).double()[:, :48]
        p, q = given.softmax(-1), student(x).double().log_softmax(-1)
        assert float(step(student, x).loss) == pytest.approx(
            float((p * (p.log() - q)).sum(-1).mean()), abs=1e-6
        )
