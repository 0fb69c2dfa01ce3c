"""Text to tokens and back, for byte-level and SentencePiece tokenizers; templates in their sandbox."""
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer as Backend, decoders, models, normalizers, processors

from edgeattn.tokenizer import Tokenizer

NANO = Path(__file__).parent.parent / "models/nano"
HELLO = [{"role": "user", "content": "hello"}]


def sentencepiece():
    """As Llama 2 has it: a leading space, words by a few merges, everything else as bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ["▁", *"abcdehlorwéß.", "he", "ll", "lo", "▁he", "▁w", "or"]:
        vocab[piece] = len(vocab)
    merges = [("h", "e"), ("l", "l"), ("l", "o"), ("▁", "he"), ("▁", "w"), ("o", "r")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return backend


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"},
              "chat_template": [{"name": "default", "template": "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def nano():
    return Tokenizer(NANO)


def with_template(folder, template):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((NANO / name).read_text())
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


def streamed(tokenizer, ids, continues=False):
    stream = tokenizer.stream(continues)
    pieces = [stream.add(i) for i in ids] + [stream.flush()]
    return pieces


# ---- streaming ---------------------------------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_stream_is_the_text(nano, llama, text):
    for tokenizer in (nano, llama):
        ids = tokenizer.encode(text, special=False)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in text:  # a whole character never comes out as a broken one
            assert "\ufffd" not in "".join(pieces)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 8191) | st.integers(4, 400), max_size=40))
def test_stream_of_any_byte_level_tokens_is_their_text(nano, ids):
    assert "".join(streamed(nano, ids)) == nano.decode(ids)


@settings(max_examples=100, deadline=None)
@given(start=st.text("he lo é😀", min_size=1, max_size=12), rest=st.text("he lo wé😀", max_size=12))
def test_stream_goes_on_after_a_prompt(llama, nano, start, rest):
    for tokenizer in (nano, llama):
        prompt, ids = tokenizer.encode(start, special=False), tokenizer.encode(start + rest, special=False)
        if ids[:len(prompt)] == prompt:
            assert tokenizer.decode(prompt) + "".join(streamed(tokenizer, ids[len(prompt):], continues=True)) == tokenizer.decode(ids)


def test_character_over_several_tokens_comes_whole(nano, llama):
    for tokenizer in (nano, llama):
        pieces = streamed(tokenizer, tokenizer.encode("a😀b", special=False))
        assert any("😀" in piece for piece in pieces[:-1])
        assert pieces[-1] == ""


def test_broken_bytes_come_out_without_waiting_forever(nano):
    ids = [nano.backend.token_to_id("ÿ")] * 20  # byte 0xFF, never valid
    stream = nano.stream()
    assert len("".join(stream.add(i) for i in ids)) >= 17


# ---- special tokens ----------------------------------------------------------------------------------------------
def test_begin_token_stands_once(llama):
    assert llama.encode("hello")[:2] != [1, 1] and llama.encode("hello")[0] == 1
    assert llama.encode("<s>hello").count(1) == 1
    assert llama.encode_chat(HELLO).count(1) == 1


def test_end_tokens_come_from_every_file(tmp_path, nano, llama):
    assert nano.end_tokens == {0, 2} and llama.end_tokens == {2}
    (tmp_path / "tokenizer.json").write_text((NANO / "tokenizer.json").read_text())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "edgeattn.json").write_text('{"model": {"eos_token_ids": [7, 8]}}')
    assert Tokenizer(tmp_path).end_tokens == {5, 7, 8}


def test_lone_surrogates_of_a_command_line_are_taken(nano):
    assert nano.encode("caf\udce9 x")


# ---- files -------------------------------------------------------------------------------------------------------
def test_missing_or_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((NANO / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Tokenizer(tmp_path)


# ---- chat templates ----------------------------------------------------------------------------------------------
def test_nano_template(nano):
    assert nano.render(HELLO) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert nano.encode_chat(HELLO)[0] == 1


def test_template_equals_transformers(nano):
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(NANO)
    messages = [{"role": "system", "content": "Be brief. 日本"}, *HELLO, {"role": "assistant", "content": " hi\n"}, *HELLO]
    assert nano.encode_chat(messages) == auto.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_helpers_that_templates_use(tmp_path):
    template = ("{% for m in messages %}\n{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m | tojson }}{% endgeneration %}"
                "{% endfor %}{{ strftime_now('%Y')[:1] }}{{ eos_token }}{{ tools is none }}")
    assert with_template(tmp_path, template).render([*HELLO, *HELLO]) == '{"role": "user", "content": "hello"}2<|im_end|>True'


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__['json'] }}", "{{ strftime_now.__globals__['json'] }}", "{{ range(10 ** 9) | list }}"])
def test_templates_stay_in_their_sandbox(tmp_path, template):
    with pytest.raises(ValueError, match="chat template failed"):
        with_template(tmp_path, template).render(HELLO)


def test_template_errors_are_clear(tmp_path, llama):
    with pytest.raises(ValueError, match="roles must alternate"):
        with_template(tmp_path, "{{ raise_exception('roles must alternate') }}").render(HELLO)
    with pytest.raises(ValueError, match="not valid Jinja"):
        with_template(tmp_path, "{% for %}").render(HELLO)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template.*edgeattn generate"):
        Tokenizer(tmp_path).render(HELLO)
