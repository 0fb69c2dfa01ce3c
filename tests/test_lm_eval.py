"""lm-evaluation-harness over our server: its scores of texts are the model's own."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from command import EDGEATTN

from edgeattn.cache.options import CacheOptions
from edgeattn.evaluation import words
from edgeattn.evaluation.lookups import fact
from edgeattn.log_softmax import log_softmax
from edgeattn.runtime import Model
from edgeattn.tokenizer import Tokenizer

TASK = """
task: facts
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}} The secret code of the {{name}} is"
doc_to_target: label
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list: [{metric: acc}]
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}


@pytest.fixture
def url(nano_int4):
    with subprocess.Popen([*EDGEATTN, "serve", "-m", nano_int4, "--port", "0", "-c", "512"], stderr=subprocess.PIPE, text=True) as server:
        lines = []
        while not lines or "http://" not in lines[-1]:
            lines.append(server.stderr.readline())
            assert lines[-1], lines
        yield "http" + lines[-1].split(" at http")[1].split()[0]
        server.terminate()
        server.stderr.read()


def test_the_harness_scores_texts_as_the_model_does(url, nano_int4, nano_checkpoint, tmp_path):
    rng, rows = np.random.default_rng(0), []
    for _ in range(8):
        names, codes = words.names(rng, 4), words.codes(rng, 4)
        asked = int(rng.integers(4))
        rows.append({"context": "".join(map(fact, names, codes)).strip(), "name": names[asked], "choices": codes, "label": asked})
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "facts.yaml").write_text(TASK.replace("FILE", str(tmp_path / "facts.jsonl")))
    about = f"model=nano,base_url={url}/v1/completions,tokenizer={nano_checkpoint},tokenizer_backend=huggingface,num_concurrent=4"
    done = subprocess.run([sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", about,
                           "--tasks", "facts", "--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples"],
                          capture_output=True, text=True, env=os.environ | OFFLINE | {"HF_HOME": str(tmp_path / "hf")}, timeout=300)
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for path in (tmp_path / "out").rglob("samples_facts_*.jsonl") for line in path.read_text().splitlines()]
    assert len(samples) == len(rows)
    model, tokenizer = Model.load(nano_int4, ctx_size=512, cache=CacheOptions("f16", "f16")), Tokenizer(nano_int4)
    for sample in samples:
        row = sample["doc"]
        prompt = f"{row['context']} The secret code of the {row['name']} is"
        expected = [worth(model, tokenizer, prompt, f" {code}") for code in row["choices"]]
        got = [float(found[0]) for found in sample["filtered_resps"]]
        np.testing.assert_allclose(got, expected, atol=0.05)  # a batch of another size rounds otherwise
    assert np.mean([sample["acc"] for sample in samples]) >= 0.5  # of four choices


def worth(model, tokenizer, prompt, text):
    """Log-probability of a text behind a prompt."""
    before, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    assert ids[:len(before)] == before
    sequence = model.new_sequence()
    rows = log_softmax(model.forward([(sequence, ids)], "all"))
    model.free(sequence)
    at = np.arange(len(before) - 1, len(ids) - 1)
    return rows[at, np.array(ids)[at + 1]].sum()
