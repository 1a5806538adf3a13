"""Methods on the wire: each has its place in a request, and hyperparameters come from one place."""

from typing import get_args

import pytest

from bento_service.api.wire import CreateJob, Method
from bento_service.errors import InvalidRequest
from bento_service.training.recipes import RECIPES
from bento_service.training.spec import MethodName
from tests.core_factory import MODEL, upload

BODY = {"model": MODEL, "training_file": "file-1"}


def asked(**body):
    return CreateJob.model_validate(BODY | body).to_request()


def test_every_method_has_its_place_in_a_request():
    assert set(Method.model_fields) - {"type"} == set(get_args(MethodName)) >= set(RECIPES)
    for name in get_args(MethodName):
        given = {"batch_size": 3, "n_epochs": "auto", "learning_rate_multiplier": 0.5}
        request = asked(method={"type": name, name: {"hyperparameters": given}})
        values = (request.method, request.batch_size, request.n_epochs, request.learning_rate_multiplier)
        assert values == (name, 3, None, 0.5)
        assert asked(method={"type": name}).batch_size is None


def test_older_clients_give_hyperparameters_of_supervised_jobs_beside_the_method():
    request = asked(hyperparameters={"n_epochs": 4, "batch_size": "auto"})
    assert (request.method, request.n_epochs, request.batch_size) == ("supervised", 4, None)
    assert asked().method == "dpo"
    with pytest.raises(InvalidRequest, match=r"method\.supervised\.hyperparameters") as refused:
        asked(hyperparameters={"n_epochs": 4}, method={"type": "supervised"})
    assert refused.value.param == "hyperparameters"


def test_an_answered_method_can_be_sent_again():
    values = {"beta": 0.25, "batch_size": 2, "learning_rate_multiplier": None, "n_epochs": 1}
    answered = Method.of("dpo", values).model_dump(mode="json")
    hyperparameters = values | {"learning_rate_multiplier": "auto"}
    assert answered == {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
    again = asked(method=answered)
    assert (again.beta, again.batch_size, again.learning_rate_multiplier, again.n_epochs) == (0.25, 2, None, 1)
    assert "beta" not in Method.of("supervised", values).model_dump()["supervised"]["hyperparameters"]


def test_a_method_without_a_recipe_is_refused_by_name(client, impl, monkeypatch):
    monkeypatch.delitem(RECIPES, "supervised", raising=False)
    body = {"model": MODEL, "training_file": upload(impl).id, "method": {"type": "supervised"}}
    answer = client.post("/v1/fine_tuning/jobs", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "method.type")
    assert "supervised is not available" in answer.json()["error"]["message"]
    assert impl.list_jobs().data == []
