"""The CPU's head of the vocabulary gives what TRL's does, values and gradients, in any tiling."""

import pytest
import torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from bento_service.training import reply_head

FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("tokens_a_tile", [1, 5, 1000])
@pytest.mark.parametrize(
    ("trains_hidden", "trains_weight"), [(True, True), (True, False), (False, True), (False, False)]
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_same_as_trl(
    monkeypatch: pytest.MonkeyPatch,
    tokens_a_tile: int,
    trains_hidden: bool,
    trains_weight: bool,
    precision: torch.dtype,
) -> None:
    monkeypatch.setattr(reply_head, "TILE_LOGITS", tokens_a_tile * 97)
    torch.manual_seed(0)
    hidden, weight, upstream = torch.randn(23, 16), torch.randn(97, 16), torch.randn(23)
    targets = torch.randint(0, 97, (23,))
    targets[::3] = (hidden @ weight.T).argmax(dim=-1)[::3]  # some are the most likely word
    results = []
    for function, further in (
        (ChunkedLogProbFunction, (1.0, 32768, None, 1.0, FIELDS)),
        (reply_head._ReplyLogProbs, ()),
    ):
        states = hidden.clone().requires_grad_(trains_hidden)
        words = weight.clone().requires_grad_(trains_weight)
        bias = (None,) if further else ()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            values = function.apply(states, words, *bias, targets, *further)
        if trains_hidden or trains_weight:
            (values[0] * upstream).sum().backward()
        results.append((values, [states.grad, words.grad]))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if precision == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    (stock, stock_gradients), (ours, gradients) = results
    assert stock[4].sum() > 3
    assert torch.equal(stock[4], ours[4]) or precision == torch.bfloat16
    for one, other in zip(stock[:4], ours[:4], strict=True):
        torch.testing.assert_close(other, one, **tolerance)
    for one, other in zip(stock_gradients, gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, **tolerance)


def test_no_tokens() -> None:
    hidden = torch.randn(0, 4, requires_grad=True)
    values = reply_head._ReplyLogProbs.apply(hidden, torch.randn(9, 4), torch.zeros(0, dtype=torch.long))
    values[0].sum().backward()
    assert [len(value) for value in values] == [0] * 5
    assert hidden.grad.shape == (0, 4)
