"""What a release's server makes of each request, and what arrives at the service: a stand-in that keeps it."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.compat.conftest import START_SECONDS
from tests.compat.releases import Release
from tests.compat.stack import Stack, dpo, message, sft, training
from tests.fake_training_service import FakeTrainingService
from tests.stack_server import REPOSITORY, stack_server

ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5", "weight": 3},
    {
        "prompt": [{"role": "user", "content": "Qu'est-ce que l'été ?"}],
        "chosen": [{"role": "assistant", "content": "Une saison."}],
        "rejected": [{"role": "assistant", "content": "Je ne sais pas."}],
    },
]
TEXT_ROWS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
CSV = "prompt,chosen,rejected\nhi,hello,no\nbye,see you,no\n"


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def dataset(server: Stack, fake: FakeTrainingService) -> str:
    """The id of rows: a registered dataset, or a file at the service where the release has no datasets."""
    return given(server, fake, TEXT_ROWS)


def given(server: Stack, fake: FakeTrainingService, rows: list[dict[str, Any]]) -> str:
    if server.release.datasets is None:
        return str(fake._store(json_lines(rows).encode())["id"])
    return server.register({"type": "rows", "rows": rows})


def last_body(fake: FakeTrainingService) -> dict[str, Any]:
    return list(fake.bodies.values())[-1]


def test_starting_and_calling_while_the_service_is_down(release: Release, server: Stack) -> None:
    """starts while the service is down, and says so (502)"""
    server.switch.to(None)
    answer = server.http.get(f"{release.prefix}/post-training/jobs")
    assert answer.status_code == 502, answer.text
    assert "cannot be reached" in message(answer)
    assert server.http.get("/v1/health").status_code == 200


def test_health(release: Release, server: Stack, fake: FakeTrainingService) -> None:
    """health of the provider"""

    def health() -> dict[str, Any]:
        providers = server.http.get("/v1/providers").raise_for_status().json()["data"]
        (found,) = [provider for provider in providers if provider["provider_id"] == "trl_remote"]
        return dict(found["health"])

    if health()["status"] == "Not Implemented":
        pytest.skip("this release does not ask a provider of a single implementation")
    assert health()["status"] == "OK"
    server.switch.to(None)
    assert health()["status"] == "Error"
    assert "cannot be reached" in health()["message"]


def test_dpo_from_rows(release: Release, server: Stack, fake: FakeTrainingService) -> None:
    """DPO: rows and every value arrive as sent"""
    data = given(server, fake, ROWS)
    answer = server.optimize(
        data,
        training_config=training(data, max_steps_per_epoch=3, gradient_accumulation_steps=2, dtype="fp32"),
        hyperparam_search_config={"seed": 7, "dpo": {"label_smoothing": 0.1}},
        logger_config={"logging_steps": 5},
    )
    assert answer.status_code == 200, answer.text
    body = last_body(fake)
    assert fake.files[body["training_file"]].decode() == json_lines(ROWS)
    assert body["model"] == "org/tiny"
    assert body["seed"] == 7
    assert body["method"] == {
        "type": "dpo",
        "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 2, "beta": 0.2}},
    }
    options = body["trl"]
    assert options["client_id"] == answer.json()["job_uuid"]
    assert (options["max_steps_per_epoch"], options["gradient_accumulation_steps"]) == (3, 2)
    assert options["dpo"] == {"loss_type": ["sigmoid"], "label_smoothing": 0.1}
    assert options["optimizer"] == {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01}
    assert options["scheduler"] == {"warmup_steps": 1}
    assert (options["precision"], options["logging"], options["shuffle"]) == ("fp32", {"steps": 5}, True)


def test_defaults_are_no_wishes(server: Stack, fake: FakeTrainingService, dataset: str) -> None:
    """Llama Stack's own defaults (one step, bf16) are not taken for wishes"""
    assert server.optimize(dataset).status_code == 200
    assert not {"max_steps_per_epoch", "gradient_accumulation_steps", "evaluation"} & last_body(fake)["trl"].keys()
    assert last_body(fake)["trl"].get("precision") in (None, "auto")


def test_supervised_fine_tuning(server: Stack, fake: FakeTrainingService) -> None:
    """SFT: rows and every value arrive as sent"""
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}]
    answer = server.fine_tune(given(server, fake, chats))
    assert answer.status_code == 200, answer.text
    body = last_body(fake)
    assert fake.files[body["training_file"]].decode() == json_lines(chats)
    assert body["method"] == {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 2}},
    }
    assert body["trl"]["tuning"] == "lora"
    assert body["trl"]["lora"]["rank"] == 4
    assert body["trl"]["lora"]["target_modules"] == ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_every_algorithm_config(server: Stack, fake: FakeTrainingService, dataset: str) -> None:
    """algorithm_config in every release's shape; LoRA means DPO through it"""
    for algorithm, beta, options in (
        ({"beta": 0.3, "loss_type": "ipo"}, 0.3, {"dpo": {"loss_type": ["ipo"]}}),
        ({"reward_scale": 0.4, "reward_clip": 0, "epsilon": 0.1, "gamma": 1}, 0.4, {"dpo": {"label_smoothing": 0.1}}),
        (sft("")["algorithm_config"], 0.1, {"tuning": "lora", "lora": {"rank": 4, "alpha": 8}}),
        ({**sft("")["algorithm_config"], "quantize_base": True}, 0.1, {"lora": {"rank": 4, "quantization": "nf4"}}),
    ):
        answer = server.optimize(dataset, algorithm_config=algorithm)
        assert answer.status_code == 200, answer.text
        body = last_body(fake)
        assert body["method"]["dpo"]["hyperparameters"]["beta"] == beta
        for group, values in options.items():
            sent = body["trl"][group]
            assert sent == values if not isinstance(values, dict) else values.items() <= sent.items()


def test_refusals_by_name(release: Release, server: Stack, fake: FakeTrainingService, dataset: str) -> None:
    """what cannot be done is refused by name before anything is sent"""

    def data_config(**changes: Any) -> dict[str, Any]:
        return {**training(dataset)["data_config"], **changes}

    refused: list[tuple[int, str, dict[str, Any]]] = [
        (400, "kto_pair", {"algorithm_config": {"beta": 0.1, "loss_type": "kto_pair"}}),
        (400, "algorithm_config.beta", {"algorithm_config": {"beta": -1}}),
        (400, "bta", {"algorithm_config": {"bta": 0.1}}),
        (400, "reward_clip", {"algorithm_config": {"reward_scale": 1, "reward_clip": 5, "epsilon": 0, "gamma": 1}}),
        (501, "QAT", {"algorithm_config": {"type": "QAT", "quantizer_name": "int8", "group_size": 32}}),
        (400, "packed", {"training_config": training(dataset, data_config=data_config(packed=True))}),
        (400, "train_on_input", {"training_config": training(dataset, data_config=data_config(train_on_input=True))}),
        (
            400,
            "fsdp_cpu_offload",
            {"training_config": training(dataset, efficiency_config={"fsdp_cpu_offload": True})},
        ),
        (400, "dtype", {"training_config": training(dataset, dtype="int4")}),
        (400, "max_step_per_epoch", {"training_config": training(dataset, max_step_per_epoch=5)}),
        (400, "project", {"logger_config": {"project": "mine"}}),
        (400, "client_id", {"hyperparam_search_config": {"client_id": "x"}}),
    ]
    asked = len(fake.headers)
    for status, name, changes in refused:
        answer = server.optimize(dataset, **changes)
        assert (answer.status_code, name in answer.text) == (status, True), (name, answer.text)
    answer = server.fine_tune(dataset, checkpoint_dir="/tmp/mine")
    assert (answer.status_code, "checkpoint_dir" in answer.text) == (400, True), answer.text
    answer = server.fine_tune(dataset, algorithm_config={"type": "QAT", "quantizer_name": "int8", "group_size": 32})
    assert answer.status_code == 501, answer.text
    assert len(fake.headers) == asked


def test_the_same_job_twice(server: Stack, fake: FakeTrainingService, dataset: str) -> None:
    """job_uuid: the same request is the same job, another one a 409"""
    body = dpo(dataset, None, server.release)
    jobs = len(fake.jobs)
    for _ in range(2):
        answer = server.post("preference-optimize", body)
        assert (answer.status_code, answer.json()) == (200, {"job_uuid": body["job_uuid"]})
    assert len(fake.jobs) == jobs + 1
    again = server.post("preference-optimize", {**body, "finetuned_model": "org/other"})
    assert again.status_code == 409, again.text
    assert body["job_uuid"] in message(again)


def test_unknown_names(server: Stack, fake: FakeTrainingService, dataset: str) -> None:
    """unknown job, dataset (404) and model (400)"""
    for verb in ("status", "artifacts", "cancel"):
        answer = server.job(verb, "nobody")
        assert (answer.status_code, "nobody" in message(answer)) == (404, True), answer.text
    answer = server.optimize("never-registered")
    assert (answer.status_code, "never-registered" in message(answer)) == (404, True), answer.text
    answer = server.optimize(dataset, finetuned_model="missing/model")
    assert (answer.status_code, "missing/model was not found" in message(answer)) == (400, True), answer.text


def test_bad_rows(server: Stack, fake: FakeTrainingService) -> None:
    """bad rows: each is named (400), and nothing stays behind"""
    data = given(server, fake, [TEXT_ROWS[0], {"prompt": "x", "chosen": "y"}, {"prompt": "x", "rejected": "y"}])
    files = len(fake.files)
    answer = server.optimize(data)
    assert answer.status_code == 400, answer.text
    assert "row 2, rejected is missing" in message(answer)
    assert "row 3, chosen is missing" in message(answer)
    assert len(fake.files) == files


def test_uris(release: Release, server: Stack, fake: FakeTrainingService) -> None:
    """URIs: files, data:, imports by the service; lsfs: and others are a clear 400"""
    folder = server.server.log_file.parent
    (folder / "pairs.jsonl").write_text(json_lines(TEXT_ROWS))
    (folder / "pairs.csv").write_text(CSV)
    (folder / "secret.txt").write_text("not for you")
    allowed = "https://data.example.org/pairs.parquet"
    fake.importable[allowed] = b"PAR1"
    encoded = base64.b64encode(CSV.encode()).decode()

    def submit(uri: str) -> Any:
        if release.datasets is None:
            return server.optimize(uri)
        return server.optimize(server.register({"type": "uri", "uri": uri}))

    for uri, content in (
        (f"file://{folder}/pairs.jsonl", json_lines(TEXT_ROWS).encode()),
        (f"file://{folder}/pairs.csv", CSV.encode()),
        (f"data:text/csv;base64,{encoded}", CSV.encode()),
        (allowed, b"PAR1"),
    ):
        answer = submit(uri)
        assert answer.status_code == 200, (uri, answer.text)
        assert fake.files[last_body(fake)["training_file"]] == content
    if release.datasets is not None:
        fake.table = b"prompt,chosen,rejected,weight\nhi,hello,no,3\nbye,see you,no,\n"
        answer = submit(f"{server.switch.url}/table.csv")
        assert answer.status_code == 200, answer.text
        assert fake.files[last_body(fake)["training_file"]].decode().splitlines() == [
            '{"chosen":"hello","prompt":"hi","rejected":"no","weight":3}',
            '{"chosen":"see you","prompt":"bye","rejected":"no"}',
        ]
    for uri, reason in (
        ("https://data.example.org/other.jsonl", "not among the URLs"),
        (f"file://{folder}/nothing.jsonl", "there is no file"),
        (f"file://{folder}/secret.txt", "What works"),
        ("lsfs://file-1", "files API"),
        ("gopher://x/y.jsonl", "What works"),
    ):
        answer = submit(uri)
        assert (answer.status_code, reason in message(answer)) == (400, True), (uri, answer.text)


def test_ten_jobs_at_once(server: Stack, fake: FakeTrainingService, dataset: str) -> None:
    """10 jobs at once"""
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda _: server.optimize(dataset), range(10)))
    assert [answer.status_code for answer in answers] == [200] * 10, [answer.text for answer in answers]
    made = {answer.json()["job_uuid"] for answer in answers}
    assert len(made) == 10
    assert made <= set(server.jobs())


def test_many_rows(server: Stack, fake: FakeTrainingService) -> None:
    """5,000 rows arrive whole; a second job sends none of them again"""
    rows = [{"prompt": f"p{i}", "chosen": f"good {i} " * 5, "rejected": f"bad {i} " * 5} for i in range(5000)]
    data = given(server, fake, rows)
    for _ in range(2):
        assert server.optimize(data).status_code == 200
        files = len(fake.files)
    first, second = [fake.bodies[job]["training_file"] for job in list(fake.jobs)[-2:]]
    assert first == second
    assert fake.files[first].decode() == json_lines(rows)
    assert len(fake.files) == files


def test_who_calls(release: Release, server: Stack, fake: FakeTrainingService, dataset: str) -> None:
    """an API key per request; the caller's trace goes on to the service"""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    key = {release.provider_data: json.dumps({"trl_remote_api_key": "key-of-this-caller"})}
    asked = len(fake.headers)
    answer = server.post("preference-optimize", dpo(dataset, None, release), traceparent=trace, **key)
    assert answer.status_code == 200, answer.text
    sent = fake.headers[asked:]
    assert {headers.get("authorization") for headers in sent} == {"Bearer key-of-this-caller"}
    # A stack that records spans of its own hands on its own span of the caller's trace.
    assert {headers["traceparent"].split("-")[1] for headers in sent} == {trace.split("-")[1]}
    assert all(headers["user-agent"].startswith("llama-stack-provider-trl-remote/") for headers in sent)
    asked = len(fake.headers)
    server.jobs()
    assert "authorization" not in fake.headers[asked]
    assert "key-of-this-caller" not in server.server.log()


def test_both_spellings(release: Release, server: Stack, fake: FakeTrainingService, dataset: str) -> None:
    """job routes in both spellings"""
    if not release.both_routes:
        pytest.skip("servers and clients of this release agree on one spelling")
    job = server.optimize(dataset).json()["job_uuid"]
    for in_path in (True, False):
        for verb in ("status", "artifacts", "cancel"):
            answer = server.job(verb, job, in_path=in_path)
            assert answer.status_code == 200, (in_path, verb, answer.text)
    assert server.status(job)["status"] == "cancelled"


def test_refusals_keep_the_connection(server: Stack, fake: FakeTrainingService, dataset: str) -> None:
    """a refusal does not break the connection it came on"""
    for _ in range(3):
        assert server.optimize(dataset, algorithm_config={"beta": -1}).status_code == 400
        assert server.http.get(f"{server.release.prefix}/post-training/jobs").status_code == 200


def test_provider_by_module(
    release: Release, python: Path, server: Stack, fake: FakeTrainingService, dataset: str, tmp_path: Path
) -> None:
    """the provider by `module:`, and the release's own job routes alone"""
    if not release.modules:
        pytest.skip("this release loads providers from a folder, or the API as a whole")
    config = (REPOSITORY / release.config).read_text()
    by_module = config.replace("external_providers_dir: ./providers.d\n", "").replace(
        "provider_type: remote::trl_remote\n",
        "provider_type: remote::trl_remote\n      module: llama_stack_provider_trl_remote\n",
    )
    assert by_module.count("module:") == 1
    (tmp_path / "run.yaml").write_text(by_module.replace("job_routes: both", "job_routes: native"))
    job = server.optimize(dataset).json()["job_uuid"]
    with stack_server(
        tmp_path / "home",
        server.switch.url,
        config=tmp_path / "run.yaml",
        python=str(python),
        serve=release.serve,
        start_seconds=START_SECONDS,
    ) as process:
        other = Stack(release, process, server.switch, python)
        assert job in other.jobs()
        if release.both_routes:
            assert other.job("status", job, in_path=not release.job_in_path).status_code == 404
        if release.own_routes_work:
            status = other.status(job)
            assert (status["job_uuid"], status["status"]) == (job, "scheduled")
