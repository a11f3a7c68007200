"""Answers of an OpenAI-compatible server (vLLM, SGLang, llama.cpp, …): chat completions over HTTP."""

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from bnf_train.data import Prompt
from bnf_train.errors import UsageError, one_line
from bnf_train.sample.answers import Answers
from bnf_train.sample.local import numbered_seed

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries
LONGEST_PAUSE = 60.0  # that a server may ask for
TIMEOUT = 600.0  # of one request


@dataclass
class Server:
    """A server and how it is to answer.

    Attributes:
      url: up to /v1.
      model: the server's name of it.
      how: temperature, top_p and max_tokens of a request.
      stop: set when nothing more is to be asked.
    """

    url: str
    model: str
    samples: int
    seed: int
    how: dict[str, Any]
    concurrency: int = 8
    stop: threading.Event = field(default_factory=threading.Event)

    def __call__(self, prompts: Sequence[Prompt], there: Collection[int]) -> Iterator[tuple[int, Answers]]:
        """Answers to every prompt whose place is not among `there`, in the order in which they come.

        Raises:
          UsageError: the server does not answer after all tries, refuses, or says something else than chat completions.
        """
        missing = [place for place in range(len(prompts)) if place not in there]
        self.stop.clear()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = {pool.submit(self._unless_stopped, prompts[place], place): place for place in missing}
            failed: BaseException | None = None
            for future in as_completed(futures):
                if (error := future.exception()) is not None:
                    failed = failed or error
                elif (answers := future.result()) is not None:
                    yield futures[future], answers  # behind a failure, too: what is under way is not lost
            if failed is not None:
                raise failed
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)

    def _unless_stopped(self, prompt: Prompt, place: int) -> Answers | None:
        """As `answers`; none once others have failed, or when the call ends."""
        if self.stop.is_set():
            return None
        try:
            return self.answers(prompt, place)
        except BaseException:
            self.stop.set()
            raise

    def answers(self, prompt: Prompt, place: int) -> Answers:
        """The answers to one prompt; a server that gives fewer than it is asked for is asked again for the rest."""
        messages, tools = prompt.conversation
        body = {"model": self.model, "messages": messages} | self.how | ({"tools": tools} if tools else {})
        texts: list[str] = []
        cut: list[bool] = []
        tokens: int | None = 0
        while len(texts) < self.samples:
            drawn = {"n": self.samples - len(texts), "seed": (numbered_seed(self.seed, place) + len(texts)) % 2**31}
            answer = self._post(body | drawn)
            try:
                choices = answer["choices"][: drawn["n"]]
                texts += [str(choice["message"].get("content") or "") for choice in choices]
                cut += [choice.get("finish_reason") == "length" for choice in choices]
                used = (answer.get("usage") or {}).get("completion_tokens")
            except (KeyError, TypeError, AttributeError) as error:
                raise self._not_completions(answer) from error
            if not choices:
                raise self._not_completions(answer)
            tokens = None if tokens is None or not isinstance(used, int) else tokens + used
        return Answers(texts, cut, tokens)

    def _post(self, body: dict[str, Any]) -> Any:
        """What the server says; asked again where it is busy, fails, or cannot be reached."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        for pause in (*PAUSES, None):
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    content = response.read()
            except urllib.error.HTTPError as error:
                with error:
                    why = f"{error.code} {error.reason}: {_said(error)}"
                if error.code != 429 and error.code < 500:
                    raise UsageError(f"--server {self.url}: refuses the request ({why}).") from error
                pause = _asked_for(error, pause)
                last: Exception = error
            except (OSError, http.client.HTTPException) as error:  # no connection, or one that broke
                why, last = one_line(getattr(error, "reason", None) or error), error
            else:
                return self._parsed(content)
            if pause is None or self.stop.wait(pause):
                break
        raise UsageError(
            f"--server {self.url}: no answer after {len(PAUSES) + 1} tries ({why}); see that it runs, and call again: "
            "answers that are there are kept."
        ) from last

    def _parsed(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError as error:
            raise self._not_completions(content.decode(errors="replace")) from error

    def _not_completions(self, answer: Any) -> UsageError:
        return UsageError(
            f"--server {self.url}: expected chat completions with choices, got {str(answer)[:200]!r}; is it the address up to "
            "/v1 of an OpenAI-compatible server?"
        )


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says of its failure."""
    try:
        return " ".join(error.read(2000).decode(errors="replace").split())[:300] or "no reason given"
    except (OSError, http.client.HTTPException):
        return "no reason given"


def _asked_for(error: urllib.error.HTTPError, pause: float | None) -> float | None:
    """The pause, or a longer one where the server asks for it in seconds."""
    after = error.headers.get("Retry-After", "")
    return pause if pause is None or not after.isdecimal() else min(max(pause, float(after)), LONGEST_PAUSE)
