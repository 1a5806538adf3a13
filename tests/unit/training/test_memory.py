"""Memory by arithmetic: what each setting adds or saves. ``benchmarks/memory.py`` compares with real runs."""

from dataclasses import replace

import pytest

from bento_service.training.memory import OVERHEAD, estimate, packed_batch, padded_batch
from bento_service.training.model_shape import Architecture, ModelShape
from bento_service.training.row_budget import FEWEST_TOKENS, FILL, MOST_TOKENS, row_tokens
from tests.job_factory import make_job

ARCHITECTURE = Architecture(
    layers=2, hidden=64, intermediate=256, attention_width=64, key_value_width=32, vocabulary=1000
)
# An embedding and one linear layer.
SHAPE = ModelShape(tensors={"embed.weight": (1000, 64), "layers.0.q_proj.weight": (64, 64)}, architecture=ARCHITECTURE)
PARAMETERS = 64_000 + 4096


def memory(batch=None, precision="fp32", device="cuda", shape=SHAPE, **options):
    return estimate(make_job(options=options).spec, shape, precision, device, batch)


def test_full_fine_tuning_keeps_weights_reference_gradients_and_two_moments():
    found = memory(tuning="full", dpo={"precompute_ref_log_probs": False})
    assert (found.weights, found.reference, found.gradients) == (4 * PARAMETERS,) * 3
    assert found.optimizer == 8 * PARAMETERS
    assert found.certain == 20 * PARAMETERS
    assert found.total == found.certain + OVERHEAD["cuda"]


def test_what_saves_memory_is_not_counted():
    assert memory(tuning="full", optimizer={"name": "sgd"}).optimizer == 0
    assert memory(tuning="full").reference == 0  # scored before training
    lora = memory(lora={"rank": 4})
    assert lora.reference == 0
    assert (lora.gradients, lora.weights) == (4 * 4 * 128, 4 * (PARAMETERS + 4 * 128))


@pytest.mark.parametrize(("name", "a_parameter"), [("nf4", 0.5 + 1 / 64 + 1 / 4096), ("int8", 1)])
def test_quantized_layers_take_less_and_their_adapter_half(name, a_parameter):
    """The embedding stays; a layer is widened while it is multiplied with, and autocast copies none of it."""
    adapter = 4 * 128
    for precision, size in (("fp32", 4), ("bf16", 2)):
        found = memory(precision=precision, lora={"rank": 4, "quantization": name})
        assert found.weights == 4 * 64_000 + round(a_parameter * 4096) + 2 * adapter + size * 4096
        assert (found.gradients, found.optimizer) == (2 * adapter, 4 * adapter)


def test_autocast_keeps_copies_of_the_layers_weights():
    assert memory(precision="bf16").weights - memory().weights == 2 * 4096


@pytest.mark.parametrize(
    ("tuning", "precision", "a_token"),
    [
        # The terms that PyTorch's saved-tensor hooks showed in transformers' Llama.
        ("full", "fp32", 24 * 64 + 16 * 256 + 8 * 64 + 8 * 32),
        ("lora", "fp32", 16 * 64 + 16 * 256 + 8 * 64 + 8 * 32 + 7 * 16 * 4),
        ("full", "bf16", 26 * 64 + 8 * 256 + 4 * 64 + 4 * 32),
        ("lora", "bf16", 18 * 64 + 8 * 256 + 6 * 64 + 4 * 32 + 7 * 16 * 2),
    ],
)
def test_a_token_costs_a_layer_what_autograd_keeps(tuning, precision, a_token):
    """The slope over layers, so that what is outside of them and the logits do not count."""
    batch = packed_batch([(1000, 500)], 2048)
    deeper = ModelShape(
        tensors=SHAPE.tensors,
        architecture=Architecture(**{**vars(ARCHITECTURE), "layers": 12}),
    )
    more = memory(batch, precision, tuning=tuning, shape=deeper).activations
    less = memory(batch, precision, tuning=tuning).activations
    assert (more - less) / 1.1 / 10 / 1000 == pytest.approx(a_token, rel=1e-3)


def test_the_coefficients_are_those_of_autograd_today():
    """A new release of transformers that keeps more in a layer is noticed here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    rows, width = 4, 64

    def kept(layers):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=100,
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
        known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        tensors = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                tensors[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
            return tensor

        ids = torch.zeros((rows, width), dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return sum(size for size, _ in tensors.values()) / (rows * width)

    assert (kept(4) - kept(2)) / 2 == pytest.approx(24 * 64 + 16 * 256 + 8 * 64 + 8 * 32, rel=0.02)


def test_batches_are_padded_to_the_longest_or_packed_with_the_prompt_once():
    padded = padded_batch(100, sequences=2, size=4)
    assert (padded.tokens, padded.scored, padded.mask) == (800, 800, 80_000)
    packed = packed_batch([(90, 40), (50, 20)], 2048)
    assert (packed.tokens, packed.scored, packed.mask) == (140, 60, 0)
    assert memory(packed).activations < memory(padded).activations


def test_a_reward_model_has_no_vocabulary_to_score():
    batch = padded_batch(100, sequences=2, size=4, generates=False)
    assert (batch.tokens, batch.scored) == (800, 0)
    assert memory(batch).activations < memory(padded_batch(100, sequences=2, size=4)).activations
    head = ModelShape(tensors=SHAPE.tensors | {"lm_head.weight": (1000, 64)}, architecture=ARCHITECTURE)
    spec = make_job(options={"tuning": "full"}).spec.model_copy(update={"method": "reward"})
    assert estimate(spec, head, "fp32", "cpu", batch).certain == 16 * PARAMETERS


def test_checkpointing_keeps_one_layer():
    deep = ModelShape(tensors=SHAPE.tensors, architecture=Architecture(**{**vars(ARCHITECTURE), "layers": 40}))
    batch = padded_batch(100, sequences=2, size=8)
    whole = memory(batch, shape=deep).activations
    assert memory(batch, shape=deep, gradient_checkpointing=True).activations < whole / 8


def test_gradients_and_activations_add_up_only_when_gradients_are_accumulated():
    batch = padded_batch(100, sequences=2, size=4)
    once = memory(batch, tuning="full")
    assert once.activations > once.gradients
    assert once.total == once.certain - once.gradients + once.activations + once.overhead
    accumulated = memory(batch, tuning="full", gradient_accumulation_steps=2)
    assert accumulated.total == accumulated.certain + accumulated.activations + accumulated.overhead


def test_an_unknown_architecture_has_no_activations():
    found = memory(padded_batch(100, sequences=2, size=4), shape=ModelShape(tensors=SHAPE.tensors, architecture=None))
    assert found.activations is None
    assert found.total > found.certain


def test_a_row_of_packed_pairs_bounds_what_is_computed_at_a_time():
    row = packed_batch([(900, 400), (600, 200), (500, 100)], 1024)
    assert (row.tokens, row.scored, row.partial) == (1024, 700, True)
    assert packed_batch([(3000, 400), (500, 100)], 1024).tokens == 3000  # one pair is never cut in two


def test_rows_take_as_many_tokens_as_memory_allows():
    spec = make_job(options={}).spec
    most = row_tokens(spec, SHAPE, "cpu", "fp32", free=None)
    assert row_tokens(spec, SHAPE, "cpu", "fp32", free=1 << 50) == most == MOST_TOKENS["cpu"]
    deep = ModelShape(tensors=SHAPE.tensors, architecture=Architecture(**{**vars(ARCHITECTURE), "layers": 4000}))
    batch = packed_batch([(most // 2, most // 2), (most, most)], most // 2)
    half = memory(replace(batch, tokens=most // 2, scored=most // 2, partial=True), device="cpu", shape=deep).total
    assert row_tokens(spec, deep, "cpu", "fp32", free=int(half / FILL) + 9) == most // 2
    assert row_tokens(spec, deep, "cpu", "fp32", free=1) == FEWEST_TOKENS
    own = make_job(options={"dpo": {"max_row_tokens": 77}}).spec
    assert row_tokens(own, deep, "cpu", "fp32", free=1) == 77


def shared(distribution, **options):
    spec = make_job(options={"devices": 4, "tuning": "full", **options}).spec
    return estimate(spec.model_copy(update={"distribution": distribution}), SHAPE, "fp32", "cuda", None)


def test_each_device_has_the_whole_model_or_a_part_of_it():
    whole, part, alone = shared("ddp"), shared("fsdp"), memory(tuning="full")
    assert (whole.weights, whole.optimizer) == (alone.weights, alone.optimizer)
    assert whole.gradients == 2 * alone.gradients  # the buckets in which they are sent
    assert (part.gradients, part.optimizer) == (alone.gradients // 4, alone.optimizer // 4)
    assert part.weights == alone.weights // 4 + 4 * 64_000  # the embedding is gathered whole
    assert (part.reference, whole.reference) == (alone.weights // 4, 0)  # not scored before training
