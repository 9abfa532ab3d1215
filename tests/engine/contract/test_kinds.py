"""What a batch means: reading, masks, counting and the fit of outputs, for every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stillhouse.api import CLASS_KINDS, IGNORE, KINDS, Batch
from stillhouse.contract.kinds import kind_of
from stillhouse.errors import ConfigError, DataError

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 2, 1])
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
LEFT = RIGHT.flip(1)


def read(kind: str, given: object) -> Batch:
    return KINDS[kind].read(given)


def bits(mask: Tensor) -> list[list[int]]:
    return mask.int().tolist()


class TestForms:
    """What a loader gives."""

    @pytest.mark.parametrize("labels", [None, Y], ids=["unlabelled", "labelled"])
    @pytest.mark.parametrize("name", ["labels", "label"])
    @pytest.mark.parametrize("form", ["pair", "mapping", "batch"])
    def test_inputs_and_labels_are_told_apart(self, form, name, labels):
        given = {
            "pair": (X,) if labels is None else (X, labels),
            "mapping": {"x": X} if labels is None else {"x": X, name: labels},
            "batch": Batch(X, labels),
        }[form]
        batch = read("classification", given)
        assert (batch.labels is None) == (labels is None)
        assert labels is None or torch.equal(batch.labels, labels)
        assert torch.equal(batch.inputs["x"] if form == "mapping" else batch.inputs, X)
        assert len(batch) == 3

    def test_inputs_alone_and_a_list_for_a_tuple(self):
        assert read("classification", X).inputs is X
        assert read("classification", [X, Y]).labels is Y

    def test_labels_stand_beside_a_mapping_too(self):
        batch = read("token_classification", ({"input_ids": TOKENS}, TOKENS))
        assert batch.inputs.keys() == {"input_ids"}
        assert batch.labels is TOKENS

    def test_a_mapping_names_ids_a_mask_and_the_teachers_inputs(self):
        mask = torch.tensor([True, False, True])
        ids = torch.tensor([7, 8, 9])
        batch = read("classification", {"x": X, "ids": ids, "mask": mask, "teacher_inputs": X * 2})
        assert batch.inputs.keys() == {"x"}
        assert (batch.ids is ids, batch.mask is mask) == (True, True)
        assert torch.equal(batch.for_teacher, X * 2)

    @pytest.mark.parametrize("name", ["ids", "sample_id"])
    @pytest.mark.parametrize("count", [2, 4])
    def test_other_ids_than_samples_are_refused(self, name, count):
        with pytest.raises(DataError, match=f"{count} sample ids for a batch of 3 samples"):
            read("classification", {"x": X, name: torch.arange(count)})

    @pytest.mark.parametrize("given", [(X, Y, Y), ()], ids=["three", "none"])
    def test_a_tuple_of_another_length_is_refused(self, given):
        with pytest.raises(DataError, match=r"batch of \d parts .*expected \(inputs, labels\)"):
            read("classification", given)

    @pytest.mark.parametrize("given", [({"x": X, "labels": Y}, Y), {"x": X, "labels": Y, "label": Y}])
    def test_labels_twice_are_refused(self, given):
        with pytest.raises(DataError, match=r"labels twice"):
            read("classification", given)


class TestLabels:
    @pytest.mark.parametrize("type_", [torch.int32, torch.uint8])
    @pytest.mark.parametrize("kind", sorted(CLASS_KINDS))
    def test_class_numbers_are_made_long(self, kind, type_):
        given = (TOKENS if KINDS[kind].shifted else Y).to(type_)
        assert read(kind, (TOKENS[:, :1] if KINDS[kind].shifted else X, given)).labels.dtype == torch.long

    @pytest.mark.parametrize("kind", ["multi_label", "regression"])
    def test_flags_and_numbers_are_made_float(self, kind):
        labels = read(kind, (X, torch.tensor([[1, 0], [0, 1], [1, 1]]))).labels
        assert labels.tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
        assert read(kind, (X, [0.5, 1.0, 0.0])).labels.tolist() == [0.5, 1.0, 0.0]

    @pytest.mark.parametrize("wrong", [2, -3, IGNORE])
    def test_flags_are_between_0_and_1(self, wrong):
        with pytest.raises(DataError, match="expected 0 or 1 for each class"):
            read("multi_label", (X, torch.tensor([[1, 0], [0, wrong], [1, 1]])))

    def test_labels_that_are_the_tokens_themselves_want_a_task(self):
        with pytest.raises(ConfigError, match=r"teach the student to copy.*causal_lm"):
            kind_of(None, (TOKENS, TOKENS.clone()))

    def test_an_embedding_has_none(self):
        assert read("embedding", (X, Y)).labels is None

    @pytest.mark.parametrize("labels", [torch.rand(3), torch.tensor([True, False, True])])
    def test_class_numbers_that_are_none_are_refused_with_the_kinds_that_they_may_be(self, labels):
        with pytest.raises(DataError, match=r"floats are task='regression', 0 or 1 .* task='multi_label'"):
            read("classification", (X, labels))

    @pytest.mark.parametrize("labels", [["cat", "dog", "cat"], [["B-PER", "O"]]])
    def test_words_are_refused(self, labels):
        with pytest.raises(DataError, match=r"labels are strings; expected numbers"):
            read("classification", (X, labels))

    @pytest.mark.parametrize("kind", ["multi_label", "regression"])
    def test_nan_is_refused(self, kind):
        with pytest.raises(DataError, match=rf"labels of {kind} hold NaN"):
            read(kind, (X, torch.tensor([1.0, torch.nan, 0.0])))


class TestCausal:
    """Position i predicts token i + 1: shifted here, once."""

    def test_labels_are_shifted_by_one(self):
        batch = read("causal_lm", {"input_ids": TOKENS, "labels": TOKENS})
        assert batch.labels.tolist() == [[6, 7, 8, IGNORE], [10, 11, 12, IGNORE]]
        assert bits(batch.mask) == [[1, 1, 1, 0], [1, 1, 1, 0]]
        assert torch.equal(batch.inputs["input_ids"], TOKENS), "the inputs are not"

    def test_a_batch_is_taken_as_it_is(self):
        batch = Batch({"input_ids": TOKENS}, TOKENS)
        assert read("causal_lm", batch) is batch

    @pytest.mark.parametrize(("attention", "rows"), [(RIGHT, [1, 1, 0, 0]), (LEFT, [0, 1, 1, 0])])
    @pytest.mark.parametrize("labelled", [False, True])
    def test_padding_on_either_side_leaves_the_same_rows(self, attention, rows, labelled):
        given = {"input_ids": TOKENS, "attention_mask": attention}
        if labelled:
            given["labels"] = TOKENS.where(attention.bool(), torch.tensor(IGNORE))
        batch = read("causal_lm", given)
        assert bits(batch.mask) == [rows, [1, 1, 1, 0]]
        assert KINDS["causal_lm"].rows(batch) == 5
        assert KINDS["causal_lm"].labelled(batch) == (5 if labelled else 0)

    def test_without_an_attention_mask_every_token_is_real(self):
        assert bits(read("causal_lm", {"input_ids": TOKENS}).mask) == [[1, 1, 1, 0], [1, 1, 1, 0]]
        assert bits(read("causal_lm", {"inputs_embeds": torch.randn(1, 3, 2)}).mask) == [[1, 1, 0]]

    def test_the_end_of_a_packed_text_does_not_predict_the_next_ones_beginning(self):
        places = torch.tensor([[0, 1, 2, 0, 1, 0]])
        batch = read("causal_lm", {"input_ids": torch.arange(6)[None], "position_ids": places})
        assert bits(batch.mask) == [[1, 1, 0, 1, 0, 0]]

    def test_a_prompt_without_labels_counts_nowhere(self):
        labels = torch.tensor([[IGNORE, IGNORE, 7, 8]])
        assert bits(read("causal_lm", ({"input_ids": TOKENS[:1]}, labels)).mask) == [[0, 1, 1, 0]]

    def test_a_mask_that_was_given_says_which_tokens_count_and_is_shifted_as_labels_are(self):
        mask = torch.tensor([[True, False, True, False]])
        batch = read("causal_lm", {"input_ids": TOKENS[:1], "labels": TOKENS[:1], "mask": mask})
        assert bits(batch.mask) == [[0, 1, 0, 0]]

    def test_a_batchs_own_mask_stays(self):
        mask = torch.tensor([[True, False, True, False]])
        batch = read("causal_lm", Batch({"input_ids": TOKENS[:1]}, TOKENS[:1], mask=mask))
        assert batch.mask is mask

    def test_labels_of_another_shape_are_refused(self):
        with pytest.raises(DataError, match=r"labels are \(2,\); expected \(B, L\)"):
            read("causal_lm", ({"input_ids": TOKENS}, torch.tensor([1, 2])))

    def test_inputs_without_tokens_are_refused(self):
        with pytest.raises(DataError, match=r"causal_lm got no tensor \(B, L\)"):
            read("causal_lm", {"lengths": torch.tensor([1, 2])})


class TestMasks:
    """Of the kinds whose rows are positions and are not shifted."""

    @pytest.mark.parametrize("kind", ["token_classification", "masked_lm"])
    @pytest.mark.parametrize("attention", [RIGHT, LEFT])
    def test_labels_and_the_attention_mask_say_which_count(self, kind, attention):
        labels = torch.tensor([[1, IGNORE, 2, 3], [IGNORE, 1, 2, 3]])
        given = {"input_ids": TOKENS, "attention_mask": attention}
        assert bits(read(kind, given).mask) == attention.tolist()
        both = read(kind, {**given, "labels": labels})
        assert torch.equal(both.mask, attention.bool() & (labels != IGNORE))

    def test_seq2seq_rows_are_the_decoders(self):
        labels = torch.tensor([[4, 5, IGNORE]])
        source = {"input_ids": TOKENS[:1], "attention_mask": RIGHT[:1]}
        assert bits(read("seq2seq_lm", {**source, "labels": labels}).mask) == [[1, 1, 0]]
        decoder = {"decoder_input_ids": labels, "decoder_attention_mask": torch.tensor([[1, 0, 0]])}
        assert bits(read("seq2seq_lm", {**source, **decoder}).mask) == [[1, 0, 0]]
        assert read("seq2seq_lm", source).mask is None, "the source's mask is none of the decoder's"

    def test_pixels_without_a_class_count_nowhere(self):
        labels = torch.tensor([[[1, IGNORE], [0, 2]]])
        batch = read("segmentation", (torch.zeros(1, 3, 2, 2), labels))
        assert bits(batch.mask) == [[[1, 0], [1, 1]]]

    @pytest.mark.parametrize("kind", ["multi_label", "regression", "embedding"])
    def test_samples_have_none(self, kind):
        assert read(kind, {"x": X, "attention_mask": RIGHT[:, :1], "labels": X > 0}).mask is None

    def test_a_class_a_sample_has_none_and_a_class_a_position_has_one(self):
        assert read("classification", (X, Y)).mask is None
        assert bits(read("classification", (X, torch.tensor([[1, IGNORE]] * 3))).mask) == [[1, 0]] * 3

    def test_is_completed_where_a_batch_says_nothing_of_it(self):
        kind = KINDS["token_classification"]
        images = Batch(torch.zeros(2, 5))
        assert bits(kind.complete(images, (3,)).mask) == [[1, 1, 1]] * 2
        labelled = kind.complete(
            Batch({"input_ids": TOKENS}, TOKENS.where(RIGHT.bool(), torch.tensor(IGNORE)))
        )
        assert bits(labelled.mask) == RIGHT.tolist()
        assert kind.complete(labelled, (9,)) is labelled
        assert KINDS["regression"].complete(images, (3,)) is images
        assert kind.complete(images) is images


SOME = torch.tensor([0, IGNORE, 1])
MASK = torch.tensor([True, True, False])


@pytest.mark.parametrize(
    ("kind", "batch", "rows", "labelled"),
    [
        ("classification", Batch(X), 3, 0),
        ("classification", Batch(X, SOME), 3, 2),
        ("classification", Batch(X, SOME, mask=MASK), 2, 1),
        ("classification", Batch(X, mask=torch.zeros(3, dtype=torch.bool)), 0, 0),
        ("classification", Batch(X, probabilities=torch.tensor([[0.5, 0.5], [0, 0], [1, 0]])), 3, 2),
        ("classification", Batch(X, probabilities=torch.tensor([[0.5, 0.5], [0, 0], [1, 0]]), mask=MASK), 2, 1),
        ("multi_label", Batch(X, torch.zeros(3, 4)), 3, 3),
        ("multi_label", Batch(X), 3, 0),
        ("regression", Batch(X, torch.randn(3), mask=MASK), 2, 2),
        ("embedding", Batch(X), 3, 0),
        ("token_classification", Batch(X, torch.tensor([[1, IGNORE]] * 3), mask=torch.tensor([[True, True]] * 3)), 6, 3),
    ],
)  # fmt: skip
def test_rows_and_labelled_rows_are_counted(kind, batch, rows, labelled):
    assert (KINDS[kind].rows(batch), KINDS[kind].labelled(batch)) == (rows, labelled)


class TestFit:
    """The outputs' rows are the batch's."""

    FITTING = [
        ("classification", (3, 4), Y),
        ("classification", (3, 2, 4), torch.zeros(3, 2, dtype=torch.long)),
        ("multi_label", (3, 4), torch.zeros(3, 4)),
        ("regression", (3,), torch.zeros(3)),
        ("regression", (3, 1), torch.zeros(3)),
        ("regression", (3, 5), torch.zeros(3, 5)),
        ("token_classification", (3, 2, 4), torch.zeros(3, 2, dtype=torch.long)),
        ("causal_lm", (3, 2, 4), torch.zeros(3, 2, dtype=torch.long)),
        ("segmentation", (3, 5, 6, 4), torch.zeros(3, 5, 6, dtype=torch.long)),
        ("embedding", (3, 4), None),
    ]

    @pytest.mark.parametrize(("kind", "shape", "labels"), FITTING)
    def test_is_accepted(self, kind, shape, labels):
        KINDS[kind].check(Batch(X, labels), torch.zeros(shape))
        KINDS[kind].check(Batch(X), torch.zeros(shape))

    @pytest.mark.parametrize(
        ("kind", "shape", "batch", "said"),
        [
            ("classification", (2, 4), Batch(X, Y), r"the batch has 3 samples"),
            ("classification", (3, 4), Batch(X, Y[:, None]), r"labels are \(3, 1\).*labels\.squeeze\(-1\)"),
            ("classification", (3, 5, 6, 4), Batch(X), r"expected the same rows: .*task='segmentation'"),
            ("classification", (3, 5, 4), Batch(X, Y), r"task='token_classification' or 'causal_lm'"),
            ("classification", (3, 4), Batch(X, mask=torch.ones(3, 1).bool()), r"the mask is \(3, 1\)"),
            (
                "classification",
                (3, 4),
                Batch(X, probabilities=torch.ones(3, 5)),
                r"probabilities are \(3, 5\)",
            ),
            ("multi_label", (3, 4), Batch(X, torch.zeros(3, 5)), r"the labels are \(3, 5\)"),
            ("multi_label", (3, 2, 4), Batch(X), r"multi_label has outputs \(B, C\)"),
            ("regression", (3, 5), Batch(X, torch.zeros(3)), r"the labels are \(3,\)"),
            ("token_classification", (3, 4), Batch(X), r"has outputs \(B, positions\.\.\., classes\)"),
            ("causal_lm", (3, 7, 4), Batch(X, mask=torch.ones(3, 2).bool()), r"the mask is \(3, 2\)"),
            ("embedding", (3, 7, 4), Batch(X), r"outputs \(B, C\), one row a sample"),
        ],
    )
    def test_is_refused_by_name(self, kind, shape, batch, said):
        with pytest.raises(DataError, match=rf"^the target gives outputs of shape .*{said}"):
            KINDS[kind].check(batch, torch.zeros(shape), "the target")

    def test_classes_are_moved_to_the_last_axis(self):
        assert KINDS["segmentation"].aligned(torch.zeros(2, 9, 4, 5)).shape == (2, 4, 5, 9)
        given = torch.zeros(2, 9)
        assert KINDS["classification"].aligned(given) is given


class TestWithoutATask:
    @pytest.mark.parametrize(
        ("given", "name"),
        [
            (X, "classification"),
            ((X, Y), "classification"),
            ((X, X), "regression"),
            ({"x": X, "label": X[:, 0]}, "regression"),
            (Batch(X, X), "regression"),
            (Batch(X, Y), "classification"),
        ],
    )
    def test_labels_tell_classes_from_numbers(self, given, name):
        assert kind_of(None, given).name == name

    @pytest.mark.parametrize(
        "given", [{"input_ids": TOKENS}, ({"input_ids": TOKENS}, Y), Batch({"input_ids": TOKENS})]
    )
    def test_tokens_are_refused_with_the_choice_explained(self, given):
        with pytest.raises(ConfigError) as caught:
            kind_of(None, given)
        assert "got a batch of tokens (input_ids) and no task" in str(caught.value)
        for name, kind in KINDS.items():
            assert f"task='{name}'  {kind.about}" in str(caught.value)

    def test_a_task_is_named_or_given(self):
        assert kind_of("causal_lm", X) is KINDS["causal_lm"]
        assert kind_of(KINDS["embedding"], X) is KINDS["embedding"]
        with pytest.raises(
            ConfigError, match=r"no kind of task is called 'causal'; did you mean 'causal_lm'"
        ):
            kind_of("causal", X)


@pytest.mark.parametrize("kind", ["causal_lm", "token_classification", "classification"])
def test_an_attention_mask_of_another_length_is_refused_with_both_shapes(kind):
    tokens = torch.ones(2, 5, dtype=torch.long)
    batch = {"input_ids": tokens, "attention_mask": tokens[:, :-1]}
    with pytest.raises(DataError, match=r"attention_mask is \(2, 4\), and input_ids is \(2, 5\)"):
        KINDS[kind].read(batch)
    kept = {**batch, "input_ids": tokens[:, :1], "past_key_values": object()}
    assert KINDS[kind].read(kept).inputs["attention_mask"].shape == (2, 4)
