"Contracts of the layers: equal to the libraries, gradients right, bad sizes refused."
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from medgen_nb.layers import MLP, AdaptiveNorm, Attention, Block, LinearAttention, TimeEmbedding, attend, join_heads, sinusoid, split_heads

WIDTH, HEADS, TOKENS = 16, 4, 6


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_attend_is_the_formula():
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, 5, dtype=torch.float64).unbind(0)
    bias = torch.randn(HEADS, TOKENS, TOKENS, dtype=torch.float64)
    for b in (None, bias):
        scores = q @ k.mT / 5**0.5 + (0 if b is None else b)
        torch.testing.assert_close(attend(q, k, v, b), scores.softmax(-1) @ v)


def test_a_learned_bias_gets_its_gradient():
    parts = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(attend, [*parts, torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)])


def test_heads_split_and_join(x):
    assert split_heads(x, HEADS).shape == (3, HEADS, TOKENS, WIDTH // HEADS)
    assert torch.equal(join_heads(split_heads(x, HEADS)), x)


@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_equals_pytorch(x, with_bias):
    ours, library = Attention(WIDTH, HEADS).double(), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    library.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                             "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias})
    bias = torch.randn(3, HEADS, TOKENS, TOKENS, dtype=torch.float64) if with_bias else None
    theirs = library(x, x, x, attn_mask=bias.flatten(0, 1) if with_bias else None)[0]
    torch.testing.assert_close(ours(x, bias), theirs)


def test_forbidden_tokens_are_not_read(x):
    attention, bias, changed = Attention(WIDTH, HEADS).double(), torch.zeros(1, TOKENS), x.clone()
    bias[:, -1] = -torch.inf
    changed[:, -1] += 1
    torch.testing.assert_close(attention(x, bias)[:, :-1], attention(changed, bias)[:, :-1])


def test_attention_sees_a_set(x):
    attention, shuffle = Attention(WIDTH, HEADS).double(), torch.randperm(TOKENS)
    torch.testing.assert_close(attention(x[:, shuffle]), attention(x)[:, shuffle])


def test_linear_attention_with_identity_mixtures_is_attention(x):
    full, linear = Attention(WIDTH, HEADS).double(), LinearAttention(WIDTH, HEADS, TOKENS, TOKENS).double()
    linear.load_state_dict(full.state_dict() | {"squeeze": torch.eye(TOKENS).repeat(2, 1, 1)})
    torch.testing.assert_close(linear(x), full(x))


def test_linear_attention_is_linformer_written_out(x):
    "Keys made first, squeezed after, as in the paper (biases at zero, where the two orders agree)."
    linear = LinearAttention(WIDTH, HEADS, TOKENS, rank=2).double()
    nn.init.zeros_(linear.qkv.bias)
    q, k, v = linear.qkv(x).chunk(3, -1)
    k, v = (torch.einsum("rn,bnw->brw", mix, part) for mix, part in zip(linear.squeeze, (k, v)))
    weights = torch.einsum("bhnd,bhrd->bhnr", split_heads(q, HEADS), split_heads(k, HEADS)).div(2).softmax(-1)   # 2 = sqrt(16 / 4)
    torch.testing.assert_close(linear(x), linear.out(join_heads(weights @ split_heads(v, HEADS))))


def test_squeeze_starts_within_its_bound():
    squeeze = LinearAttention(WIDTH, HEADS, length=50, rank=25).squeeze
    assert 0.19 < squeeze.abs().max() <= 0.2


@pytest.mark.parametrize("call, word", [
    (lambda: Attention(WIDTH, 5), "multiple of the heads"),
    (lambda: LinearAttention(WIDTH, HEADS, 7, 2)(torch.zeros(1, TOKENS, WIDTH)), "built for 7 tokens and got 6"),
    (lambda: LinearAttention(WIDTH, HEADS, TOKENS, 2)(torch.zeros(1, TOKENS, WIDTH), torch.zeros(TOKENS, TOKENS)), "use Attention"),
    (lambda: sinusoid(torch.zeros(2), 7), "even width"),
    (lambda: Block(WIDTH, 8, Attention(WIDTH, HEADS), WIDTH)(torch.zeros(1, TOKENS, WIDTH)), "cond_width=16 and got no condition"),
    (lambda: Block(WIDTH, 8, Attention(WIDTH, HEADS), None)(torch.zeros(1, TOKENS, WIDTH), torch.zeros(1, WIDTH)), "cond_width=None"),
])
def test_bad_sizes_are_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_sinusoid_and_time_embedding_equal_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0.0, 0.5, 3.0, 999.0])
    clocks = embeddings.get_timestep_embedding(t, WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoid(t, WIDTH), clocks, atol=1e-4, rtol=0)
    ours, library = TimeEmbedding(WIDTH), embeddings.TimestepEmbedding(WIDTH, WIDTH)
    library.linear_1.load_state_dict(ours.up.state_dict())
    library.linear_2.load_state_dict(ours.down.state_dict())
    torch.testing.assert_close(ours(t), library(clocks), atol=1e-4, rtol=1e-4)


def test_adaptive_norm_starts_plain_and_closed(x):
    norm = AdaptiveNorm(WIDTH, 5).double()
    normed, gate = norm(x, torch.randn(3, 5, dtype=torch.float64))
    torch.testing.assert_close(normed, F.layer_norm(x, (WIDTH,), eps=1e-6))
    assert (gate == 0).all()


def test_adaptive_norm_takes_one_condition_per_record_or_per_token(x):
    norm, cond = AdaptiveNorm(WIDTH, 5).double(), torch.randn(3, 5, dtype=torch.float64)
    nn.init.normal_(norm.modulate.weight)
    torch.testing.assert_close(norm(x, cond)[0], norm(x, cond[:, None].expand(-1, TOKENS, -1))[0])
    torch.testing.assert_close(norm(x[:, 2], cond)[0], norm(x, cond)[0][:, 2])


def test_plain_block_equals_pytorch(x):
    block = Block(WIDTH, 32, Attention(WIDTH, HEADS), None).double().eval()
    library = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, activation="gelu", batch_first=True, norm_first=True).double().eval()
    library.self_attn.load_state_dict({"in_proj_weight": block.attention.qkv.weight, "in_proj_bias": block.attention.qkv.bias,
                                       "out_proj.weight": block.attention.out.weight, "out_proj.bias": block.attention.out.bias})
    for name, part in {"linear1": block.mlp.up, "linear2": block.mlp.down, "norm1": block.norm1, "norm2": block.norm2}.items():
        getattr(library, name).load_state_dict(part.state_dict())
    torch.testing.assert_close(block(x), library(x))


def test_conditioned_block_starts_as_nothing_and_learns(x):
    block, cond = Block(WIDTH, 32, Attention(WIDTH, HEADS), 5).double(), torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(block(x, cond), x)
    block(x, cond).square().sum().backward()
    assert block.norm1.modulate.weight.grad.abs().sum() > 0


def test_block_gradients():
    block = Block(4, 8, LinearAttention(4, heads=2, length=3, rank=2), cond_width=2).double()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.modulate.weight)
    assert torch.autograd.gradcheck(block, [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True),
                                            torch.randn(2, 2, dtype=torch.float64, requires_grad=True)])


def test_mlp_works_token_by_token(x):
    mlp = MLP(WIDTH, 8).double()
    torch.testing.assert_close(mlp(x)[:, 3], mlp(x[:, 3]))
