"""Silent errors that outsiders found by wiring the step from the docs alone, each against a computation by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

import stillhouse
from stillhouse import Batch, Distillation
from stillhouse.api import IGNORE
from stillhouse.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers")

TEXTS = [[7, 3, 9, 4, 1], [2, 8, 8, 5, 1, 6, 9, 3, 1], [4, 4, 1], [5, 6]]


def padded(extra: int = 0) -> dict[str, Tensor]:
    length = max(map(len, TEXTS)) + extra
    ids, real = (torch.zeros(len(TEXTS), length, dtype=torch.long) for _ in range(2))
    for row, text in enumerate(TEXTS):
        ids[row, : len(text)], real[row, : len(text)] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, IGNORE)}


def gpt2(seed: int, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_positions=64, n_embd=width, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1,
            attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, initializer_range=0.3,
        )
    )  # fmt: skip


def loss_of(batch, student: nn.Module, teacher: nn.Module, task: str) -> float:
    with Distillation("kd", teacher=teacher, task=task, temperature=2.0).attach(student, probe=batch) as step:
        return float(step(student, batch).loss.detach())


class TestLastLayer:
    """A last layer is left to the loss only where its output is the logits, whatever the weights are when it is looked at."""

    @staticmethod
    def gemma(seed: int, **given: object) -> nn.Module:
        torch.manual_seed(seed)
        return transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                vocab_size=1100, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, head_dim=8, attention_dropout=0, pad_token_id=0, tie_word_embeddings=False, **given,
            )
        )  # fmt: skip

    def test_a_soft_cap_behind_it_stays_in_the_loss_when_the_head_grows(self):
        student, teacher, batch = self.gemma(1), self.gemma(2, initializer_range=0.3), padded()
        nn.init.zeros_(student.lm_head.weight)
        with Distillation("kd", teacher=teacher, task="causal_lm", alpha=0.0).attach(
            student, probe=batch
        ) as step:
            nn.init.normal_(student.lm_head.weight, std=4.0)
            loss = float(step(student, batch).loss.detach())
        logits = student.double()(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1]
        known = batch["labels"][:, 1:]
        assert loss == pytest.approx(float(F.cross_entropy(logits[known >= 0], known[known >= 0])), rel=1e-5)

    def test_hooks_that_come_later_are_heard(self):
        torch.manual_seed(0)
        student = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=1100, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1
            )
        ).eval()
        batch = padded()
        with Distillation("hard_labels", task="causal_lm").attach(student, probe=batch) as step:
            student.lm_head.register_forward_hook(lambda module, given, output: 3 * output)
            loss = float(step(student, batch).loss.detach())
        logits = student(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1].double()
        known = batch["labels"][:, 1:]
        assert loss == pytest.approx(float(F.cross_entropy(logits[known >= 0], known[known >= 0])), rel=1e-5)

    @pytest.mark.parametrize("kind", ["Bart", "Marian"])
    def test_a_bias_behind_it_is_no_accident(self, kind):
        made = {
            "Bart": ("BartConfig", "BartForConditionalGeneration"),
            "Marian": ("MarianConfig", "MarianMTModel"),
        }
        config, model = (getattr(transformers, name) for name in made[kind])
        given = {
            "vocab_size": 1100, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32,
            "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
        }  # fmt: skip
        student, batch = model(config(**given)).eval(), padded()
        student.final_logits_bias += torch.randn(1100)
        with Distillation("hard_labels", task="seq2seq_lm").attach(student, probe=batch) as step:
            loss = float(step(student, batch).loss.detach())
        assert loss == pytest.approx(float(student(**batch).loss), rel=1e-5)


def test_a_class_a_token_without_the_kind_for_it_counts_no_pads():
    def bert(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return transformers.BertForTokenClassification(
            transformers.BertConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=4,
                hidden_dropout_prob=0, attention_probs_dropout_prob=0, initializer_range=0.3,
            )
        )  # fmt: skip

    student, teacher = bert(1), bert(2)
    for labelled in (False, True):
        found = []
        for task, extra in (("token_classification", 0), ("classification", 0), ("classification", 12)):
            batch = padded(extra)
            batch["labels"] = batch["input_ids"] % 4  # pads too: the attention mask says which are real
            if not labelled:
                batch.pop("labels")
            found.append(loss_of(batch, student, teacher, task))
        assert found == pytest.approx([found[0]] * 3, rel=1e-5)


class TestPacked:
    ROW = [token for text in TEXTS for token in text]

    def packed(self, **given: Tensor) -> dict[str, Tensor]:
        places = [place for text in TEXTS for place in range(len(text))]
        ids = torch.tensor([self.ROW])
        return {"input_ids": ids, "position_ids": torch.tensor([places]), "labels": ids, **given}

    def test_a_mask_of_ones_beside_them_changes_nothing(self):
        student, teacher = gpt2(1), gpt2(2, 24)
        expected = loss_of(padded(), student, teacher, "causal_lm")
        ones = torch.ones(1, len(self.ROW), dtype=torch.long)
        for batch in (self.packed(), self.packed(attention_mask=ones)):
            assert loss_of(batch, student, teacher, "causal_lm") == pytest.approx(expected, rel=1e-5)

    def test_a_mask_that_leaves_tokens_out_is_refused(self):
        mask = torch.ones(1, len(self.ROW), dtype=torch.long)
        mask[0, -1] = 0
        with pytest.raises(DataError, match=r"packed rows .* with an attention mask that leaves tokens out"):
            loss_of(self.packed(attention_mask=mask), gpt2(1), gpt2(2), "causal_lm")

    def test_positions_of_rows_padded_on_the_left_are_no_packing(self):
        batch, texts = padded(), len(TEXTS)
        flipped = {
            name: torch.full_like(value, IGNORE if name == "labels" else 0) for name, value in batch.items()
        }
        for row in range(texts):
            size = len(TEXTS[row])
            for name, value in batch.items():
                flipped[name][row, -size:] = value[row, :size]
        flipped["position_ids"] = (flipped["attention_mask"].cumsum(1) - 1).clamp(min=0)
        student, teacher = gpt2(1), gpt2(2, 24)
        expected = loss_of(batch, student, teacher, "causal_lm")
        assert loss_of(flipped, student, teacher, "causal_lm") == pytest.approx(expected, rel=1e-5)


def test_a_mask_of_tokens_is_shifted_as_their_labels_are():
    """A completion mask: the loss is that of the masked tokens' own predictions."""
    student, batch = gpt2(1), padded()
    count = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    count[0, 3:5] = count[1, 4:9] = True
    by_labels = {**batch, "labels": batch["labels"].masked_fill(~count, IGNORE)}
    losses = []
    for given in ({**batch, "mask": count}, by_labels):
        with Distillation("hard_labels", task="causal_lm").attach(student, probe=given) as step:
            losses.append(float(step(student, given).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class TestMicroBatchesWithoutLabels:
    """An update may say *no label* by -100, or by a micro-batch without labels: one and the same update."""

    @pytest.mark.parametrize(
        "method",
        [
            "kd",
            {"name": "hldm", "weighting": "uncertainty"},
            {"name": "hldm", "weighting": "simplex", "entropy": 1.0},
            {"name": "hldm", "weighting": "gradnorm"},
            {"name": "ibmd", "deterministic": True},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("first", [0, 1])
    def test_either_way(self, method, first):
        x, y = toys.rows(12)
        bare = [(x[:6], y[:6]), (x[6:],)]
        said = [(x[:6], y[:6]), (x[6:], torch.full((6,), IGNORE))]
        found = []
        for parts in (bare, said):
            student, teacher = toys.net(seed=1), toys.net(12, seed=2)
            torch.manual_seed(0)
            description = Distillation(method, teacher=teacher)
            with description.attach(student, probe=(x, y), steps=9) as step:
                order = parts if first == 0 else parts[::-1]
                step.begin_update(order)
                losses = [step(student, part).loss for part in order]
                sum(losses).backward()
                found.append(
                    [
                        float(sum(losses).detach()),
                        *(
                            p.grad.clone()
                            for m in step.run.models.values()
                            for p in m.parameters()
                            if p.grad is not None
                        ),
                    ]
                )
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
        for one, other in zip(found[0][1:], found[1][1:], strict=True):
            torch.testing.assert_close(one, other)


def test_a_look_between_micro_batches_changes_no_weight_of_the_losses():
    x, y = toys.rows(12)
    found = []
    for looks in (False, True):
        student, teacher = toys.net(seed=1), toys.net(12, seed=2)
        description = Distillation({"name": "hldm", "weighting": "gradnorm"}, teacher=teacher)
        with description.attach(student, probe=(x, y), steps=3) as step:
            parts = [(x[:6], y[:6]), (x[6:], y[6:])]
            step.begin_update(parts)
            for part in parts:
                step(student, part).loss.backward()
                if looks:
                    with torch.no_grad():
                        step(student, (x, y))
            found.append(step.run.models["hldm.weights"].theta.grad.clone())
    assert torch.equal(*found)


class TestBatchesAreReadAsTuplesAre:
    @pytest.mark.parametrize(
        ("task", "labels", "says"),
        [
            ("regression", torch.full((8, 4), torch.nan), "NaN or infinity"),
            ("regression", torch.full((8, 4), torch.inf), "NaN or infinity"),
            ("multi_label", torch.full((8, 4), -100), "expected 0 or 1"),
            ("multi_label", torch.full((8, 4), 2.0), "expected 0 or 1"),
            ("classification", ["a"] * 8, "labels are strings"),
        ],
    )
    @pytest.mark.parametrize("later", [False, True])
    def test_labels_that_mean_nothing_are_refused(self, task, labels, says, later):
        x, y = toys.rows(8)
        good = y if task == "classification" else torch.zeros(8, 4)
        description, bad = Distillation("hard_labels", task=task), Batch(x, labels)
        step = description.attach(toys.net(), probe=(x, good))
        act = (
            (lambda: step(step.run.student, bad))
            if later
            else (lambda: description.attach(toys.net(), probe=bad))
        )
        with pytest.raises(DataError, match=says):
            act()

    @pytest.mark.parametrize(
        "given", [None, {}, "text", torch.zeros(8).numpy()], ids=["None", "empty", "text", "numpy"]
    )
    def test_what_holds_no_tensor_is_refused(self, given):
        with pytest.raises(DataError, match=r"without a tensor; expected"):
            Distillation("hard_labels").attach(toys.net(), probe=given)

    def test_a_mask_of_another_shape_in_a_later_batch_is_refused(self):
        x, y = toys.rows(8)
        step = Distillation("hard_labels").attach(toys.net(), probe=(x, y))
        with pytest.raises(DataError, match=r"the mask is \(5,\), and the labels are \(8,\)"):
            step(step.run.student, Batch(x, y, mask=torch.ones(5, dtype=torch.bool)))

    @pytest.mark.parametrize("transform", ["mixup", "label_smoothing"])
    def test_labels_out_of_range_are_told_before_a_transform_trips_over_them(self, transform):
        x, y = toys.rows(8)
        description = Distillation([transform, "kd"], teacher=toys.net(12, seed=2))
        with description.attach(toys.net(), probe=(x, y)) as step:
            y = y.clone()
            y[3] = 9
            with pytest.raises(DataError, match=r"labels hold 9, first in row 3"):
                step(step.run.student, (x, y))

    def test_labels_that_are_the_tokens_of_a_mapping_are_refused(self):
        class Tokens(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(9, 9)

            def forward(self, tokens):
                return self.table(tokens)

        tokens = torch.randint(0, 9, (4, 6))
        with pytest.raises(ConfigError, match=r"labels that are the inputs themselves"):
            Distillation("hard_labels").attach(Tokens(), probe={"tokens": tokens, "labels": tokens})


class TestNumbersOfTheCaller:
    @pytest.mark.parametrize(
        "given", [{"divided_by": 0}, {"divided_by": -1}, {"steps": 0}, {"steps": -5}, {"steps": 2.5}], ids=str
    )
    def test_that_cannot_be_are_refused(self, given):
        with pytest.raises(ConfigError, match=rf"{next(iter(given))} is .*expected"):
            Distillation("kd", teacher=toys.net(12)).attach(toys.net(), probe=toys.rows(4), **given)

    def test_fewer_rows_than_come_are_refused(self):
        with Distillation("kd", teacher=toys.net(12)).attach(toys.net(), probe=toys.rows(4)) as step:
            step.begin_update(rows=6, labelled=6, micros=2)
            step(step.run.student, toys.rows(4))
            with pytest.raises(ConfigError, match=r"said 6 rows, and 8 came"):
                step(step.run.student, toys.rows(4))

    def test_sample_numbers_below_0_are_refused(self):
        x, y = toys.rows(4)
        description = Distillation("crd", teacher=toys.net(12), memory=8, negatives=4)
        with description.attach(toys.net(), probe=Batch(x, y, torch.arange(4))) as step:
            for ids, says in (
                (torch.arange(4) - 1, "sample number -1; expected 0 or more"),
                (torch.arange(3), r"expected whole numbers \(4,\)"),
                (torch.rand(4), r"expected whole numbers \(4,\)"),
            ):
                with pytest.raises(ConfigError, match=says):
                    step(step.run.student, Batch(x, y, ids))


class TestTeachers:
    def test_one_of_several_called_teacher_is_refused(self):
        with pytest.raises(ConfigError, match=r"one of several teachers is called 'teacher'"):
            Distillation("kd", teacher={"old": toys.net(8), "teacher": toys.net(12)}).attach(
                toys.net(), probe=toys.rows(4)
            )

    def test_a_list_of_them_is_refused(self):
        with pytest.raises(ConfigError, match=r"teacher is list; expected a module, a mapping"):
            Distillation("kd", teacher=[toys.net(8), toys.net(12)]).attach(toys.net(), probe=toys.rows(4))

    def test_a_scripted_one_is_called(self):
        plain, student, batch = toys.net(12, seed=2), toys.net(), toys.rows(4)
        losses = []
        for teacher in (torch.jit.script(copy.deepcopy(plain)), plain):
            with Distillation("kd", teacher=teacher).attach(student, probe=batch) as step:
                losses.append(float(step(student, batch).loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class TestDistillDropsNothing:
    DATA = {"train": toys.rows(16)}

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"observers": ["tensorboard"]}, "got observers and no dir"),
            ({"resume": True}, "got resume and no dir"),
            ({"overwrite": True}, "got overwrite and no dir"),
            ({"out": "runs/x"}, "got out; expected dir"),
            ({"methods": ["fitnets"]}, "got methods, which is no setting here"),
            ({"stepz": 3}, "stepz: unknown; did you mean 'steps'"),
        ],
    )
    def test_what_would_not_be_used_is_refused(self, given, says):
        with pytest.raises(ConfigError, match=says):
            stillhouse.distill(toys.net(), toys.net(12), self.DATA, method="kd", **{"steps": 2, **given})

    def test_observers_are_told(self, tmp_path):
        pytest.importorskip("tensorboard")
        stillhouse.distill(
            toys.net(), toys.net(12), self.DATA, method="kd", steps=2, batch_size=8, dir=tmp_path / "run",
            observers=["tensorboard"],
        )  # fmt: skip
        assert list((tmp_path / "run").rglob("*tfevents*"))

    @pytest.mark.parametrize(
        ("split", "says"),
        [
            ({"test": (toys.rows(4)[0], torch.full((4,), 9))}, r"test\.labels holds 9, first in row 0"),
            (
                {"test": (toys.rows(4)[0], toys.rows(4)[1][:, None])},
                r"test\.labels are torch.int64 with rows \(1,\)",
            ),
            ({"test": (toys.rows(4)[0], toys.rows(4)[1].float())}, "labels are torch.float32"),
            (
                {"test": (toys.rows(4)[0][:, :3], toys.rows(4)[1])},
                r"test\.inputs are .* rows \(3,\), and train",
            ),
            (
                {"validation": (toys.rows(4)[0][:, :3], toys.rows(4)[1])},
                r"validation\.inputs are .* rows \(3,\)",
            ),
            ({"unlabelled": toys.rows(4)[0][:, :3]}, r"unlabelled\.inputs are .* rows \(3,\)"),
        ],
    )
    def test_splits_that_do_not_fit_are_told_before_training(self, split, says, monkeypatch):
        from stillhouse.training.loop import Loop

        monkeypatch.setattr(Loop, "run", lambda *given: pytest.fail("trained"))
        with pytest.raises(DataError, match=says):
            stillhouse.distill(
                toys.net(), toys.net(12), {**self.DATA, **split}, method="kd", steps=2, batch_size=8
            )


@pytest.mark.parametrize("form", ["tokens", "signals"])
def test_splits_of_other_lengths_fit(form):
    """Each split may be as long as its longest text, or signal."""

    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.table(x) if form == "tokens" else x)

    def split(length: int):
        x = torch.randint(9, (8, length)) if form == "tokens" else torch.randn(8, length, 4)
        return x, torch.randint(3, (8, length))

    made = stillhouse.distill(
        Labels(), None, {"train": split(5), "validation": split(7), "test": split(3)}, method="hard_labels",
        task="token_classification", steps=2, batch_size=4,
    )  # fmt: skip
    assert 0 <= made.scores["test"]["accuracy"] <= 1


def test_a_position_embedding_gives_no_flow_of_its_own():
    """PDDM on transformers: what has no value a sample stands in no matrix of flows."""
    student, teacher, batch = gpt2(1), gpt2(2, 24), padded()
    description = Distillation("pddm", teacher=teacher, task="causal_lm")
    with description.attach(student, probe=batch, steps=12) as step:
        optimizer = torch.optim.AdamW(step.parameter_groups(), lr=1e-3)
        for _ in range(12):
            loss = step(student, batch).loss
            assert loss.isfinite()
            loss.backward()
            optimizer.step()
            step.zero_grad()
