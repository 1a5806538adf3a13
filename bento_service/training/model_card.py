"""The README.md of a checkpoint: a model card in the Hugging Face form, with a YAML header.

https://huggingface.co/docs/hub/model-cards
"""

import json
from typing import Any

from bento_service.training.manifest import Evaluation, RunManifest

METHOD_NAMES = {
    "dpo": "direct preference optimization (DPO)",
    "supervised": "supervised fine-tuning",
    "kto": "Kahneman-Tversky optimization (KTO)",
    "reward": "reward modeling",
}

# What a base model under an adapter was kept in, and what loads it so again.
_QUANTIZED = {"nf4": " quantized to 4 bits (NF4)", "int8": " quantized to 8 bits (LLM.int8())"}
_CONFIGS = {
    "nf4": 'transformers.BitsAndBytesConfig(\n    load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_use_double_quant=True\n)",
    "int8": "transformers.BitsAndBytesConfig(load_in_8bit=True)",
}

# Columns of the evaluation table: TRL's name, heading, digits.
_COLUMNS = (
    ("eval_loss", "loss", 4),
    ("eval_accuracy", "accuracy", 3),
    ("eval_margin", "margin", 4),
    ("eval_mean_reward", "mean reward", 4),
    ("eval_rewards/accuracies", "reward accuracy", 3),
    ("eval_rewards/margins", "reward margin", 4),
    ("eval_rewards/chosen", "reward of chosen", 4),
    ("eval_rewards/rejected", "reward of rejected", 4),
    ("eval_mean_token_accuracy", "token accuracy", 3),
)


def write(manifest: RunManifest) -> str:
    """The card's text. Everything in it comes from the manifest."""
    from huggingface_hub import ModelCardData

    options = manifest.settings["options"]
    adapter = options["tuning"] == "lora"
    quantization = options["lora"].get("quantization") if adapter else None
    scores = manifest.method == "reward"
    relation = "adapter" if adapter else "finetune"
    header = ModelCardData(
        base_model=manifest.base_model,
        base_model_relation=relation,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if scores else "text-generation",
        tags=["trl", manifest.method, *(["lora"] if adapter else []), *filter(None, [quantization]), "trl-remote"],
    )
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {manifest.base_model} after {METHOD_NAMES.get(manifest.method, manifest.method)}",
        f"{'A LoRA adapter of' if adapter else 'All weights of'} `{manifest.base_model}`"
        f"{_QUANTIZED[quantization] if quantization else ''}, trained with "
        f"[TRL](https://github.com/huggingface/trl) for {manifest.metrics.step} optimizer steps "
        f"({manifest.metrics.tokens} tokens).",
        _use(manifest.base_model, adapter, quantization, scores),
        "## Data",
        "\n".join(f"- {data.role}: {data.bytes} bytes, SHA-256 `{data.sha256}`" for data in manifest.datasets),
        "## Evaluation",
        _evaluation(manifest.metrics.evaluations),
        "## Settings",
        f"```json\n{json.dumps(_settings(manifest), indent=2)}\n```",
        "## Versions",
        "\n".join(f"- {name} {number}" for name, number in manifest.versions.items()),
    ]
    return "\n\n".join(sections) + "\n"


def _settings(manifest: RunManifest) -> dict[str, Any]:
    """Without the ids of the job: the card is read where neither is known, and a client id is its caller's own."""
    settings = {name: value for name, value in manifest.settings.items() if name != "job_id"}
    settings["options"] = {name: value for name, value in settings["options"].items() if name != "client_id"}
    return settings


def _use(base_model: str, adapter: bool, quantization: str | None, scores: bool) -> str:
    lines = ["import transformers"]
    model_class = "transformers.AutoModelForSequenceClassification" if scores else "transformers.AutoModelForCausalLM"
    further = ", num_labels=1" if scores else ""
    further += "" if quantization is None else ", quantization_config=quantization"
    if adapter:
        lines += [
            "from peft import PeftModel",
            "",
            *([] if quantization is None else [f"quantization = {_CONFIGS[quantization]}"]),
            f'base = {model_class}.from_pretrained("{base_model}"{further})',
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        ]
    else:
        lines += ["", f'model = {model_class}.from_pretrained("path/to/this/folder")']
    lines.append('tokenizer = transformers.AutoTokenizer.from_pretrained("path/to/this/folder")')
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _evaluation(evaluations: list[Evaluation]) -> str:
    """A Markdown table: a line an evaluation, the columns that were measured."""
    columns = [
        column
        for column in _COLUMNS
        if any(evaluation.metrics.get(column[0]) is not None for evaluation in evaluations)
    ]
    if not columns:
        return "There was none: the run had no rows to evaluate on."
    lines = [
        "| step | " + " | ".join(heading for _, heading, _ in columns) + " |",
        "|---:|" + "---:|" * len(columns),
    ]
    for evaluation in evaluations:
        cells = [_cell(evaluation.metrics.get(name), digits) for name, _, digits in columns]
        lines.append(f"| {evaluation.step} | " + " | ".join(cells) + " |")
    return "On rows that were not trained on; step 0 is the base model.\n\n" + "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
