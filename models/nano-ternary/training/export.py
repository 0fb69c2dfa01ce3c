"""Write what train.py saved as a Hugging Face folder.  Usage: export.py model.safetensors ../../nano OUT_DIR"""
import json
import shutil
import sys
from pathlib import Path

from student import CONFIG
from teacher import EPS, THETA


def main(weights, teacher, out):
    teacher, out = Path(teacher), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(teacher / name, out / name)
    shutil.copyfile(weights, out / "model.safetensors")
    config = json.loads((teacher / "config.json").read_text())
    config = {key: config[key] for key in (
        "attention_bias", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "max_position_embeddings",
        "pad_token_id", "tie_word_embeddings", "transformers_version", "use_cache")}
    about = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline", "modules_to_not_convert": None}
    config |= CONFIG | {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_act": "relu2", "rms_norm_eps": EPS,
                        "rope_parameters": {"rope_theta": THETA, "rope_type": "default"}, "quantization_config": about}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:4])
