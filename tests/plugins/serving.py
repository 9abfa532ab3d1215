"""A server of our own on loopback that speaks as vLLM does, and misbehaves where it is told to."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor, nn


class Server:
    """Answers with the log-probabilities of ``model``, a module from tokens ``(B, L)`` to logits. Use ``with``.

    faults
        What to do wrong, in order, a word an answer; after that it behaves. A fault that begins with ``always`` stays.
    """

    def __init__(
        self, model: nn.Module, name: str = "toy", faults: tuple[str, ...] = (), most: int = 1000
    ) -> None:
        self.model, self.name, self.faults, self.most = model, name, list(faults), most
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.greatest = 0
        self.times: list[float] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def do_GET(self) -> None:
                self.say(200, {"data": [{"id": outer.name}]})

            def do_POST(self) -> None:
                outer.answer(self)

            def say(self, status: int, content: Any, **headers: str) -> None:
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                outer.done(self)  # before the client can ask again
                self.wfile.write(body)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *about: None  # clients that hang up are what is tested
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler: Any) -> None:
        content = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.asked.append(content)
            self.times.append(time.monotonic())
            self.at_once += 1
            handler.counted = True
            self.greatest = max(self.greatest, self.at_once)
            fault = self.faults[0] if self.faults else ""
            if fault and not fault.startswith("always"):
                self.faults.pop(0)
        try:
            self.respond(handler, content, fault.removeprefix("always "))
        finally:
            self.done(handler)

    def done(self, handler: Any) -> None:
        """The request is no longer one of those at once."""
        with self.lock:
            if getattr(handler, "counted", False):
                self.at_once, handler.counted = self.at_once - 1, False

    def respond(self, handler: Any, content: dict[str, Any], fault: str) -> None:
        word, _, rest = fault.partition(" ")
        if word == "status":
            handler.say(int(rest), {"error": {"message": f"no: {rest}"}})
        elif word == "wait":
            handler.say(429, {"error": {"message": "slow down"}}, Retry_After=rest)
        elif word == "html":
            handler.say(200, b"<html>a proxy</html>")
        elif word == "list":
            handler.say(200, [])
        elif word == "redirect":
            handler.say(302, b"", Location="http://127.0.0.1:1/v1")
        elif word == "slow":
            time.sleep(float(rest))
            handler.say(200, {})
        elif word == "drip":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            for _ in range(40):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)
        elif word == "hang-up":
            handler.close_connection = True
            handler.connection.close()
        elif word == "cut":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices"')
            handler.close_connection = True
        else:
            time.sleep(0.01)
            handler.say(200, self.good(content, fault))

    def good(self, content: dict[str, Any], fault: str) -> dict[str, Any]:
        prompt = list(content["prompt"])
        if fault == "adds a token":
            prompt = [0, *prompt]
        if fault == "other tokens":
            prompt = [(token + 1) % 5 for token in prompt]
        with torch.no_grad():
            logs = self.model(torch.tensor([prompt]))[0].log_softmax(-1)
        listed: list[Any] = [None]
        for place in range(1, len(prompt)):
            listed.append(self.entry(logs[place - 1], prompt[place], content["prompt_logprobs"], fault))
        if fault == "first too":
            listed[0] = listed[-1]
        choice = {"index": 0, "text": "", "prompt_logprobs": listed}
        if fault == "none":
            choice.pop("prompt_logprobs")
        return {"model": "another" if fault == "another model" else content["model"], "choices": [choice]}

    def entry(self, logs: Tensor, token: int, k: int, fault: str) -> dict[str, Any]:
        k = min(k, self.most)
        if fault == "fewer":
            k = 1
        values, classes = logs.topk(k)
        best = [*zip(classes.tolist(), values.tolist(), strict=True)]
        if token not in classes:
            best.insert(0, (token, float(logs[token])))  # k + 1 entries, the token itself first
        if fault == "nan":
            best[0] = (best[0][0], float("nan"))
        if fault == "words":
            return {"the": {"logprob": -1.0}}
        return {str(name): {"logprob": value, "rank": 1, "decoded_token": "x"} for name, value in best}
