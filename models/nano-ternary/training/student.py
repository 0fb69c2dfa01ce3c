"""The student: transformers' BitNet (b1.58) with shadow weights, cut out of the teacher, and written as a packed checkpoint."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from teacher import attend, normalise, rope, rotate

CONFIG = dict(vocab_size=8192, hidden_size=384, intermediate_size=512, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2)
HEAD_DIM = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]


def ternary(weight, strength):
    """absmean ternary weights (arXiv 2402.17764) with a straight-through gradient; strength 0 to 1 fades the rounding in."""
    scale = weight.abs().mean().clamp(min=1e-5)
    return (weight + strength * ((weight / scale).round().clamp(-1, 1) * scale - weight).detach()).bfloat16()


def int8(x, strength):
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x + strength * ((x * scale).round().clamp(-128, 127) / scale - x).detach()).bfloat16()


def int4(x, strength):
    """BitNet a4.8's (arXiv 2411.04965): the step is the mean magnitude over the root of 7."""
    scale = 7 ** 0.5 / x.abs().mean(-1, keepdim=True).clamp(min=1e-5)
    return (x + strength * ((x * scale).round().clamp(-8, 7) / scale - x).detach()).bfloat16()


def top_half(x):
    """The larger half by magnitude of every token."""
    return x * (x.abs() >= x.abs().kthvalue(x.shape[-1] // 2 + 1, dim=-1, keepdim=True).values)


def float8(weight):
    """As the checkpoint stores the embedding."""
    return weight + (weight.to(torch.float8_e4m3fn).float() - weight).detach()


class Layer(nn.Module):
    def __init__(self, d, ffn, kv):
        super().__init__()
        shapes = dict(q=(d, d), k=(kv, d), v=(kv, d), o=(d, d), gate=(ffn, d), up=(ffn, d), down=(d, ffn))
        self.proj = nn.ParameterDict({name: nn.Parameter(torch.randn(shape) * 0.03) for name, shape in shapes.items()})
        self.norm = nn.ParameterDict({name: nn.Parameter(torch.ones(size)) for name, size in dict(
            input_layernorm=d, attn_sub_norm=d, post_attention_layernorm=d, ffn_sub_norm=ffn).items()})


def pre(x, cos, sin, strength, a4, norm, wq, wk, wv):
    h = (int4 if a4 else int8)(normalise(x, norm), strength)
    q, k, v = (F.linear(h, ternary(w, strength)).view(h.shape[0], -1, HEAD_DIM) for w in (wq, wk, wv))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def post(x, out, strength, a4, sub_norm, wo, norm, gate, up, ffn_norm, down):
    out = normalise(out, sub_norm)
    x = x + F.linear(int8(top_half(out) if a4 else out, strength), ternary(wo, strength)).float()
    h = (int4 if a4 else int8)(normalise(x, norm), strength)
    gate, up = (F.linear(h, ternary(w, strength)).float() for w in (gate, up))
    h = normalise(F.relu(gate).square() * up, ffn_norm)
    return x + F.linear(int8(h, strength), ternary(down, strength)).float()


class Student(nn.Module):
    def __init__(self, config=CONFIG):
        super().__init__()
        d, kv = config["hidden_size"], config["num_key_value_heads"] * HEAD_DIM
        self.embed = nn.Parameter(torch.randn(config["vocab_size"], d) * 0.2)
        self.layers = nn.ModuleList(Layer(d, config["intermediate_size"], kv) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(d))
        self.pre, self.post = pre, post

    def compile_parts(self):
        self.pre, self.post = torch.compile(pre, dynamic=False), torch.compile(post, dynamic=False)

    def forward(self, ids, length, strength, a4=False):
        """Last hidden state [tokens, hidden], normed, and the head [vocab, hidden], both bfloat16."""
        table = float8(self.embed)
        x = F.embedding(ids, table)
        cos, sin = rope(torch.arange(length, device=ids.device).repeat(len(ids) // length), HEAD_DIM)
        for layer in self.layers:
            p, n = layer.proj, layer.norm
            q, k, v = self.pre(x, cos, sin, strength, a4, n["input_layernorm"], p["q"], p["k"], p["v"])
            x = self.post(x, attend(q, k, v, length), strength, a4, n["attn_sub_norm"], p["o"], n["post_attention_layernorm"],
                          p["gate"], p["up"], n["ffn_sub_norm"], p["down"])
        return normalise(x, self.norm).bfloat16(), table.bfloat16()

    @torch.no_grad()
    def cut_from(self, teacher, ids, length):
        """Start from the teacher: its residual stream in its principal directions, its strongest heads and neurons."""
        d, ffn, w = self.norm.numel(), self.layers[0].norm["ffn_sub_norm"].numel(), teacher.w
        x = w["embed_tokens.weight"][ids].float()
        cos, sin = rope(torch.arange(length, device=ids.device).repeat(len(ids) // length), HEAD_DIM)
        covariance, plans = 0.0, []
        for i in range(teacher.layers):
            first, second = teacher.weights(i)
            wo, norm, gate, up, down = second
            covariance = covariance + _gram(normalise(x))
            out = attend(*teacher.pre(x, cos, sin, *first), length)
            heads = torch.stack([F.linear(part, column).float().square().mean() for part, column in zip(
                out.split(HEAD_DIM, 1), wo.split(HEAD_DIM, 1))])
            group = teacher.heads // teacher.kv_heads
            keep = self.layers[0].proj["q"].shape[0] // HEAD_DIM // teacher.kv_heads
            heads = torch.cat([h.topk(keep).indices.sort().values + g * group for g, h in enumerate(heads.split(group))])
            heads = (heads[:, None] * HEAD_DIM + torch.arange(HEAD_DIM, device=x.device)).flatten()
            x = x + F.linear(out, wo).float()
            covariance = covariance + _gram(normalise(x))
            h = normalise(x, norm).bfloat16()
            inner = F.silu(F.linear(h, gate)) * F.linear(h, up)
            neurons = (inner.float().square().mean(0) * down.float().square().sum(0)).topk(ffn).indices
            plans.append((heads, neurons, out[:, heads].float().square().mean().sqrt(), inner[:, neurons].float().square().mean().sqrt()))
            x = x + F.linear(inner, down).float()
        covariance = covariance + teacher.layers * _gram(normalise(x))
        basis = torch.linalg.eigh(covariance)[1][:, -d:]
        gain = (basis.shape[0] / d) ** 0.5  # a shorter vector of the same direction has larger elements after its norm
        self.embed.copy_(w["embed_tokens.weight"].float() @ basis)
        self.norm.fill_(float(w["norm.weight"].mean()) / gain)
        for i, (layer, (heads, neurons, out_rms, inner_rms)) in enumerate(zip(self.layers, plans)):
            (norm1, wq, wk, wv), (wo, norm2, gate, up, down) = teacher.weights(i)
            p = layer.proj
            for name, weight, norm in (("q", wq[heads], norm1), ("k", wk, norm1), ("v", wv, norm1), ("gate", gate[neurons], norm2),
                                       ("up", up[neurons], norm2)):
                p[name].copy_((weight.float() * norm) @ basis / gain)
            p["o"].copy_(basis.T @ wo[:, heads].float() * out_rms)
            p["down"].copy_(basis.T @ down[:, neurons].float() * inner_rms)

    @torch.no_grad()
    def packed(self):
        """{name: tensor} of the Hugging Face checkpoint: four ternary rows a byte, `weight_scale` multiplies (autobitlinear)."""
        state = {"model.embed_tokens.weight": self.embed.to(torch.float8_e4m3fn), "model.norm.weight": self.norm.bfloat16()}
        for i, layer in enumerate(self.layers):
            for name, weight in layer.proj.items():
                part = "self_attn" if name in "qkvo" else "mlp"
                scale = weight.abs().mean().clamp(min=1e-5)
                codes = ((weight / scale).round().clamp(-1, 1) + 1).to(torch.uint8).view(4, -1, weight.shape[1])
                key = f"model.layers.{i}.{part}.{name}_proj"
                state[f"{key}.weight"] = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
                state[f"{key}.weight_scale"] = scale.bfloat16().view(1)
            for name, weight in layer.norm.items():
                part = {"attn_sub_norm": "self_attn.", "ffn_sub_norm": "mlp."}.get(name, "")
                state[f"model.layers.{i}.{part}{name}.weight"] = weight.bfloat16()
        return {k: v.cpu().contiguous() for k, v in state.items()}


def _gram(x):
    return x.T @ x / len(x)
