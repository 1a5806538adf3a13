"""The client that was released with a server, in front of the real service. Comes first: its jobs train meanwhile."""

from typing import Any

import pytest

from tests.bento_server import BentoServer
from tests.compat.conftest import given
from tests.compat.releases import Release
from tests.compat.stack import Stack, dpo, message, sft
from tests.trainer_run import preference_rows


def test_bad_rows(release: Release, stack: Stack, service: BentoServer, submitted: dict[str, str]) -> None:
    """the service's own report of bad rows reaches the caller"""
    bad = given(stack, service.url, [*preference_rows(1), {"prompt": "p", "chosen": "c"}])
    answer = stack.optimize(bad)
    assert answer.status_code == 400, answer.text
    assert "row 2" in message(answer) and "rejected" in message(answer)


def test_client(release: Release, stack: Stack, files: dict[str, str], submitted: dict[str, str]) -> None:
    """the release's own client: register, submit, list, status, artifacts, cancel, errors"""
    if release.calls is None:
        pytest.skip("the client of this release has no post_training")
    job_uuid = f"client-{release}"
    with stack.client() as call:

        def of_job(verb: str, job_uuid: str) -> dict[str, Any]:
            if release.client_takes_job_uuid:
                return call(f"{release.calls}.job.{verb}", job_uuid=job_uuid)
            return call(f"{release.calls}.job.{verb}", extra_query={"job_uuid": job_uuid})

        registered = call(
            f"{release.client_datasets}.register",
            purpose="post-training/messages",
            source={"type": "rows", "rows": preference_rows(3)},
            dataset_id=f"from-client-{release}",
        )
        assert "error" not in registered, registered
        body = dpo(f"from-client-{release}", job_uuid, release)
        assert call(f"{release.calls}.preference_optimize", **body)["answer"]["job_uuid"] == job_uuid
        listed = call(f"{release.calls}.job.list")["answer"]
        assert job_uuid in str(listed)
        status = of_job("status", job_uuid)["answer"]
        assert (status["job_uuid"], status["status"]) == (job_uuid, "scheduled")
        assert status["resources_allocated"]["queue_position"] >= 1
        assert of_job("artifacts", job_uuid)["answer"] == {"job_uuid": job_uuid, "checkpoints": []}
        assert "error" not in of_job("cancel", job_uuid)
        assert of_job("status", job_uuid)["answer"]["status"] == "cancelled"
        unknown = of_job("status", "nobody")
        assert (unknown["error"], unknown["status"]) == ("NotFoundError", 404)
        assert "nobody" in unknown["message"]
        refused = call(f"{release.calls}.supervised_fine_tune", **sft(files["chats"]) | {"checkpoint_dir": "/tmp/x"})
        assert (refused["error"], refused["status"]) == ("BadRequestError", 400)
