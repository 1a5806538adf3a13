"""How many jobs that have not ended a caller may have, and how many there may be."""

import pytest
from starlette.testclient import TestClient

from bento_service.api.app import create_app, in_front_of
from bento_service.errors import TooManyJobs
from tests.core_factory import MODEL, core, request, upload


@pytest.fixture
def limited(tmp_path):
    with core(tmp_path, api_keys="ci:KEY-1,anna:KEY-2", max_open_jobs_per_key=2, max_open_jobs=3) as impl:
        yield impl


def submit(impl, caller, **changes):
    return impl.submit(request(upload(impl).id, **changes), submitted_by=caller)


def test_a_key_has_so_many_open_jobs_and_no_more(limited):
    """TRL_MAX_OPEN_JOBS_PER_KEY: the answer is 429, says when to come again, and names the setting."""
    app = in_front_of(create_app(limited), limited.settings)
    file_id = upload(limited).id
    with TestClient(app, base_url="http://localhost", client=("192.0.2.7", 1)) as client:

        def post(key, client_id=None):
            body = {"model": MODEL, "training_file": file_id, "trl": {"client_id": client_id}}
            return client.post("/v1/fine_tuning/jobs", json=body, headers={"x-api-key": key})

        first = post("KEY-1", "mine")
        assert (first.status_code, first.json()["trl"]["submitted_by"]) == (200, "ci")
        assert post("KEY-1").status_code == 200
        refused = post("KEY-1")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_open_jobs")
        assert int(refused.headers["retry-after"]) > 0
        assert "TRL_MAX_OPEN_JOBS_PER_KEY" in refused.json()["error"]["message"]

        assert post("KEY-1", "mine").json()["id"] == first.json()["id"]  # a repeat is not another job
        assert post("KEY-2").json()["trl"]["submitted_by"] == "anna"
        client.post(f"/v1/fine_tuning/jobs/{first.json()['id']}/cancel", headers={"x-api-key": "KEY-1"})
        assert post("KEY-1").status_code == 200


def test_the_service_has_so_many_open_jobs_and_no_more(limited):
    """TRL_MAX_OPEN_JOBS, whoever submits."""
    for caller in ("ci", "ci", "anna"):
        submit(limited, caller)
    with pytest.raises(TooManyJobs, match="TRL_MAX_OPEN_JOBS on"):
        submit(limited, "anna")


def test_callers_without_a_key_count_as_one(limited):
    """Where no keys are set, nobody can say who submitted a job."""
    submit(limited, "ci")
    for _ in range(2):
        assert submit(limited, None).submitted_by is None
    with pytest.raises(TooManyJobs, match="No API key is set"):
        submit(limited, None)


def test_the_last_place_goes_to_the_one_who_stores_first(limited):
    """Two submits that both found a place: it is looked for again in the transaction that stores the job."""
    found = limited._store.require_room

    def overtaken(submitted_by, limits):
        found(submitted_by, limits)
        limited._store.require_room = found
        submit(limited, submitted_by)

    submit(limited, "ci")
    limited._store.require_room = overtaken
    with pytest.raises(TooManyJobs):
        submit(limited, "ci")
    assert len(limited.list_jobs().data) == 2
