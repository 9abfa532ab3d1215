"""A teacher on a server: what it gives, and every way in which the server may be wrong."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
from serving import Server
from torch import nn

from stillhouse.api import Batch, ConfigError, DataError, TensorSplit
from stillhouse.kernels import TopK
from stillhouse.softlabels import Form
from stillhouse.softlabels.label import Recipe
from stillhouse.softlabels.places import place
from stillhouse.softlabels.writer import label_split
from stillhouse_openai import OpenAITeacher, ServerError, openai

V, K = 30, 6


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, ids):
        return 2 * self.head(self.body(ids).cumsum(1))


def teacher(server: Server, **given) -> OpenAITeacher:
    return OpenAITeacher(server.url, **{"outputs": V, "k": K, "timeout": 5.0, "retries": 3, **given})


def batch() -> Batch:
    ids = torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(ids)
    attention[1, 5:] = 0  # padded right
    attention[2, :3] = 0  # padded left
    return Batch({"input_ids": ids, "attention_mask": attention}, mask=attention.bool())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    from stillhouse_openai import client

    naps = []
    monkeypatch.setattr(client, "sleep", naps.append)
    return naps


def expected(given: Batch) -> TopK:
    """From the toy itself, without padding."""
    ids, attention = given.inputs["input_ids"], given.inputs["attention_mask"].bool()
    logits = torch.zeros(*ids.shape, V)
    for row in range(len(ids)):
        with torch.no_grad():
            logits[row, attention[row]] = Toy()(ids[row][attention[row]][None])[0]
    return TopK.from_logits(logits, K)


def test_gives_the_top_k_of_every_position_the_last_one_too():
    given = batch()
    with Server(Toy()) as server:
        found = teacher(server).answer(given)
    wanted = expected(given)
    rows = given.mask
    assert torch.equal(found.indices[rows], wanted.indices[rows])
    torch.testing.assert_close(found.log_probs[rows], wanted.log_probs[rows], rtol=1e-5, atol=1e-5)


def test_the_last_position_is_not_paid_for_where_no_row_wants_it():
    given = batch()
    mask = given.mask.clone()
    mask[:, -1] = mask[1, 4] = False
    mask[3] = False
    given = Batch(given.inputs, mask=mask)
    with Server(Toy()) as server:
        found = teacher(server).answer(given)
        assert sorted(len(asked["prompt"]) for asked in server.asked) == [5, 6, 9]
    assert torch.equal(found.indices[mask], expected(given).indices[mask])


def test_requests_carry_tokens_and_no_temperature_but_one():
    with Server(Toy()) as server:
        teacher(server).answer(batch())
        asked = server.asked[0]
    assert asked["prompt_logprobs"] == K
    assert asked["temperature"] == 1.0
    assert asked["max_tokens"] == 1
    assert all(isinstance(token, int) for token in asked["prompt"])


@pytest.mark.parametrize(
    "faults",
    [
        ("status 500",),
        ("status 503", "status 502", "status 408"),
        ("hang-up",),
        ("cut",),
        ("wait 0",),
        ("drip",),
    ],
)
def test_what_may_pass_is_asked_again(faults):
    given = Batch(batch().inputs["input_ids"][:1])
    with Server(Toy(), faults=faults) as server:
        found = teacher(server, timeout=1.0 if faults == ("drip",) else 5.0).answer(given)
        assert len(server.asked) == len(faults) + 1
    assert found.indices.shape == (1, 9, K)


def test_the_server_says_how_long_to_wait(quick):
    with Server(Toy(), faults=("wait 7",)) as server:
        teacher(server).answer(Batch(torch.zeros(1, 2, dtype=torch.long)))
    assert 7.0 in quick


@pytest.mark.parametrize(
    ("fault", "said", "tries"),
    [
        ("status 500", "status 500 .no: 500., 4 times", 4),
        ("slow 1", "no answer within 0.3 s, 4 times; expected an answer: is the server up", 4),
        ("drip", "no answer within 0.3 s, 4 times", 4),
        ("hang-up", "the connection broke off, 4 times", 4),
        ("status 400", "status 400: no: 400; expected an answer: lower teacher.k", 1),
        ("status 401", "name the environment variable that holds the key: teacher.api_key_env", 1),
        ("status 404", "mend teacher.url or teacher.model", 1),
        ("redirect", "redirects are not followed", 1),
        ("html", r"no JSON .<html>a proxy</html>.; .*mend teacher.url", 1),
        ("list", "a JSON list; expected an object", 1),
        ("none", "holds no prompt_logprobs", 1),
        ("another model", "of model 'another'; expected 'toy'", 1),
        ("fewer", "has [12] log-probabilities, 6 were asked for; lower teacher.k", 1),
        ("adds a token", "of 4 tokens, 3 were sent; .*the server tokenises otherwise", 1),
        ("other tokens", "sent as 4, and the answer there is of others; .*tokenises otherwise", 1),
        ("first too", "the first token has log-probabilities", 1),
        ("nan", "no log-probability of a class", 1),
        ("words", "expected token ids with a logprob each", 1),
    ],
)
def test_an_answer_that_can_not_be_used_is_refused_saying_why(fault, said, tries):
    given = Batch(torch.tensor([[3, 4]]), ids=torch.tensor([17]))
    timeout = 0.3 if "0.3 s" in said else 5.0
    with Server(Toy(), faults=(f"always {fault}",)) as server:
        asking = teacher(server, timeout=timeout)
        with pytest.raises(ServerError, match=said) as refusal:
            asking.answer(given)
        assert len(server.asked) == tries
    if tries == 1 and fault not in ("redirect", "html", "list") and not fault.startswith("status"):
        assert "sample 17" in str(refusal.value)


def test_a_server_that_is_down_is_said_so():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match="nobody listens there, 2 times"):
        OpenAITeacher(f"http://127.0.0.1:{port}/v1", retries=1).answer(
            Batch(torch.zeros(1, 2, dtype=torch.long))
        )


def test_a_model_that_is_not_served_is_refused_naming_those_that_are():
    with Server(Toy()) as server, pytest.raises(ConfigError, match="serves no 'llama'; it serves toy"):
        teacher(server, model="llama").answer(batch())


def test_as_many_requests_as_allowed_run_at_once():
    given = Batch(torch.randint(V, (12, 5)))
    with Server(Toy()) as server:
        teacher(server, concurrency=3).answer(given)
        assert 2 <= server.greatest <= 3


def test_a_rate_is_kept(quick):
    given = Batch(torch.randint(V, (6, 3)))
    with Server(Toy()) as server:
        teacher(server, per_second=2.0).answer(given)
    assert max(quick) > 2.0  # the seventh, with that for the model's name, waits three seconds from the first


def test_the_key_comes_from_the_environment_and_from_nowhere_else(monkeypatch):
    with pytest.raises(ConfigError, match="the environment has no MY_KEY"):
        openai("http://127.0.0.1:1/v1", api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret")
    found = openai("http://127.0.0.1:1/v1", api_key_env="MY_KEY")
    assert "secret" not in repr(found)
    assert found.client.settings.key == "secret"


@pytest.mark.parametrize(
    "given",
    [{"k": 0}, {"k": V + 1}, {"timeout": 0.0}, {"retries": -1}, {"concurrency": 0}, {"url": "ftp://x"}],
)
def test_settings_without_a_meaning_are_refused(given):
    with pytest.raises(ConfigError, match="teacher"):
        openai(**{"url": "http://127.0.0.1:1/v1", "outputs": V, "k": K, **given})


def test_inputs_that_are_no_tokens_are_refused():
    with Server(Toy()) as server, pytest.raises(DataError, match="reads token ids"):
        teacher(server).answer(Batch(torch.randn(2, 3)))


def test_it_can_be_copied_and_has_no_weights():
    with Server(Toy()) as server:
        again = copy.deepcopy(teacher(server))
        assert again.origin() == "served:toy"
        assert not list(again.parameters())


def test_its_answers_are_kept_as_any_teachers(tmp_path):
    given = batch()
    split = TensorSplit(given.inputs, mask=given.mask)
    recipe = Recipe(Form.choose(V, "topk", "float32", K), batch_size=2)
    with Server(Toy()) as server:
        labels = label_split(place(tmp_path), teacher(server, revision="7"), split, recipe)
    assert labels.fingerprint["teacher"] == "served:toy@7"
    found, wanted = labels.lookup(torch.arange(4), given.mask), expected(given)
    rows = given.mask
    assert torch.equal(found.indices[rows], wanted.indices[rows])
    torch.testing.assert_close(found.log_rest[rows], wanted.log_rest[rows], rtol=1e-3, atol=1e-3)
