"""Metrics have a label per route template and state, never per id."""

from prometheus_client.parser import text_string_to_metric_families

from tests.job_factory import submit


def samples(client):
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def requests(found, route, status, method="GET"):
    return found.get(("trl_http_requests_total", (("method", method), ("route", route), ("status", status))), 0)


def test_requests_are_counted_by_route_template_and_jobs_by_state(client, impl):
    store = impl._store
    jobs = [submit(store) for _ in range(3)]
    store.request_stop(jobs[0].id, "cancel")
    for job in jobs:
        assert client.get(f"/v1/fine_tuning/jobs/{job.id}").status_code == 200
    assert client.get("/v1/fine_tuning/jobs/ftjob-nowhere").status_code == 404
    assert client.get("/v1/nothing/here").status_code == 404
    found = samples(client)
    assert requests(found, "/v1/fine_tuning/jobs/{job_id}", "200") == 3
    assert requests(found, "/v1/fine_tuning/jobs/{job_id}", "404") == 1
    assert found[("trl_jobs", (("status", "queued"),))] == 2
    assert found[("trl_jobs", (("status", "cancelled"),))] == 1
    assert found[("trl_jobs", (("status", "running"),))] == 0
    text = client.get("/metrics").text
    assert "ftjob-" not in text and "nothing/here" not in text
