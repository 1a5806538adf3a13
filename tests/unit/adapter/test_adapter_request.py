"""What a Llama Stack request becomes at the service, and what is refused."""

import math
from typing import Any

import pytest
from llama_stack_provider_trl_remote.config import TrlRemoteConfig
from llama_stack_provider_trl_remote.errors import NotSupported, RequestRefused
from llama_stack_provider_trl_remote.request import plan_dpo, plan_sft
from pydantic import ValidationError

from bento_service.training.spec import TrlOptions
from tests.unit.adapter.stack_fakes import dpo_request, sft_request

LORA = {
    "type": "LoRA",
    "lora_attn_modules": ["q_proj", "output_proj"],
    "apply_lora_to_mlp": False,
    "apply_lora_to_output": True,
    "rank": 4,
    "alpha": 8,
}
REWARD = {"reward_scale": 0.3, "reward_clip": 0, "epsilon": 0, "gamma": 0}
OPTIMIZER = {"optimizer_type": "adamw", "lr": 1e-5, "weight_decay": 0.1, "num_warmup_steps": 7}
EVERYTHING = {
    "n_epochs": 3,
    "max_steps_per_epoch": 9,
    "gradient_accumulation_steps": 2,
    "max_validation_steps": 5,
    "dtype": "fp32",
    "optimizer_config": OPTIMIZER,
    "efficiency_config": {"enable_activation_checkpointing": True, "enable_activation_offloading": True},
}


def trl(config: dict[str, Any] | None = None, **request: Any) -> dict[str, Any]:
    options: dict[str, Any] = plan_dpo(dpo_request(**request), TrlRemoteConfig(**(config or {}))).body["trl"]
    TrlOptions.model_validate(options)  # the service takes no unknown key
    return options


def test_what_is_not_sent_is_left_to_the_service() -> None:
    plan = plan_dpo(dpo_request(), TrlRemoteConfig())
    assert plan.body == {
        "model": "org/model",
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "beta": 0.1}}},
        "trl": {"shuffle": True, "client_id": "job-1"},
    }
    assert (plan.dataset_id, plan.validation_dataset_id) == ("pairs", None)


def test_every_field_has_its_place() -> None:
    request = dpo_request(
        training=EVERYTHING,
        data={"shuffle": False, "validation_dataset_id": "held-out"},
        algorithm={"beta": 0.3, "loss_type": "ipo"},
        logger={"logging_steps": 10},
    )
    # data_config of EVERYTHING's TrainingConfig is dpo_request's.
    plan = plan_dpo(request, TrlRemoteConfig())
    assert plan.validation_dataset_id == "held-out"
    assert plan.body["method"]["dpo"]["hyperparameters"] == {"n_epochs": 3, "batch_size": 4, "beta": 0.3}
    assert plan.body["trl"] == {
        "client_id": "job-1",
        "shuffle": False,
        "gradient_accumulation_steps": 2,
        "max_steps_per_epoch": 9,
        "evaluation": {"max_steps": 5},
        "precision": "fp32",
        "optimizer": {"name": "adamw", "learning_rate": 1e-5, "weight_decay": 0.1},
        "scheduler": {"warmup_steps": 7},
        "gradient_checkpointing": True,
        "activation_offloading": True,
        "dpo": {"loss_type": ["ipo"]},
        "logging": {"steps": 10},
    }
    TrlOptions.model_validate(plan.body["trl"])


@pytest.mark.parametrize(
    ("sent", "cap"), [({}, "absent"), ({"max_steps_per_epoch": 1}, 1), ({"max_steps_per_epoch": -1}, None)]
)
def test_max_steps_per_epoch_counts_only_when_sent(sent: dict[str, Any], cap: object) -> None:
    assert trl(training=sent).get("max_steps_per_epoch", "absent") == cap


@pytest.mark.parametrize("none", [None, -1])
def test_no_limit_on_validation_steps(none: int | None) -> None:
    assert trl(training={"max_validation_steps": none})["evaluation"] == {"max_steps": None}


def test_extras_are_merged_over_the_request_and_the_request_over_the_provider_s_defaults() -> None:
    config = {
        "training_config": {
            "dpo_loss_type": "hinge",
            "tuning": "full",
            "lora": {"rank": 4},
            "precision": "bf16",
            "options": {"optimizer": {"weight_decay": 0.5, "max_grad_norm": 2.0}, "tuning": "lora"},
        }
    }
    extras = {
        "optimizer": {"weight_decay": 0.2},
        "dpo": {"label_smoothing": 0.1},
        "lora": {"rank": 8},
        "seed": 3,
        "suffix": "mine",
    }
    request = dpo_request(training={"optimizer_config": OPTIMIZER, "dtype": "fp16"}, extras=extras)
    plan = plan_dpo(request, TrlRemoteConfig(**config))
    options = plan.body["trl"]
    assert options["optimizer"] == {"name": "adamw", "learning_rate": 1e-5, "weight_decay": 0.2, "max_grad_norm": 2.0}
    assert options["dpo"] == {"loss_type": ["hinge"], "label_smoothing": 0.1}
    assert options["tuning"] == "full"
    assert options["lora"] == {"rank": 8}
    assert options["precision"] == "fp16"
    assert (plan.body["seed"], plan.body["suffix"]) == (3, "mine")
    TrlOptions.model_validate(options)
    sent_loss = dpo_request(algorithm={"beta": 0.1, "loss_type": "sigmoid"})
    assert plan_dpo(sent_loss, TrlRemoteConfig(**config)).body["trl"]["dpo"] == {"loss_type": ["sigmoid"]}


def test_the_learning_rate_multiplier() -> None:
    body = plan_dpo(dpo_request(extras={"learning_rate_multiplier": 2}), TrlRemoteConfig()).body
    assert body["method"]["dpo"]["hyperparameters"]["learning_rate_multiplier"] == 2
    with pytest.raises(RequestRefused, match="learning_rate_multiplier"):
        plan_dpo(
            dpo_request(training={"optimizer_config": OPTIMIZER}, extras={"learning_rate_multiplier": 2}),
            TrlRemoteConfig(),
        )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training": {"n_epochs": 0}}, "n_epochs"),
        ({"training": {"max_steps_per_epoch": 0}}, "max_steps_per_epoch"),
        ({"training": {"max_validation_steps": -2}}, "max_validation_steps"),
        ({"training": {"gradient_accumulation_steps": 0}}, "gradient_accumulation_steps"),
        ({"training": {"dtype": "int4"}}, "bf16, fp16, fp32"),
        ({"training": {"data_config": None}}, "data_config"),
        ({"training": {"optimizer_config": {**OPTIMIZER, "lr": math.nan}}}, "optimizer_config.lr"),
        ({"training": {"optimizer_config": {**OPTIMIZER, "weight_decay": math.inf}}}, "weight_decay"),
        ({"training": {"efficiency_config": {"memory_efficient_fsdp_wrap": True}}}, "memory_efficient_fsdp_wrap"),
        ({"training": {"efficiency_config": {"fsdp_cpu_offload": True}}}, "fsdp_cpu_offload"),
        ({"data": {"batch_size": 0}}, "batch_size"),
        ({"data": {"packed": True}}, "packed"),
        ({"data": {"train_on_input": True}}, "train_on_input"),
        ({"algorithm": {"beta": 0}}, "algorithm_config.beta"),
        ({"algorithm": REWARD | {"reward_scale": 0}}, "reward_scale"),
        ({"algorithm": REWARD | {"reward_clip": 1}}, "reward_clip"),
        ({"algorithm": REWARD | {"epsilon": 0.5}}, "epsilon"),
        ({"algorithm": REWARD | {"gamma": 0.9}}, "gamma"),
        ({"algorithm": LORA | {"rank": 0}}, "rank"),
        ({"algorithm": LORA | {"lora_attn_modules": [], "apply_lora_to_output": False}}, "nothing to adapt"),
        ({"algorithm": {"loss_type": "kto_pair"}}, "sigmoid, hinge, ipo"),
        ({"extras": {"client_id": "x"}}, "job_uuid"),
        ({"logger": {"wandb_project": "p"}}, "wandb_project"),
        ({"job_uuid": ""}, "job_uuid"),
        ({"job_uuid": "x" * 257}, "job_uuid"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestRefused, match=named):
        plan_dpo(dpo_request(**changes), TrlRemoteConfig())


def test_dpo_through_a_lora_adapter() -> None:
    """Early clients could send nothing but a LoRA config: DPO with the provider's defaults, through that adapter."""
    config = TrlRemoteConfig(training_config={"dpo_beta": 0.7, "dpo_loss_type": "ipo", "tuning": "full"})
    body = plan_dpo(dpo_request(algorithm=LORA | {"use_dora": True, "quantize_base": True}), config).body
    assert body["method"]["dpo"]["hyperparameters"]["beta"] == 0.7
    assert body["trl"]["tuning"] == "lora"
    assert body["trl"]["dpo"] == {"loss_type": ["ipo"]}
    assert body["trl"]["lora"] == {
        "rank": 4,
        "alpha": 8,
        "target_modules": ["q_proj", "o_proj", "lm_head"],
        "use_dora": True,
        "quantization": "nf4",
    }
    TrlOptions.model_validate(body["trl"])


def test_the_dpo_config_of_the_first_releases() -> None:
    body = plan_dpo(dpo_request(algorithm=REWARD | {"epsilon": 0.1}), TrlRemoteConfig()).body
    assert body["method"]["dpo"]["hyperparameters"]["beta"] == 0.3
    assert body["trl"]["dpo"] == {"label_smoothing": 0.1}


def test_a_config_without_beta_means_the_provider_s() -> None:
    config = TrlRemoteConfig(training_config={"dpo_beta": 0.7})
    assert plan_dpo(dpo_request(algorithm={}), config).body["method"]["dpo"]["hyperparameters"]["beta"] == 0.7


def test_supervised_fine_tuning() -> None:
    config = TrlRemoteConfig(training_config={"dpo_loss_type": "ipo", "options": {"dpo": {"label_smoothing": 0.1}}})
    request = sft_request(data={"packed": True, "train_on_input": False}, algorithm_config=LORA)
    body = plan_sft(request, config).body
    assert body["method"] == {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}},
    }
    assert body["trl"]["sft"] == {"packing": True, "completion_only_loss": True}
    assert body["trl"]["lora"]["rank"] == 4
    assert "dpo" not in body["trl"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": None}, "model"),
        ({"checkpoint_dir": "/tmp"}, "checkpoint_dir"),
        ({"training": {"n_epochs": 0}}, "n_epochs"),
    ],
)
def test_supervised_fine_tuning_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestRefused, match=named):
        plan_sft(sft_request(**changes), TrlRemoteConfig())


def test_quantization_aware_training_is_not_there() -> None:
    qat = {"type": "QAT", "quantizer_name": "int8", "group_size": 32}
    with pytest.raises(NotSupported, match="QAT"):
        plan_sft(sft_request(algorithm_config=qat), TrlRemoteConfig())
    with pytest.raises(NotSupported, match="QAT"):
        plan_dpo(dpo_request(algorithm=qat), TrlRemoteConfig())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"algorithm": {"bta": 0.1}}, "bta"),
        ({"algorithm": REWARD | {"beta": 0.1}}, "beta"),
        ({"training": {"max_step_per_epoch": 3}}, "max_step_per_epoch"),
        ({"data": {"shufle": True}}, "shufle"),
    ],
)
def test_a_misspelt_key_is_not_ignored(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        dpo_request(**changes)


def test_the_fingerprint_is_of_the_request_and_its_rows() -> None:
    plan = plan_dpo(dpo_request(), TrlRemoteConfig())
    same = plan_dpo(dpo_request(), TrlRemoteConfig())
    assert plan.fingerprint("a", None) == same.fingerprint("a", None)
    others = {plan.fingerprint("b", None), plan.fingerprint("a", "a")}
    others.add(plan_dpo(dpo_request(algorithm={"beta": 0.2}), TrlRemoteConfig()).fingerprint("a", None))
    assert len(others | {plan.fingerprint("a", None)}) == 4


def test_a_dataset_id_too_long_for_metadata_is_left_out_of_it() -> None:
    plan = plan_dpo(dpo_request(data={"dataset_id": "d" * 513}), TrlRemoteConfig())
    assert list(plan.create_body("file-1", None, "f")["metadata"]) == ["llama_stack_request_sha256"]


@pytest.mark.parametrize(
    "config",
    [
        {"base_url": "localhost:8080"},
        {"base_url": "http://user:secret@host"},
        {"api_key": 12345},
        {"bas_url": "http://host"},
        {"training_config": {"dpo_bta": 0.1}},
        {"page_rows": 0},
        {"api_key": "two words"},
        {"tls": {"ca_file": "/no/such/ca.pem"}},
        {"tls": {"client_key_file": "key.pem"}},
    ],
)
def test_a_wrong_configuration_stops_the_start(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TrlRemoteConfig(**config)


def test_the_configuration_hides_the_key_and_normalises_the_address() -> None:
    config = TrlRemoteConfig(base_url="http://gpu:8080/v1/", api_key="very-secret")
    assert config.base_url == "http://gpu:8080"
    assert "very-secret" not in repr(config)
    assert TrlRemoteConfig(api_key="").api_key is None
    # What Llama Stack 0.2.12 makes of ${env.X:=default} when X is not set.
    early = TrlRemoteConfig(base_url="=http://gpu:8080", api_key="=")
    assert (early.base_url, early.api_key) == ("http://gpu:8080", None)
