"""What VLLMServerEngine makes of servers that are late, odd or gone; real HTTP, without a vLLM behind it."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_batch, make_policy

from sppo_lightning.engines import FolderTransfer, Sampling, VLLMServerEngine
from sppo_lightning.engines.http import JSONClient
from sppo_lightning.errors import InputError

Answer = tuple[int, Any]


class Server:
    """Answers like vLLM; `change` may replace what it says to a request."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.label = "default"
        self.connections: list[socket.socket] = []
        self.change: Callable[[str, Any, Any], Answer | None] = lambda path, body, answer: None
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                owner.connections.append(self.connection)

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._answer(json.loads(text) if text else None)

            def _answer(self, body: Any) -> None:
                owner.asked.append((self.path, body))
                status, answer = owner.answer(self.path, body)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign, assignment]  # clients hang up here
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, path: str, body: Any) -> Answer:
        answer: Any = {}
        if path == "/update_weight_version":
            self.label = body["new_version"]
        if path == "/inference/v1/generate":
            ids = [5, 6, 1][: body["sampling_params"]["max_tokens"]]
            choice = {
                "token_ids": ids,
                "finish_reason": "stop" if ids[-1] == 1 else "length",
                "logprobs": {"content": [{"token_id": t, "logprob": -0.25 * t} for t in ids]},
                "weight_versions": [{"version": self.label, "start": 0, "end": len(ids)}],
            }
            answer = {"choices": [choice]}
        return self.change(path, body, answer) or (200, answer)

    def hang_up(self) -> None:
        """Close all connections, but go on listening."""
        while self.connections:
            self.connections.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def requests(self) -> list[Any]:
        return [body for path, body in self.asked if path == "/inference/v1/generate"]


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    made = [Server(), Server()]
    yield made
    for server in made:
        server.close()


def engine_of(servers: list[Server], path: Path, **settings: Any) -> VLLMServerEngine:
    return VLLMServerEngine([server.url for server in servers], FolderTransfer(str(path)), **settings)


def generate(engine: VLLMServerEngine, **sampling: Any) -> Any:
    policy = engine.policy or make_policy()
    engine.update_weights(policy, 3)
    return engine.generate(make_batch(policy, ["1 + 2 =", "2"]), Sampling(**sampling))


def test_requests_are_spread_and_say_how_to_sample(servers: list[Server], tmp_path: Path):
    engine = engine_of(servers, tmp_path)
    settings = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "stop": (";",)}
    rollouts = generate(engine, samples_per_prompt=3, max_new_tokens=9, **settings)
    assert rollouts.response_ids.tolist() == [[5, 6, 1]] * 6
    assert rollouts.sampled_log_probs.tolist() == [[-1.25, -1.5, -0.25]] * 6
    assert rollouts.finish_reasons == ["stop"] * 6
    assert rollouts.policy_versions.tolist() == [3] * 6
    asked = [server.requests() for server in servers]
    assert [len(requests) for requests in asked] == [3, 3]
    sent = [request["sampling_params"] for requests in asked for request in requests]
    assert len({each["seed"] for each in sent}) == 6
    assert all(0 <= each["seed"] < 2**63 for each in sent)
    for each in sent:
        assert (each["max_tokens"], each["temperature"], each["stop_token_ids"]) == (9, 0.7, [1])
        assert (each["top_k"], each["top_p"], each["min_p"], each["stop"]) == (3, 0.9, 0.1, [";"])
    assert generate(engine, max_new_tokens=2).finish_reasons == ["length"] * 2


def test_weights_travel_when_they_have_changed_and_with_a_head_of_their_own(servers: list[Server], tmp_path: Path):
    engine, policy = engine_of(servers, tmp_path), make_policy()
    engine.update_weights(policy, 0)
    stored = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(stored["lm_head.weight"], policy.model.get_input_embeddings().weight.detach())
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    sent = [path for path, _ in servers[1].asked if path != "/health"]
    assert sent == ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
    engine.update_weights(policy, 0)
    engine.update_weights(policy, 1)  # a step that changed nothing
    assert [path for path, _ in servers[1].asked if path != "/health"] == sent
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.add_(1.0)
    engine.update_weights(policy, 2)
    assert [path for path, _ in servers[1].asked if path != "/health"] == sent * 2
    assert (
        load_file(tmp_path / "model.safetensors")["lm_head.weight"].mean() > stored["lm_head.weight"].mean() + 0.9
    )
    assert servers[0].label == servers[1].label == "2.2"


def test_a_connection_that_the_server_has_closed_meanwhile_is_opened_again(servers: list[Server]):
    """As vLLM's does when nothing is said for five seconds."""
    client = JSONClient(servers[0].url, 10.0)
    assert client.get("/health") == {}
    servers[0].hang_up()
    assert client.get("/health") == {}
    assert len(servers[0].asked) == 2


@pytest.mark.slow
def test_a_server_that_dies_over_a_request_is_found_out(
    servers: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It keeps the connection and never answers, as vLLM does while it shuts down."""
    monkeypatch.setattr("sppo_lightning.engines.vllm_server._LOOK_SECONDS", 0.2)
    release, sick = threading.Event(), threading.Event()

    def change(path: str, body: Any, answer: Any) -> Answer | None:
        if path == "/inference/v1/generate":
            sick.set()
            release.wait(60)
        return (503, {}) if path == "/health" and sick.is_set() else None

    servers[0].change = change
    engine = engine_of(servers, tmp_path)
    with pytest.warns(UserWarning, match="A vLLM server is left out from now on, 1 go on: .* answers 503"):
        rollouts = generate(engine, samples_per_prompt=4)
    assert len(rollouts) == 8
    assert len(servers[1].requests()) == 8
    servers[1].change = change
    with pytest.raises(RuntimeError, match="^No vLLM server is left: .* answers 503"):
        generate(engine)
    release.set()


def test_a_server_that_goes_is_left_out(servers: list[Server], tmp_path: Path):
    engine = engine_of(servers, tmp_path)
    generate(engine)
    servers[0].close()
    with pytest.warns(UserWarning, match="A vLLM server is left out from now on, 1 go on: http://127.0.0.1"):
        rollouts = generate(engine, samples_per_prompt=4)
    assert len(rollouts) == 8
    assert [server.url for server in engine.servers] == [servers[1].url]
    servers[1].close()
    engine.retries = 1
    with pytest.raises(RuntimeError, match="^A request got no answer in 2 tries: http://127.0.0.1:[0-9]+ does not"):
        generate(engine)


def test_a_server_that_answers_again_takes_part_from_the_next_update_on(servers: list[Server], tmp_path: Path):
    engine = engine_of(servers, tmp_path)
    sick = True
    servers[0].change = lambda path, body, answer: (503, {}) if sick else None
    engine.servers = engine.servers[1:]  # as if it had been left out
    generate(engine)
    assert [server.url for server in engine.servers] == [servers[1].url]
    sick = False
    assert len(generate(engine, samples_per_prompt=4)) == 8
    assert {server.url for server in engine.servers} == {server.url for server in servers}
    assert [len(server.requests()) for server in servers] == [4, 6]
    assert servers[0].label == servers[1].label == "3.2"  # both have been sent the same weights again


def test_the_folder_is_written_when_weights_have_changed(servers: list[Server], tmp_path: Path):
    engine, policy, file = engine_of(servers, tmp_path), make_policy(), tmp_path / "model.safetensors"
    engine.update_weights(policy, 0)
    first = file.stat().st_mtime_ns
    engine.transfer.send(policy, engine.servers, "again")
    assert file.stat().st_mtime_ns == first
    assert servers[0].label == "again"
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.add_(1.0)
    engine.transfer.send(policy, engine.servers, "new")
    assert file.stat().st_mtime_ns > first


def test_a_failure_that_passes_is_tried_again(servers: list[Server], tmp_path: Path):
    failures = iter([(500, "busy"), (503, "busy")])
    servers[0].change = lambda path, body, answer: next(failures, None) if "generate" in path else None
    engine = engine_of(servers[:1], tmp_path)
    assert len(generate(engine)) == 2
    assert len(servers[0].requests()) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"weight_versions": [{"version": "3.9", "start": 0, "end": 3}]},
            r"sampled from the weights \['3.9'\], where '3.1'",
        ),
        ({"weight_versions": []}, r"sampled from the weights \[\], where '3.1' are the present ones"),
        ({"token_ids": [5, 6]}, "gives 2 tokens and log-probabilities"),
        ({"token_ids": [], "logprobs": {"content": []}}, "gives 0 tokens"),
        ({"logprobs": {"content": [{"logprob": float("nan")}] * 3}}, "gives 3 tokens and log-probabilities .nan"),
        ({"logprobs": None}, "answers without"),
        ({"finish_reason": "abort"}, "ended a response for the reason 'abort'"),
    ],
)
def test_odd_answers(servers: list[Server], tmp_path: Path, change: dict[str, Any], words: str):
    def changed(path: str, body: Any, answer: Any) -> Answer | None:
        if "generate" in path:
            answer["choices"][0].update(change)
        return None

    servers[0].change = changed
    with pytest.raises(RuntimeError, match=words):
        generate(engine_of(servers[:1], tmp_path))


def test_refusals(servers: list[Server], tmp_path: Path):
    servers[0].change = lambda path, body, answer: (400, "too long") if "generate" in path else None
    with pytest.raises(
        InputError, match=r"^A vLLM server refuses a request: http://.*/generate answers 400: .too long"
    ):
        generate(engine_of(servers[:1], tmp_path))
    servers[0].change = lambda path, body, answer: (404, "no") if "rpc" in path else None
    with pytest.raises(
        InputError, match="^A server does not take the weights .* start it with VLLM_SERVER_DEV_MODE=1"
    ):
        generate(engine_of(servers[:1], tmp_path))
    servers[0].change = lambda path, body, answer: (200, b"<html>")
    with pytest.raises(RuntimeError, match="answers something that is no JSON: '<html>'"):
        engine_of(servers[:1], tmp_path).servers[0].get("/health")


def test_nobody_there(tmp_path: Path):
    engine = VLLMServerEngine(["http://127.0.0.1:9"], FolderTransfer(str(tmp_path)), start_timeout_seconds=0.0)
    with pytest.raises(InputError) as raised:
        engine.update_weights(make_policy(), 0)
    assert str(raised.value).startswith("`servers`: http://127.0.0.1:9 does not answer (ConnectionRefusedError")
    assert (
        f"start it: VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model {tmp_path}"
        in str(raised.value)
    )
    for servers, words in (([], "leaves nobody to ask"), (["ftp://x"], "is no address of a server")):
        with pytest.raises(InputError, match=words):
            VLLMServerEngine(servers)
