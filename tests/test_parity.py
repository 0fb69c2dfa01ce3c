"""The same file in stock onnxruntime and in our runtime, on the bundled model."""
import numpy as np
import onnxruntime
import pytest

from edgeattn.cache.options import CacheOptions
from edgeattn.runtime import Model


class Stock:
    """An export in plain onnxruntime, keys and values carried from call to call."""

    def __init__(self, folder, about):
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        empty = np.zeros((about["kv_heads"], 0, about["head_dim"]), np.float32)
        self.past = {f"past_{what}.{layer}": empty for what in ("key", "value") for layer in range(about["num_layers"])}
        self.length = 0

    def forward(self, ids, rows):
        ids = np.asarray(ids, np.int64)
        names = ["logits", *(name.replace("past", "present") for name in self.past)]
        feeds = {"token_ids": ids, "positions": self.length + np.arange(len(ids)), "logit_rows": np.asarray(rows, np.int64), **self.past}
        logits, *present = self.session.run(names, feeds)
        self.past, self.length = dict(zip(self.past, present)), self.length + len(ids)
        return logits


def opened(nano_export, precision, **options):
    folder = nano_export(precision)
    model = Model.load(folder, ctx_size=1024, **options)
    return model, Stock(folder, model.config["model"])


def test_fp32_greedy_tokens_are_identical(nano_export):
    model, stock = opened(nano_export, "fp32")
    ids = np.random.default_rng().integers(4, 8000, 40)
    sequence, tokens = model.new_sequence(), []
    ours, theirs = model.forward([(sequence, ids)]), stock.forward(ids, [39])
    for _ in range(200):
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * theirs.std())
        tokens.append(int(ours[0].argmax()))
        assert tokens[-1] == theirs[0].argmax()
        ours, theirs = model.forward([(sequence, tokens[-1:])]), stock.forward(tokens[-1:], [0])


# Both run the same stored weights. fp16: only sums differ. int8, int4: activations are rounded to int8 in every layer, and a last
# digit that falls the other way turns into a whole step of the next rounding, so two correct runtimes part by about 1 %.
@pytest.mark.parametrize("precision, agreement, error", [("fp16", 0.998, 1e-3), ("int8", 0.98, 0.03), ("int4", 0.98, 0.03)])
def test_teacher_forced_agreement(nano_export, written, precision, agreement, error):
    ours, theirs = [], []
    for text in written:
        model, stock = opened(nano_export, precision, cache=CacheOptions("f32", "f32"))
        ours.append(model.forward([(model.new_sequence(), text)], "all"))
        theirs.append(stock.forward(text, np.arange(len(text))))
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    agreed = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    rms = np.sqrt(np.square(ours - theirs).mean()) / theirs.std()
    print(f"{precision}: top-1 agreement {agreed:.4f}, root-mean-square error {rms:.4f} of the logits' standard deviation")
    assert agreed >= agreement
    assert rms < error


@pytest.fixture(scope="module")
def written(nano_export):
    """[4, 500] tokens that the model itself writes, sampled at temperature 0.7: text of the kind it reads."""
    model = Model.load(nano_export("fp32"), ctx_size=2100)
    rng, sequences = np.random.default_rng(1), [model.new_sequence() for _ in range(4)]
    ids = [np.full(4, 1)]
    while len(ids) < 500:
        logits = model.forward([(s, [i]) for s, i in zip(sequences, ids[-1])])
        ids.append((logits / 0.7 - np.log(-np.log(rng.random(logits.shape)))).argmax(-1))  # Gumbel: samples of the distribution
    return np.stack(ids, axis=1)
