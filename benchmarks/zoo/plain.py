"""Models written here, in the styles in which people write models without a model library."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EncoderWithHead(nn.Module):
    """`nn.TransformerEncoder` between an embedding and a head. Returns the loss."""

    def __init__(self, vocab: int, hidden: int, heads: int, wide: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        layer = nn.TransformerEncoderLayer(hidden, heads, wide, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(hidden, vocab)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.encoder(self.embedding(ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def cross_entropy_of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """In float32, flat: what torchtitan calls `cross_entropy_loss`."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1))


class RMSNorm(nn.Module):
    """Written out, with its own eps: `nn.RMSNorm(eps=None)` takes it from the dtype."""

    def __init__(self, hidden: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, wide, bias=False)
        self.w2 = nn.Linear(wide, hidden, bias=False)
        self.w3 = nn.Linear(hidden, wide, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def rotations(head_dim: int, tokens: int, theta: float = 10000.0) -> Tensor:
    """Rotary embedding as complex numbers, [tokens, head_dim / 2]."""
    freqs = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(tokens).float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


class TitanAttention(nn.Module):
    """Rotary embedding by a complex product; key and value heads shared by pairs of queries."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        kv = max(1, heads // 2)
        self.wq = nn.Linear(hidden, hidden, bias=False)
        self.wk = nn.Linear(hidden, kv * self.head_dim, bias=False)
        self.wv = nn.Linear(hidden, kv * self.head_dim, bias=False)
        self.wo = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (w(x).view(rows, tokens, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k = self._rotate(q, freqs_cis), self._rotate(k, freqs_cis)
        shared = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(shared, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).contiguous().view(rows, tokens, -1))

    @staticmethod
    def _rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        turned = pairs * freqs_cis.view(1, x.shape[1], 1, -1)
        return torch.view_as_real(turned).flatten(3).type_as(x)


class TitanBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, wide: int) -> None:
        super().__init__()
        self.attention = TitanAttention(hidden, heads)
        self.feed_forward = SwiGLU(hidden, wide)
        self.attention_norm = RMSNorm(hidden)
        self.ffn_norm = RMSNorm(hidden)

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis)
        return h + self.feed_forward(self.ffn_norm(h))


class TitanLlama(nn.Module):
    """In the style of torchtitan: a dict of layers, complex rotations, logits out."""

    def __init__(
        self, vocab: int, hidden: int, heads: int, wide: int, layers: int, tokens: int
    ) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, hidden)
        self.register_buffer("freqs_cis", rotations(hidden // heads, tokens), persistent=False)
        self.layers = nn.ModuleDict(
            {str(i): TitanBlock(hidden, heads, wide) for i in range(layers)}
        )
        self.norm = RMSNorm(hidden)
        self.output = nn.Linear(hidden, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        freqs_cis = self.get_buffer("freqs_cis")[: tokens.shape[1]]
        for layer in self.layers.values():
            h = layer(h, freqs_cis)
        return self.output(self.norm(h))


class TitanStep(nn.Module):
    """A model and its loss function, which torchtitan compiles separately."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_of_tokens(self.model(tokens), labels)


class TuneRotary(nn.Module):
    """Rotary embedding by sines and cosines kept in a cache, in a module of its own."""

    def __init__(self, head_dim: int, tokens: int) -> None:
        super().__init__()
        turns = torch.view_as_real(rotations(head_dim, tokens))
        self.register_buffer("cache", turns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        cache = self.get_buffer("cache")[: x.shape[1]].view(1, x.shape[1], 1, -1, 2)
        a, b, cos, sin = pairs[..., 0], pairs[..., 1], cache[..., 0], cache[..., 1]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3).type_as(x)


class TuneAttention(nn.Module):
    def __init__(self, hidden: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.kv_heads = max(1, heads // 2)
        self.q_per_kv = heads // self.kv_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.output_proj = nn.Linear(hidden, hidden, bias=False)
        self.pos_embeddings = TuneRotary(self.head_dim, tokens)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q = self.pos_embeddings(self.q_proj(x).view(rows, tokens, -1, self.head_dim))
        k = self.pos_embeddings(self.k_proj(x).view(rows, tokens, -1, self.head_dim))
        v = self.v_proj(x).view(rows, tokens, -1, self.head_dim)
        shape = (rows, tokens, self.kv_heads, self.q_per_kv, self.head_dim)
        k, v = (t.unsqueeze(3).expand(shape).flatten(2, 3) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output_proj(out.transpose(1, 2).contiguous().view(rows, tokens, -1))


class TuneLayer(nn.Module):
    def __init__(self, hidden: int, heads: int, wide: int, tokens: int) -> None:
        super().__init__()
        self.sa_norm = RMSNorm(hidden)
        self.attn = TuneAttention(hidden, heads, tokens)
        self.mlp_norm = RMSNorm(hidden)
        self.mlp = SwiGLU(hidden, wide)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attn(self.sa_norm(x))
        return h + self.mlp(self.mlp_norm(h))


class TuneLlama(nn.Module):
    """In the style of torchtune: modules for everything; the head whole, or in output chunks.

    With `output_chunks` the head is applied to slices of the tokens and the loss sums over them, as
    torchtune's chunked cross entropy does by hand.
    """

    def __init__(
        self,
        vocab: int,
        hidden: int,
        heads: int,
        wide: int,
        layers: int,
        tokens: int,
        output_chunks: int = 0,
    ) -> None:
        super().__init__()
        self.output_chunks = output_chunks
        self.tok_embeddings = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(TuneLayer(hidden, heads, wide, tokens) for _ in range(layers))
        self.norm = RMSNorm(hidden)
        self.output = nn.Linear(hidden, vocab, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[object, Tensor]:
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h)
        h = self.norm(h)
        if not self.output_chunks:
            logits = self.output(h).float()
            return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        chunks = [self.output(part) for part in h.chunk(self.output_chunks, dim=1)]
        total = h.new_zeros((), dtype=torch.float32)
        for part, target in zip(chunks, labels.chunk(self.output_chunks, dim=1), strict=True):
            flat = part.flatten(0, 1).float()
            total = total + F.cross_entropy(flat, target.flatten(), reduction="sum")
        return chunks, total / labels.numel()


class EinsumBlock(nn.Module):
    """Queries, keys and values in one tensor; every product an einsum; attention written out."""

    def __init__(self, hidden: int, heads: int, wide: int) -> None:
        super().__init__()
        head_dim = hidden // heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv = nn.Parameter(torch.randn(hidden, 3, heads, head_dim) * hidden**-0.5)
        self.out = nn.Parameter(torch.randn(heads, head_dim, hidden) * hidden**-0.5)
        self.up = nn.Parameter(torch.randn(hidden, wide) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(wide, hidden) * wide**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("bsd,dthk->tbshk", self.norm1(x), self.qkv).unbind(0)
        scores = torch.einsum("bqhk,bshk->bhqs", q, k) * q.shape[-1] ** -0.5
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1).to(v.dtype)
        mixed = torch.einsum("bhqs,bshk->bqhk", weights, v)
        x = x + torch.einsum("bqhk,hkd->bqd", mixed, self.out)
        inside = F.gelu(torch.einsum("bsd,df->bsf", self.norm2(x), self.up), approximate="tanh")
        return x + torch.einsum("bsf,fd->bsd", inside, self.down)


class EinsumLM(nn.Module):
    def __init__(self, vocab: int, hidden: int, heads: int, wide: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocab, hidden) * 0.02)
        self.blocks = nn.ModuleList(EinsumBlock(hidden, heads, wide) for _ in range(layers))

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding[ids]
        for block in self.blocks:
            x = block(x)
        logits = torch.einsum("bsd,vd->bsv", x, self.embedding)
        return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class PatchBlock(nn.Module):
    """A pre-norm block with a learned scale per branch, as timm's `Block` has."""

    def __init__(self, hidden: int, heads: int, wide: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden, eps=1e-6), nn.LayerNorm(hidden, eps=1e-6)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, wide), nn.Linear(wide, hidden)
        self.gamma1 = nn.Parameter(0.1 * torch.ones(hidden))
        self.gamma2 = nn.Parameter(0.1 * torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, hidden = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(rows, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.gamma1 * self.proj(mixed.reshape(rows, tokens, hidden))
        return x + self.gamma2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PatchTransformer(nn.Module):
    """A vision transformer in the style of timm: convolved patches, a class token, `head`."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        wide: int,
        layers: int,
        image: int,
        patch: int = 4,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, hidden, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, hidden) * 0.02)
        patches = (image // patch) ** 2
        self.pos_embed = nn.Parameter(torch.randn(1, patches + 1, hidden) * 0.02)
        self.blocks = nn.ModuleList(PatchBlock(hidden, heads, wide) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)[:, 0])
        return logits, F.cross_entropy(logits, labels)
