"""What a caller names is never a path, and what lies where a file should be is served only if it is one."""

import os

import pytest

from bento_service.errors import UnknownModel
from bento_service.training.checkpoints import complete
from bento_service.training.models import find_model, local_models
from tests.core_factory import MODEL, request, upload

SECRET = "what no answer may hold"

BAD_IDS = ["a" * 65, "a%20b", "a.b", "..", "%2e%2e", "..%2f..%2fetc", "..%5cetc", "%00", "a%0ab", "%ff", "ü", "~"]

ROUTES = [
    "/v1/files/{}",
    "/v1/files/{}/content",
    "/v1/fine_tuning/jobs/{}",
    "/v1/fine_tuning/jobs/{}/events",
    "/v1/fine_tuning/jobs/{}/checkpoints",
    "/v1/fine_tuning/jobs/{}/checkpoints/1/content",
    "/v1/fine_tuning/jobs/{}/checkpoints/1/files/config.json",
    "/v1/fine_tuning/jobs/{}/attempts",
    "/v1/fine_tuning/jobs/{}/logs",
    "/v1/fine_tuning/jobs/{}/manifest",
]


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "outside" / "secret.txt"
    file.parent.mkdir()
    file.write_text(SECRET)
    return file


@pytest.fixture
def job(impl):
    return impl.submit(request(upload(impl).id))


@pytest.fixture
def run(impl, job):
    folder = impl.settings.runs_path / job.id
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("route", ROUTES)
def test_an_id_in_a_path_has_the_form_of_an_id(client, route):
    """Letters, digits, "-" and "_", 64 at most; anything else is 404 or 400 in the one form that errors have."""
    for bad in BAD_IDS:
        answer = client.get(route.format(bad))
        assert answer.status_code in (400, 404), bad
        assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}, bad


@pytest.mark.parametrize("name", ["..%2fspec.json", "%2fetc%2fpasswd", "..", "complete.json", "a%00b", "x" * 300])
def test_a_file_of_a_checkpoint_is_one_that_its_manifest_names(client, run, job, name):
    """The name is looked up among the published files, not on the disk."""
    checkpoint = make_checkpoint(run)
    (checkpoint / "private.bin").write_text(SECRET)
    url = f"/v1/fine_tuning/jobs/{job.id}/checkpoints/1/files"
    assert client.get(f"{url}/adapter_config.json").status_code == 200
    for asked in (name, "private.bin"):
        answer = client.get(f"{url}/{asked}")
        assert answer.status_code in (400, 404)
        assert SECRET not in answer.text


@pytest.mark.parametrize(
    "value", ["../../etc/passwd", "/etc/passwd", "a/b", "..", "x\\y", "🙂", "'; DROP TABLE jobs; --"]
)
def test_a_client_id_and_a_file_name_are_data(client, impl, value):
    """They are stored and answered as they came, and name nothing on the disk."""
    before = {path.name for path in impl.settings.home.rglob("*")}
    file = client.post("/v1/files", files={"file": (value, b'{"chosen": "a", "rejected": "b", "prompt": "c"}\n')})
    body = {"model": MODEL, "training_file": file.json()["id"], "trl": {"client_id": value}}
    answer = client.post("/v1/fine_tuning/jobs", json=body)
    assert answer.json()["trl"]["client_id"] == value
    found = client.get("/v1/fine_tuning/jobs", params={"client_id": value}).json()["data"]
    assert [job["id"] for job in found] == [answer.json()["id"]]
    new = {path.name for path in impl.settings.home.rglob("*")} - before
    assert all(set(name) <= set("0123456789abcdef") for name in new), new


@pytest.mark.parametrize(
    "name", ["/etc", "../models", "org/../../etc", "./org", "~/model", "org\\model", "a//b", "org/x/y"]
)
def test_a_model_name_is_no_path(client, impl, name):
    """<org>/<name>, as on the hub; a folder that a link leads to must lie in the models folder too."""
    body = {"model": name, "training_file": upload(impl).id}
    answer = client.post("/v1/fine_tuning/jobs", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_a_model_folder_that_is_a_link_out_is_refused(impl, secret):
    (secret.parent / "config.json").write_text("{}")
    (impl.settings.models_path / "org" / "linked").symlink_to(secret.parent)
    with pytest.raises(UnknownModel, match="leads out"):
        find_model("org/linked", impl.settings.models_path)
    assert local_models(impl.settings.models_path) == ["org/tiny"]


class TestNoLinkIsFollowed:
    """A symbolic link planted in a run directory, a checkpoint or the files folder is not served."""

    @pytest.mark.parametrize("query", ["", "?tail=10"])
    def test_log(self, client, job, run, secret, query):
        (run / "trainer.log").symlink_to(secret)
        self.refused(client.get(f"/v1/fine_tuning/jobs/{job.id}/logs{query}"))

    def test_run_directory(self, client, job, impl, secret):
        (secret.parent / "trainer.log").write_text(SECRET)
        impl.settings.runs_path.mkdir(exist_ok=True)
        (impl.settings.runs_path / job.id).symlink_to(secret.parent)
        self.refused(client.get(f"/v1/fine_tuning/jobs/{job.id}/logs"))

    def test_checkpoint(self, client, job, run, secret):
        elsewhere = make_checkpoint(secret.parent)
        (elsewhere / "adapter_config.json").write_text(SECRET)
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "checkpoint-1").symlink_to(elsewhere)
        url = f"/v1/fine_tuning/jobs/{job.id}/checkpoints/1"
        self.refused(client.get(f"{url}/content"))
        self.refused(client.get(f"{url}/files/adapter_config.json"))

    def test_checkpoints_folder(self, client, job, run, secret):
        make_checkpoint(secret.parent)
        (run / "checkpoints").symlink_to(secret.parent / "checkpoints")
        self.refused(client.get(f"/v1/fine_tuning/jobs/{job.id}/checkpoints/1/content"))

    @pytest.mark.parametrize("inside", [True, False])
    def test_file_of_a_checkpoint(self, client, job, run, secret, inside):
        checkpoint = make_checkpoint(run, size=len(SECRET))
        (checkpoint / "optimizer.pt").write_text(SECRET)
        (checkpoint / "adapter_config.json").unlink()
        (checkpoint / "adapter_config.json").symlink_to("optimizer.pt" if inside else secret)
        url = f"/v1/fine_tuning/jobs/{job.id}/checkpoints/1"
        self.refused(client.get(f"{url}/files/adapter_config.json"))
        assert SECRET.encode() not in content_of(client, f"{url}/content")

    def test_hidden_by_a_pipe(self, client, job, run):
        """Neither is a pipe, on which a reader would wait for ever."""
        os.mkfifo(run / "trainer.log")
        self.refused(client.get(f"/v1/fine_tuning/jobs/{job.id}/logs"))

    def test_uploaded_file(self, client, impl, secret):
        file = upload(impl)
        path = impl.settings.files_path / file.sha256[:2] / file.sha256
        path.unlink()
        secret.write_text(SECRET.ljust(file.bytes)[: file.bytes])
        path.symlink_to(secret)
        answer = content_of(client, f"/v1/files/{file.id}/content")
        assert SECRET.encode()[:10] not in answer

    @staticmethod
    def refused(answer):
        assert answer.status_code >= 400
        assert SECRET not in answer.text


def content_of(client, url):
    try:
        return client.get(url).content
    except Exception as error:  # the connection breaks when a link is met after the answer has begun
        return str(error).encode()


def make_checkpoint(run, size=2):
    """A complete checkpoint of step 1 with one published file of ``size`` bytes."""
    folder = run / "checkpoints" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}".ljust(size))
    (folder / "optimizer.pt").write_text("{}".ljust(size))
    complete(folder, step=1, epoch=1.0, tokens=1, final=True)
    return folder
