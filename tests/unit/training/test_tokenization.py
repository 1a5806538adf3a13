"""A preview counts the tokens, the rows left out and the steps that TRL's trainers then really have."""

import itertools

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from bento_service.training import preview
from bento_service.training.assistant_turns import tokenize_chat
from bento_service.training.data import hold_out
from bento_service.training.preferences import load_rows
from bento_service.training.preview import Order
from bento_service.training.row_bounds import Bounds
from bento_service.training.schedule import Schedule
from bento_service.training.spec import TrainingSpec, TrlOptions
from bento_service.training.tokenization import BATCH_ROWS, row_tokens
from tests.tiny_model import make_tiny_model
from tests.trainer_run import write_rows

QUESTIONS = [f"What is the number {'and the next one ' * (i % 7)}{i}?" for i in range(11)]
TURNS = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in QUESTIONS]


def reply(text):
    return [{"role": "assistant", "content": text}]


ROWS = {
    "text": [
        # A reply that has the end token already, and one that merges with the end of the prompt.
        {"prompt": q, "chosen": f"It is {i}. " * i + "<|im_end|>", "rejected": "s it depends" * (i % 3 + 1)}
        for i, q in enumerate(QUESTIONS)
    ],
    "messages": [
        {"prompt": t, "chosen": reply(f"It is {i}."), "rejected": reply("Why?" * (i % 4 + 1))}
        for i, t in enumerate(TURNS)
    ],
    "text-implicit": [{"chosen": f"{q} It is {i}.", "rejected": f"{q} Why?"} for i, q in enumerate(QUESTIONS)],
    "messages-implicit": [
        {"chosen": [*t, *reply(f"It is {i}.")], "rejected": [*t, *reply("Why?")]} for i, t in enumerate(TURNS)
    ],
    "transcripts": [
        {"chosen": f"\n\nHuman: {q}\n\nAssistant: It is {i}.", "rejected": f"\n\nHuman: {q}\n\nAssistant: Why?"}
        for i, q in enumerate(QUESTIONS)
    ],
    "completion": [{"prompt": q, "completion": f" It is {i}."} for i, q in enumerate(QUESTIONS)],
    "messages-completion": [{"prompt": t, "completion": reply(f"It is {i}.")} for i, t in enumerate(TURNS)],
    "chat": [{"messages": [*t, *reply(f"It is {i}."), *t[1:], *reply("As I said.")]} for i, t in enumerate(TURNS)],
}
PAIRS = ("text", "messages", "text-implicit", "messages-implicit", "transcripts")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


def trained_dataset(rows, model, tokenizer, folder, max_length, method):
    """What TRL's own trainer makes of the rows, in the recipe's way."""
    shared = {"output_dir": str(folder), "max_length": max_length, "use_cpu": True, "bf16": False, "report_to": "none"}
    loaded = AutoModelForCausalLM.from_pretrained(model)
    if method == "dpo":
        args = DPOConfig(**shared)
        return DPOTrainer(loaded, args=args, train_dataset=rows, processing_class=tokenizer).train_dataset
    if "messages" in rows.column_names:
        rows = tokenize_chat(rows, tokenizer)
    args = SFTConfig(**shared, completion_only_loss=True)
    return SFTTrainer(loaded, args=args, train_dataset=rows, processing_class=tokenizer).train_dataset


def dataset_of(file):
    return Dataset.from_list(list(load_rows(file)))


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_have_the_tokens_of_dpo_trainer(name, model, tokenizer, tmp_path):
    rows = dataset_of(write_rows(tmp_path / "rows.jsonl", ROWS[name]))
    trained = trained_dataset(rows, model, tokenizer, tmp_path, 1000, "dpo")
    expected = [
        (len(row["prompt_ids"]), (len(row["chosen_ids"]), len(row["rejected_ids"]))) for row in trained.to_list()
    ]
    assert [(row.prompt, row.replies) for row in row_tokens(rows.to_list(), tokenizer)] == expected


@pytest.mark.parametrize("name", ["completion", "messages-completion", "chat"])
def test_supervised_rows_have_the_tokens_of_sft_trainer(name, model, tokenizer, tmp_path):
    rows = dataset_of(write_rows(tmp_path / "rows.jsonl", ROWS[name]))
    trained = trained_dataset(rows, model, tokenizer, tmp_path, 1000, "supervised")
    expected = [
        (next(i for i, label in enumerate(row["labels"]) if label != -100), len(row["input_ids"]))
        for row in trained.to_list()
    ]
    counted = row_tokens(rows.to_list(), tokenizer)
    assert [(row.prompt, row.prompt + row.replies[0]) for row in counted] == expected
    everything = row_tokens(rows.to_list(), tokenizer, replies_only=False)
    assert [(row.prompt, row.replies[0]) for row in everything] == [(0, length) for _, length in expected]


def make_order(file, model, *, method="dpo", seconds=600.0, batch_size=2, n_epochs=3, **options):
    spec = TrainingSpec(
        job_id="ftjob-preview",
        method=method,
        model="org/tiny",
        model_path=str(model),
        training_file=str(file),
        validation_file=None,
        seed=7,
        beta=0.1,
        batch_size=batch_size,
        n_epochs=n_epochs,
        learning_rate=1e-3,
        device="cpu",
        options=TrlOptions.model_validate(options),
    )
    return Order(spec=spec, bounds=Bounds(), cap=10, seconds=seconds)


@pytest.mark.parametrize(("name", "method"), [("text", "dpo"), ("messages", "dpo"), ("chat", "supervised")])
def test_rows_left_out_and_cut_steps_and_tokens_are_those_of_the_run(name, method, model, tokenizer, tmp_path):
    """With a length that some prompts pass, and a held-out part of which some rows are left out too."""
    file = write_rows(tmp_path / "rows.jsonl", ROWS[name])
    prompts = sorted(row.prompt for row in row_tokens(list(load_rows(file)), tokenizer))
    max_length = prompts[-3]
    order = make_order(file, model, method=method, max_length=max_length, evaluation={"split": 0.4})
    found = preview.preview(order)
    assert (found.refusals, found.training["valid"]) == ([], True)

    rows, held_out = hold_out(dataset_of(file), 0.4, 7)
    trained = trained_dataset(rows, model, tokenizer, tmp_path, max_length, method)
    evaluated = trained_dataset(held_out, model, tokenizer, tmp_path, max_length, method)
    assert len(trained) + len(evaluated) < len(QUESTIONS)
    assert (found.tokens.left_out, found.tokens.trained) == (len(rows) - len(trained), len(trained))
    assert (found.validation_tokens.left_out, found.run.evaluation_rows) == (
        len(held_out) - len(evaluated),
        len(evaluated),
    )
    schedule = Schedule.of(order.spec, rows=len(trained), evaluated=True)
    assert (found.run.steps, found.run.steps_per_epoch) == (schedule.total_steps, schedule.steps_per_epoch)
    if method == "dpo":
        lengths = [
            len(row["prompt_ids"]) + len(row[column])
            for row, column in itertools.product(trained.to_list(), ("chosen_ids", "rejected_ids"))
        ]
        cut = sum(
            len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) > max_length
            for row in trained.to_list()
        )
        assert found.tokens.cut == cut > 0
    else:
        lengths = [len(row["input_ids"]) for row in trained.to_list()]
    real = sum(min(length, max_length) for length in lengths)
    assert (found.tokens.tokens, found.run.tokens) == (real, 3 * real)
    assert found.tokens.longest == min(max(lengths), max_length)
    assert not found.run.estimated


def test_a_model_whose_prompts_all_fill_max_length_is_refused(model, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS["text"])
    found = preview.preview(make_order(file, model, max_length=2))
    assert [refusal.param for refusal in found.refusals] == ["trl.max_length"]
    assert found.run is None and found.training["valid"]


def test_bad_rows_are_reported_and_not_tokenized(model, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*ROWS["text"], {"prompt": "p", "chosen": "c"}])
    found = preview.preview(make_order(file, model))
    assert [refusal.code for refusal in found.refusals] == ["invalid_dataset"]
    assert found.training["problems"][0]["row"] == len(QUESTIONS) + 1
    assert found.tokens is None


def test_a_template_that_refuses_the_roles_is_a_refusal(model, tokenizer, tmp_path, monkeypatch):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
    without = ROWS["messages"][0] | {"prompt": [{"role": "user", "content": "Hello"}]}
    strict = AutoTokenizer.from_pretrained(model)
    strict.chat_template = template
    monkeypatch.setattr("bento_service.training.models.load_tokenizer", lambda *args, **more: strict)
    file = write_rows(tmp_path / "rows.jsonl", [without, *ROWS["messages"]])
    found = preview.preview(make_order(file, model))
    (refusal,) = found.refusals
    assert (refusal.code, refusal.param) == ("invalid_dataset", "training_file")
    assert "row 2: " in refusal.message and "no system prompts" in refusal.message


def test_packing_and_sampling_are_said_to_be_estimates(model, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    order = make_order(file, model, method="supervised", max_length=200, n_epochs=1, sft={"packing": True})
    packed = preview.preview(order)
    assert packed.run.estimated
    assert packed.run.steps < len(QUESTIONS) / 2

    many = write_rows(tmp_path / "many.jsonl", ROWS["text"] * 200)
    sampled = preview.preview(make_order(many, model, seconds=1e-4))
    assert sampled.run.estimated
    assert sampled.tokens.rows == 2200
    assert BATCH_ROWS <= sampled.tokens.tokenized_rows < 2200
    whole = preview.preview(make_order(many, model)).tokens
    assert whole.tokenized_rows == 2200
    assert sampled.tokens.tokens == pytest.approx(whole.tokens, rel=0.05)
    assert sampled.run.steps == 3300


def test_of_a_file_that_takes_too_long_every_part_is_sampled(monkeypatch):
    """A clock that a batch moves by ten seconds: with 100 s for 2,000 rows, some ten batches are read to the end."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr("bento_service.training.preview.time.monotonic", lambda: next(clock))
    taken = [(first, len(batch), weight) for first, batch, weight in preview.paced(iter([{}] * 2000), 2000, 100.0)]
    assert 8 <= len(taken) <= 13
    assert sum(rows * weight for _, rows, weight in taken) == pytest.approx(2000)
    gaps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(taken)]
    assert max(gaps) <= 300
    assert taken[-1][0] + taken[-1][1] == 2000


def test_a_model_without_a_tokenizer_is_a_refusal(model, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS["messages"])
    (tmp_path / "empty").mkdir()
    found = preview.preview(make_order(file, tmp_path / "empty"))
    assert [refusal.code for refusal in found.refusals] == ["model_not_found"]
