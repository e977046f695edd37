"""What a public op is given wrongly it answers with a sentence, before anything is launched: no fault, no other's memory read."""

import pytest
import torch

from hyperllama.kernels import grow, merge
from hyperllama.kernels.adamw import adamw
from hyperllama.kernels.attention import attention
from hyperllama.kernels.embedding import embedding, embedding_backward_
from hyperllama.kernels.glu import glu, glu_backward
from hyperllama.kernels.grad_norm import grad_norm
from hyperllama.kernels.linear import linear
from hyperllama.kernels.linear_cross_entropy import linear_cross_entropy
from hyperllama.kernels.rms_norm import rms_norm
from hyperllama.kernels.rope import rope, rope_, rope_tables

X, W, IDS, WIDE = torch.ones(4, 8), torch.ones(8), torch.zeros(4, dtype=torch.int64), torch.ones(6, 8)
COS, SIN = rope_tables(4, 2, 1e4)
QKV = torch.ones(1, 4, 8)  # two query heads, one kv head of two
SCALAR = torch.ones(())
GROUPS = torch.zeros(1, dtype=torch.uint8)


def step(master=W, **changes):
    buffers = {"grad": W, "m": W, "v": W, "weights": None} | changes
    scalars = {"lr": SCALAR, "step": SCALAR.long(), "clip": SCALAR, "eps": 1e-8, "weight_decay": 0.0}
    adamw(master, **buffers, beta1=0.9, beta2=0.9, **scalars)


def elsewhere(tensor):
    return tensor.to("meta")


WRONG = {
    "rms_norm of integers": lambda: rms_norm(X.long(), W.long(), 1e-5),
    "rms_norm, shape": lambda: rms_norm(X, torch.ones(7), 1e-5),
    "rms_norm, dtype": lambda: rms_norm(X, W.bfloat16(), 1e-5),
    "rms_norm, device": lambda: rms_norm(X, elsewhere(W), 1e-5),
    "rms_norm, residual": lambda: rms_norm(X, W, 1e-5, X[:3]),
    "rms_norm, main_grad": lambda: rms_norm(X, W, 1e-5, main_grad=torch.ones(9)),
    "rope of integers": lambda: rope(QKV.long(), COS, SIN, None, 2, 1),
    "rope, shape": lambda: rope(QKV[..., :6], COS, SIN, None, 2, 1),
    "rope, tables": lambda: rope(QKV, COS[0], SIN[0], None, 2, 1),
    "rope, positions": lambda: rope(QKV, COS, SIN, IDS, 2, 1),
    "rope, device": lambda: rope(QKV, elsewhere(COS), elsewhere(SIN), None, 2, 1),
    "rope_, stride": lambda: rope_(torch.ones(1, 4, 16)[..., ::2], COS, SIN, None, 2, 1),
    "glu of integers": lambda: glu(X.long(), "silu"),
    "glu, width": lambda: glu(X[:, :7], "silu"),
    "glu, activation": lambda: glu(X, "swish"),
    "glu_backward, dy": lambda: glu_backward(X, X, "silu"),
    "glu_backward, device": lambda: glu_backward(elsewhere(X[:, :4]), X, "silu"),
    "glu_backward, stride": lambda: glu_backward(X[:, :4], X, "silu", out=torch.ones(8, 4).t()),
    "attention of integers": lambda: attention(QKV.long(), 2, 1),
    "attention, heads": lambda: attention(QKV, 3, 1),
    "attention, no heads": lambda: attention(QKV, 2, 0),
    "attention, borders": lambda: attention(QKV, 2, 1, cu_seqlens=W),
    "attention, device": lambda: attention(QKV, 2, 1, cu_seqlens=elsewhere(IDS)),
    "head of integers": lambda: linear_cross_entropy(X.long(), WIDE.long(), IDS),
    "head, shape": lambda: linear_cross_entropy(X, WIDE[:, :7], IDS),
    "head, targets": lambda: linear_cross_entropy(X, WIDE, IDS.int()),
    "head, device": lambda: linear_cross_entropy(X, elsewhere(WIDE), IDS),
    "head, main_grad": lambda: linear_cross_entropy(X, WIDE, IDS, main_grad=X),
    "head, valid_vocab": lambda: linear_cross_entropy(X, WIDE, IDS, valid_vocab=7),
    "head, no vocabulary": lambda: linear_cross_entropy(X, WIDE, IDS, valid_vocab=0),
    "linear, main_grad": lambda: linear(X, WIDE, main_grad=X),
    "adamw, length": lambda: step(grad=X),
    "adamw, dtype": lambda: step(m=W.bfloat16()),
    "adamw, device": lambda: step(v=elsewhere(W)),
    "adamw, groups": lambda: step(groups=GROUPS.repeat(2), scales=torch.ones(1, 3)),
    "grad_norm of integers": lambda: grad_norm(W.long()),
    "grad_norm, groups": lambda: grad_norm(W, GROUPS.repeat(2), torch.ones(1).double()),
    "grad_norm, weights": lambda: grad_norm(W, GROUPS, torch.ones(1)),
    "grad_norm, device": lambda: grad_norm(W, elsewhere(GROUPS), torch.ones(1).double()),
    "embedding, ids": lambda: embedding(X, WIDE),
    "embedding of integers": lambda: embedding(IDS, WIDE.long()),
    "embedding, device": lambda: embedding(elsewhere(IDS), WIDE),
    "embedding, main_grad": lambda: embedding(IDS, WIDE, main_grad=X),
    "embedding_backward_, shape": lambda: embedding_backward_(WIDE.clone(), IDS, X[:3]),
    "embedding_backward_, ids": lambda: embedding_backward_(WIDE.clone(), IDS.float(), X),
    "embedding_backward_, device": lambda: embedding_backward_(WIDE.clone(), IDS, elsewhere(X)),
    "grow of integers": lambda: grow.grow(X.long(), 2, 2),
    "grow, copies": lambda: grow.grow(X, 0, 2),
    "grow, dimensions": lambda: grow.grow(QKV, 2, 2),
    "remap, indices": lambda: grow.remap(X, IDS.int(), IDS),
    "remap, device": lambda: grow.remap(X, IDS, elsewhere(IDS)),
    "remap, scale": lambda: grow.remap(X, IDS, IDS, W),
    "merge, shape": lambda: merge.linear([X, WIDE], [0.5, 0.5]),
    "merge, weights": lambda: merge.linear([X, X], [0.5]),
    "merge, device": lambda: merge.linear([X, elsewhere(X)], [0.5, 0.5]),
    "merge, base": lambda: merge.task_arithmetic(WIDE, [X], [1.0]),
    "merge, densities": lambda: merge.ties(X, [X], [1.0], [1.5]),
    "gram, shape": lambda: merge.gram(WIDE, [X]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_it_is_refused_in_a_sentence(what):
    with pytest.raises(ValueError) as caught:
        WRONG[what]()
    assert len(str(caught.value).split()) > 3 and "\n" not in str(caught.value)
