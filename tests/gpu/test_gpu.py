"""What only a GPU can show: FlexAttention training against the dense mask, and bfloat16 decoding."""

import pytest
import torch

from cllm.decoding.decoder import JacobiDecoder
from cllm.decoding.records import DecodeRequest
from cllm.training.documents import Document, Span
from cllm.training.forward import packed_losses
from cllm.training.packing import assign_rows, pack
from tests.fakes import EOS, PAD, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_flex_attention_trains_like_the_dense_mask():
    documents = [
        Document((5, 6 + i % 7), tuple(2 + (i * j) % 20 for j in range(30)), (Span(3 + i % 5, tuple(range(2, 14))),))
        for i in range(24)
    ]
    rows = [[documents[i] for i in row] for row in assign_rows([d.num_tokens for d in documents], 256)]
    packed = pack(rows, 256, PAD).to(torch.device("cuda"))
    results = {}
    for implementation in ("sdpa", "flex_attention"):
        model = tiny_model(0, hidden=128).to("cuda")
        model.set_attn_implementation(implementation)
        sums = packed_losses(model, packed, "forward_kl")
        (sums.ar + sums.second).backward()
        results[implementation] = (sums, {name: p.grad for name, p in model.named_parameters()})
    (dense, dense_grads), (flex, flex_grads) = results["sdpa"], results["flex_attention"]
    torch.testing.assert_close(flex.ar, dense.ar, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(flex.second, dense.second, rtol=1e-3, atol=1e-2)
    for name, grad in dense_grads.items():
        assert (flex_grads[name] - grad).norm() < 1e-2 * grad.norm() + 1e-3, name


def test_float32_decoding_on_the_gpu_equals_autoregressive():
    model = tiny_model(4).to("cuda")
    requests = [DecodeRequest(tuple(range(2, 2 + k)), 40) for k in range(1, 9)]
    texts = [
        [r.token_ids for r in JacobiDecoder(model, block_size=n, eos_ids=[EOS], pad_id=PAD).generate(requests)]
        for n in (1, 8)
    ]
    assert texts[0] == texts[1]
