"""The files of deploy/ name what there is: settings, ports, probes, the image's user and folder, times to stop in."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from bentoml._internal.cloud.schemas.modelschemas import DeploymentStrategy
from bentoml._internal.cloud.schemas.schemasv2 import CreateDeploymentSchema
from bentoml._internal.container.generate import BENTO_UID_GID
from bentoml._internal.utils.cattr import bentoml_cattr

from bento_service import __version__
from bento_service.api.access import OPEN_PATHS
from bento_service.service import TrlTrainingService
from bento_service.settings import FOREIGN_VARIABLES, Settings

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
FILES = sorted(DEPLOY.glob("*.yaml"))
BENTOFILE = yaml.safe_load((REPOSITORY / "bentofile.yaml").read_text())
SETTINGS = {f"TRL_{name.upper()}" for name in Settings.model_fields}
IMAGE_ENVIRONMENT = {variable["name"]: variable["value"] for variable in BENTOFILE["envs"]}
PORT = 8080


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def kubernetes(kind):
    return [document for document in documents("kubernetes.yaml") if document["kind"] == kind]


def pod():
    (stateful_set,) = kubernetes("StatefulSet")
    return stateful_set["spec"]["template"]["spec"]


def seconds(text):
    return int(re.fullmatch(r"(\d+)s", text)[1])


@pytest.mark.parametrize("file", [*FILES, DEPLOY / "bento.md", REPOSITORY / "docs" / "deployment.md"], ids=str)
def test_every_variable_is_a_setting(file):
    named = set(re.findall(r"\bTRL_[A-Z_]+\b", file.read_text()))
    assert named
    assert named <= SETTINGS | FOREIGN_VARIABLES | {"TRL_IMAGE"}  # compose.yaml's own


def test_the_service_is_told_on_its_port():
    assert TrlTrainingService.config["http"]["port"] == PORT
    assert documents("compose.yaml")[0]["services"]["trl"]["ports"] == [f"{PORT}:{PORT}"]
    assert [service["spec"]["ports"][0]["port"] for service in kubernetes("Service")] == [PORT, PORT]
    assert pod()["containers"][0]["ports"] == [{"name": "http", "containerPort": PORT}]


def test_probes_are_answered_without_a_key():
    (container,) = pod()["containers"]
    probes = {name: probe["httpGet"] for name, probe in container.items() if name.endswith("Probe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/readyz",
        "readinessProbe": "/readyz",
        # A service that does not train for a while must not be killed for it.
        "livenessProbe": "/livez",
    }
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert {probe["path"] for probe in probes.values()} <= OPEN_PATHS
    asked = documents("compose.yaml")[0]["services"]["trl"]["healthcheck"]["test"]
    assert f"http://127.0.0.1:{PORT}/readyz" in asked[-1]


def test_state_is_on_a_volume_that_the_images_user_may_write():
    home = IMAGE_ENVIRONMENT["TRL_HOME"]
    assert IMAGE_ENVIRONMENT["HF_HOME"].startswith(f"{home}/")
    assert f"install -d -o bentoml -g bentoml -m 0750 {home}\n" in (DEPLOY / "image_setup.sh").read_text()
    assert f"home:{home}" in documents("compose.yaml")[0]["services"]["trl"]["volumes"]
    (container,) = pod()["containers"]
    assert {"name": "home", "mountPath": home} in container["volumeMounts"]
    (stateful_set,) = kubernetes("StatefulSet")
    assert [claim["metadata"]["name"] for claim in stateful_set["spec"]["volumeClaimTemplates"]] == ["home"]
    security = pod()["securityContext"]
    assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == BENTO_UID_GID
    for page in (DEPLOY / "bento.md", REPOSITORY / "docs" / "deployment.md"):
        assert f":{home}" in page.read_text()


def test_a_stop_is_given_more_time_than_trainers_get():
    (container,) = pod()["containers"]
    (grace,) = [variable["value"] for variable in container["env"] if variable["name"] == "TRL_GRACE_SECONDS"]
    assert pod()["terminationGracePeriodSeconds"] >= int(grace) + 30
    service = documents("compose.yaml")[0]["services"]["trl"]
    assert seconds(service["stop_grace_period"]) >= int(service["environment"]["TRL_GRACE_SECONDS"]) + 30


def test_keys_are_asked_for_and_none_is_in_a_file():
    assert ":?" in documents("compose.yaml")[0]["services"]["trl"]["environment"]["TRL_API_KEYS"]
    (container,) = pod()["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "trl-remote"}}]
    assert documents("bentocloud.yaml")[0]["secrets"] == ["trl-remote"]
    for file in FILES:
        assert not re.search(r"TRL_API_KEYS: *[\"']?\w", file.read_text()), file


def test_names_of_hosts_stay():
    """A job goes on at once when its host has the name it had; else it waits for a lease to end."""
    assert documents("compose.yaml")[0]["services"]["trl"]["hostname"]
    (container,) = pod()["containers"]
    (name,) = [variable for variable in container["env"] if variable["name"] == "TRL_HOST_NAME"]
    assert name["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}


def test_each_asks_for_a_gpu():
    devices = documents("compose.yaml")[0]["services"]["trl"]["deploy"]["resources"]["reservations"]["devices"]
    assert [device["capabilities"] for device in devices] == [["gpu"]]
    assert pod()["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_bentocloud_reads_its_file_and_never_scales_training_away():
    (given,) = documents("bentocloud.yaml")
    read = bentoml_cattr.structure({**given, "bento": "trl_training_service:latest"}, CreateDeploymentSchema)
    assert bentoml_cattr.unstructure(read) == {**given, "bento": "trl_training_service:latest"}  # no key is unknown
    service = read.services[BENTOFILE["name"]]
    assert service.scaling.min_replicas == service.scaling.max_replicas >= 1
    assert DeploymentStrategy(service.deployment_strategy) is DeploymentStrategy.Recreate
    assert service.config_overrides["resources"] == TrlTrainingService.config["resources"]


def test_the_bentofile_lists_no_secret_and_nothing_without_a_value():
    assert all(variable["value"] for variable in BENTOFILE["envs"])
    assert not {"TRL_API_KEYS", "TRL_DATABASE_URL", "HF_TOKEN"} & set(IMAGE_ENVIRONMENT)


def test_the_manifests_image_is_this_version():
    assert pod()["containers"][0]["image"].rpartition(":")[2] == __version__


def test_commands_of_the_documentation_are_bentos():
    """Options that `bentoml` does not have would be found only by the one who follows the page."""
    text = (REPOSITORY / "docs" / "deployment.md").read_text() + (DEPLOY / "bento.md").read_text()
    lines = [line for line in text.replace("\\\n", "").splitlines() if re.match(r"(\S*/)?bentoml ", line)]
    assert len(lines) >= 3
    from bentoml_cli.cli import cli

    for line in lines:
        _, name, *rest = shlex.split(line, comments=True)
        command = cli.get_command(None, name)
        assert command is not None, line
        known = {option for parameter in command.params for option in parameter.opts}
        if hasattr(command, "commands"):
            continue
        assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= known, line
