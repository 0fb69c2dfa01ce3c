"""The teacher, models/nano: its layers over a flat list of tokens, and text sampled from it."""
import time

import torch
import torch.nn.functional as F

EPS = 1e-5
THETA = 100_000.0


def rope(positions, head_dim):
    """cos, sin [len(positions), head_dim], both halves alike."""
    inverse = THETA ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angle = positions.float()[:, None] * inverse
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


def rotate(x, cos, sin):
    """x [tokens, heads, head_dim]."""
    low, high = x.chunk(2, -1)
    return (x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]).to(x.dtype)


def normalise(x, weight=None):
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return x if weight is None else x * weight


def attend(q, k, v, length):
    """Causal attention over rows of `length` tokens; q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]."""
    q, k, v = (t.view(-1, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])


class Teacher:
    def __init__(self, weights, config, device):
        self.heads, self.kv_heads, self.head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        self.layers = config["num_hidden_layers"]
        self.w = {k.removeprefix("model."): v.to(device, torch.bfloat16 if v.dim() == 2 else torch.float32) for k, v in weights.items()}
        self.pre, self.post = self._pre, self._post

    def compile(self):
        self.pre, self.post = torch.compile(self._pre, dynamic=False), torch.compile(self._post, dynamic=False)

    def weights(self, layer):
        """The layer's tensors, as arguments: one compiled function then serves all layers."""
        p = f"layers.{layer}."
        return ([self.w[p + n] for n in ("input_layernorm.weight", *(f"self_attn.{c}_proj.weight" for c in "qkv"))],
                [self.w[p + n] for n in ("self_attn.o_proj.weight", "post_attention_layernorm.weight", *(
                    f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")))])

    def _pre(self, x, cos, sin, norm, wq, wk, wv):
        h = normalise(x, norm).bfloat16()
        q, k, v = (F.linear(h, w).view(h.shape[0], -1, self.head_dim) for w in (wq, wk, wv))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _post(self, x, out, wo, norm, gate, up, down):
        x = x + F.linear(out, wo).float()
        h = normalise(x, norm).bfloat16()
        return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down).float()

    @torch.no_grad()
    def hidden(self, ids, length):
        """Last hidden state [tokens, hidden], normed, of rows of `length` tokens; ids [tokens]."""
        x = self.w["embed_tokens.weight"][ids].float()
        cos, sin = rope(torch.arange(length, device=ids.device).repeat(len(ids) // length), self.head_dim)
        for layer in range(self.layers):
            first, second = self.weights(layer)
            x = self.post(x, attend(*self.pre(x, cos, sin, *first), length), *second)
        return normalise(x, self.w["norm.weight"]).bfloat16()

    @torch.no_grad()
    def sample(self, rows, length, first, deadline, segment):
        """Token ids [rows, tokens <= length] sampled at temperatures 0.8 to 1, one CUDA graph per `segment` of the context."""
        device = self.w["norm.weight"].device
        shape = (self.layers, rows * self.kv_heads, length, self.head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        ids = torch.zeros(rows, length, device=device, dtype=torch.long)
        current = torch.full((rows,), first, device=device)
        at = torch.zeros(1, device=device, dtype=torch.long)
        temperature = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.8], device=device).repeat(rows // 5 + 1)[:rows]
        slots = torch.arange(length, device=device)

        def step(seen):
            x = self.w["embed_tokens.weight"][current].float()
            cos, sin = rope(at, self.head_dim)
            hide = torch.where(slots[:seen] <= at, 0.0, float("-inf")).bfloat16()
            for layer in range(self.layers):
                head, tail = self.weights(layer)
                q, k, v = self._pre(x, cos, sin, *head)
                keys[layer].index_copy_(1, at, k.reshape(-1, 1, self.head_dim))
                values[layer].index_copy_(1, at, v.reshape(-1, 1, self.head_dim))
                scores = torch.baddbmm(hide, q.reshape(rows * self.kv_heads, -1, self.head_dim), keys[layer, :, :seen].mT,
                                       alpha=self.head_dim ** -0.5)
                out = torch.softmax(scores, -1) @ values[layer, :, :seen]
                x = self._post(x, out.reshape(rows, -1), *tail)
            logits = F.linear(normalise(x, self.w["norm.weight"]).bfloat16(), self.w["embed_tokens.weight"]).float()
            noise = torch.empty_like(logits).exponential_()
            current.copy_((logits / temperature[:, None] - noise.log()).argmax(-1))
            ids.index_copy_(1, at, current[:, None])
            at.add_(1)

        graphs, done = [], 0  # kept: they share the memory of the first
        for seen in range(segment, length + 1, segment):
            if device.type == "cpu":
                for _ in range(segment):
                    step(seen)
            else:
                state = at.clone(), current.clone()
                torch.cuda.synchronize()
                with torch.cuda.stream(torch.cuda.Stream()):  # warm-up, as capture asks for
                    step(seen)
                torch.cuda.synchronize()
                at.copy_(state[0])
                current.copy_(state[1])
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
                    step(seen)
                graphs.append(graph)
                for _ in range(segment):
                    graph.replay()
                torch.cuda.synchronize()
            done = seen
            if time.time() > deadline:
                break
        return ids[:, :done].to(torch.int16).cpu().numpy().view("uint16")
