"""``teacher: {name: openai, url: http://localhost:8000/v1}``: a language model that is asked, not loaded.

The server is sent token ids, as the task made them, and asked for ``prompt_logprobs``, as vLLM has them: a list with an entry
for each token, the first null (nothing stands before it), the others mapping token ids to log-probabilities: the k most likely
and, where it is not among them, the token that stands there. They are the model's own, at temperature 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.api import Batch, ConfigError, DataError
from stillhouse.kernels import TopK
from stillhouse_openai.client import Client, ServerError, Settings


def openai(
    url: str,
    model: str = "",
    outputs: int = 0,
    k: int = 64,
    timeout: float = 60.0,
    retries: int = 5,
    concurrency: int = 8,
    per_second: float = 0.0,
    api_key_env: str = "",
    revision: str = "",
) -> nn.Module:
    """A teacher on an OpenAI-compatible server; see ``OpenAITeacher`` for the arguments."""
    return OpenAITeacher(
        url, model, outputs, k, timeout=timeout, retries=retries, concurrency=concurrency, per_second=per_second,
        api_key_env=api_key_env, revision=revision,
    )  # fmt: skip


class OpenAITeacher(nn.Module):
    """The k most likely next tokens at every position, from a server.

    url
        Up to and with the version, ``http://localhost:8000/v1``.
    model
        As the server names it; default: the only one that it serves.
    outputs
        Size of the vocabulary, to check k and the answers against; 0 where it isn't known.
    timeout, retries, per_second, concurrency
        Seconds for an answer; further tries; requests begun in a second at most (0: no limit); requests at a time.
    api_key_env
        The environment variable that holds the key; default: no key is sent.
    revision
        Which weights the server runs, in your words: it can't say so, and labels are bound to model and revision.
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        outputs: int = 0,
        k: int = 64,
        *,
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 8,
        per_second: float = 0.0,
        api_key_env: str = "",
        revision: str = "",
    ) -> None:
        super().__init__()
        if not 0 < timeout < math.inf or retries < 0 or concurrency < 1 or per_second < 0:
            raise ConfigError(
                f"teacher: timeout {timeout}, retries {retries}, concurrency {concurrency}, per_second {per_second}; expected "
                "a time-out above 0, no negative number, and at least one request at a time"
            )
        if k < 1 or (outputs and k > outputs):
            raise ConfigError(f"teacher.k: got {k}; expected 1 to {outputs or 'the size of the vocabulary'}")
        key = os.environ.get(api_key_env, "") if api_key_env else ""
        if api_key_env and not key:
            raise ConfigError(
                f"teacher.api_key_env: the environment has no {api_key_env}; expected the key in it"
            )
        self.client = Client(Settings(url, key, timeout, retries, per_second))
        self.outputs, self.k, self.concurrency, self.revision = outputs, k, concurrency, revision
        self._named, self._model = model, ""

    @property
    def model(self) -> str:
        """The model's name, once the server has confirmed that it serves it."""
        if not self._model:
            self._model = _served(self.client, self._named)
        return self._model

    def origin(self) -> str:
        """Model and revision, in the place of a digest of weights that nobody here has."""
        return f"served:{self.model}@{self.revision}" if self.revision else f"served:{self.model}"

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TopK:
        """The answer to a batch of token ids ``(B, L)``."""
        inputs = {"input_ids": input_ids} | (
            {} if attention_mask is None else {"attention_mask": attention_mask}
        )
        return self.answer(Batch(inputs))

    def answer(self, batch: Batch) -> TopK:
        """The k most likely next tokens ``(B, L, k)`` at the positions of the mask, else of the attention mask.

        A position's row says what comes after its token. The last one's is had by sending one more token, whatever it is.

        Raises ServerError naming the sample; nothing is answered in part.
        """
        ids, real = _tokens(batch.for_teacher)
        wanted = real if batch.mask is None else batch.mask.cpu()
        if wanted.shape != ids.shape or (wanted & ~real).any():
            raise DataError(
                f"the mask has shape {tuple(wanted.shape)} and the tokens {tuple(ids.shape)}; expected the same, and rows only "
                "at real tokens"
            )
        indices = torch.arange(self.k).expand(*ids.shape, self.k).clone()
        log_probs = torch.full(indices.shape, -math.log(2 * self.k))
        jobs = [sample for sample in range(len(ids)) if wanted[sample].any()]
        names = jobs if batch.ids is None else [int(batch.ids[sample]) for sample in jobs]
        prompts = [ids[sample][real[sample]].tolist() for sample in jobs]
        lasts = [bool(wanted[sample][real[sample]][-1]) for sample in jobs]
        _ = self.model  # asked once, before the threads
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = [pool.submit(self._ask, *job) for job in zip(names, prompts, lasts, strict=True)]
            try:
                found = [done.result() for done in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for sample, (tokens, logs) in zip(jobs, found, strict=True):
            places = wanted[sample][real[sample]][: len(tokens)]
            indices[sample, wanted[sample]] = tokens[places]
            log_probs[sample, wanted[sample]] = logs[places]
        device = batch.mask.device if batch.mask is not None else _device(batch.for_teacher)
        return TopK(indices.to(device), log_probs.to(device))

    def _ask(self, sample: int, prompt: Sequence[int], last: bool) -> tuple[Tensor, Tensor]:
        sent = [*prompt, prompt[-1]] if last else list(prompt)
        content = {
            "model": self.model,
            "prompt": sent,
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": self.k,
            "add_special_tokens": False,
        }
        answer = self.client.ask("completions", content)
        try:
            return read(answer, sent, self.k, self.model, self.outputs)
        except ServerError as error:
            raise ServerError(f"{self.client.settings.url}, sample {sample}: {error}") from None


def _served(client: Client, named: str) -> str:
    answer = client.ask("models")
    listed = answer.get("data")
    names = (
        [str(item.get("id")) for item in listed if isinstance(item, Mapping)]
        if isinstance(listed, list)
        else []
    )
    if named and named not in names:
        raise ConfigError(
            f"teacher.model: {client.settings.url} serves no '{named}'; it serves {', '.join(names) or 'nothing'}"
        )
    if not named and len(names) != 1:
        raise ConfigError(
            f"teacher.model: {client.settings.url} serves {', '.join(names) or 'nothing'}; name one"
        )
    return named or names[0]


def _tokens(inputs: Any) -> tuple[Tensor, Tensor]:
    """Token ids ``(B, L)`` on the CPU, and which of them are no padding."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise DataError(
            "a served teacher reads token ids; expected inputs (B, L) of whole numbers, or input_ids among them"
        )
    attention = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    ids = ids.cpu()
    return ids, torch.ones_like(ids, dtype=torch.bool) if attention is None else attention.cpu().bool()


def _device(inputs: Any) -> torch.device:
    found = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
    return torch.device(found.device)


def read(
    answer: Mapping[str, Any], sent: Sequence[int], k: int, model: str, outputs: int = 0
) -> tuple[Tensor, Tensor]:
    """Token ids and log-probabilities ``(len(sent) - 1, k)`` of the next token, most likely first.

    Raises ServerError for an answer of another model, of other tokens, with fewer entries than k, or none.
    """
    if answer.get("model") not in (None, model):
        raise ServerError(
            f"the answer is of model '{answer['model']}'; expected '{model}': name it in teacher.model"
        )
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    listed = choice.get("prompt_logprobs", answer.get("prompt_logprobs"))
    if not isinstance(listed, list):
        raise ServerError(
            "the answer holds no prompt_logprobs; expected a server that gives those, such as vLLM"
        )
    if len(listed) != len(sent):
        raise ServerError(
            f"the answer is of {len(listed)} tokens, {len(sent)} were sent; expected the same: the server tokenises otherwise, "
            "or adds tokens of its own"
        )
    if listed[0]:
        raise ServerError(
            "the first token has log-probabilities; expected none, since nothing stands before it"
        )
    rows = [
        _row(entry, token, place, k, outputs)
        for place, (entry, token) in enumerate(zip(listed, sent, strict=True))
        if place
    ]
    if not rows:
        return torch.empty(0, k, dtype=torch.long), torch.empty(0, k)
    return torch.tensor([tokens for tokens, _ in rows]), torch.tensor([logs for _, logs in rows])


def _row(entry: Any, token: int, place: int, k: int, outputs: int) -> tuple[list[int], list[float]]:
    found = []
    try:
        for name, about in entry.items():
            log = about["logprob"] if isinstance(about, Mapping) else about
            found.append((-float(log) if log is not None else math.inf, int(name)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ServerError(
            f"the entry of token {place} is {str(entry)[:80]}; expected token ids with a logprob each"
        ) from None
    names = {name for _, name in found}
    if token not in names:
        raise ServerError(
            f"token {place} was sent as {token}, and the answer there is of others; expected that token among them: the server "
            "tokenises otherwise"
        )
    if len(names) < k:
        raise ServerError(
            f"token {place} has {len(names)} log-probabilities, {k} were asked for; lower teacher.k, or raise what the server "
            "allows (vLLM: --max-logprobs)"
        )
    if any(not cost >= -1e-4 for cost, _ in found) or (outputs and max(names) >= outputs) or min(names) < 0:
        raise ServerError(
            f"token {place} has an entry that is no log-probability of a class from 0 to {outputs or '...'}"
        )
    best = sorted(found)[:k]
    return [name for _, name in best], [min(0.0, -cost) for cost, _ in best]
