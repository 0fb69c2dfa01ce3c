"""Text to tokens and back, for byte-level and SentencePiece tokenizers; templates in their sandbox."""
import base64
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer as Backend, decoders, models, normalizers, processors

from edgeattn.templates import _receive, _send
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


def with_backend(folder, change):
    """The tokenizer of `llama` with something changed in its file."""
    about = json.loads(sentencepiece().to_str())
    change(about)
    (folder / "tokenizer.json").write_text(json.dumps(about))
    return Tokenizer(folder)


GROWING = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 12}
DOUBLED = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 100,
           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(4) + b"a" * 5000 + b"\0").decode()}


@pytest.mark.parametrize("part, state", [
    ("normalizer", GROWING), ("post_processor", DOUBLED), ("normalizer", CHARSMAP),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "."}, "content": "b" * 1000}),
    ("decoder", {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": ""}, "content": "b" * 100}]})])
def test_texts_that_would_grow_without_bound(tmp_path, part, state):
    with pytest.raises(ValueError, match=f"{part} makes texts many times as long|not a readable"):
        with_backend(tmp_path, lambda about: about.__setitem__(part, state))


def test_a_pattern_that_never_ends_is_given_up(tmp_path):
    """The library counts tries, and panics."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = with_backend(tmp_path, lambda about: about.__setitem__("pre_tokenizer", split))
    assert tokenizer.encode("aaa")
    with pytest.raises(ValueError, match="tokenizer.json: failed .*retry-limit"):
        tokenizer.encode("a" * 40 + "!")


@pytest.mark.parametrize("name, text, message", [
    ("tokenizer_config.json", '{"bos_token": 3}', "bos_token must be"), ("tokenizer_config.json", "[]", "not a JSON object"),
    ("tokenizer_config.json", '{"eos_token": "\\ud800"}', "eos_token must be"), ("tokenizer_config.json", "[" * 99_999, "not valid JSON"),
    ("tokenizer_config.json", '{"eos_token": {"a": 1}}', "eos_token must"), ("tokenizer.json", "[" * 99_999, "not a readable"),
    ("generation_config.json", '{"eos_token_id": [[1]]}', "eos_token_id must be")])
def test_files_of_the_wrong_kind(tmp_path, name, text, message):
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_threads_go_on_while_a_long_text_is_encoded(nano):
    """A server's would otherwise all stand still."""
    looks, encoding = 0, threading.Thread(target=nano.encode, args=["The old mill stood by the river. " * 20_000])
    encoding.start()
    while encoding.is_alive():
        time.sleep(0.001)
        looks += 1
    assert looks > 5


def test_tokens_that_do_not_exist(nano):
    assert nano.decode([1 << 31, 5]) == nano.decode([5])
    stream = nano.stream()
    assert stream.add(8191 + 10_000) + stream.flush() == ""


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


@pytest.mark.parametrize("template, message", [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 5 seconds"),
    ("{{ 'a' * 10 ** 10 }}", "memory"),
    ("{{ '%9999999999d' % 1 }}", "memory"),
    ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}", "memory"),
    ("{% for i in range(99999) %}{{ 'abcdefghij' * 9999 }}{% endfor %}", "16 million characters"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "not valid Jinja"),
    ("{% include '/etc/hostname' %}", "no loader"), ("{{ raise_exception('a\\n' * 10000) }}", "failed: a a")])
def test_templates_are_bounded(tmp_path, template, message):
    """And the next conversation is not the worse for it."""
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer.render(HELLO)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    tokenizer._template = "{{ messages[0].content }}"
    assert tokenizer.render(HELLO) == "hello"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_a_template_that_breaks_out_finds_locked_doors(tmp_path):
    """What the sandbox may let through one day can still open nothing: here a filter that it should not have."""
    code = ("from edgeattn import templates, template_world as w\n"
            "make = w._environment\n"
            "def more():\n environment = make(); environment.filters['opened'] = lambda name: open(name).read(); return environment\n"
            "w._environment = more\ntemplates._serve()")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    _send(process.stdin, json.dumps({"template": "{{ '/etc/hostname' | opened }}", "variables": {}}).encode())
    answer = _receive(process.stdout)
    process.stdin.close()
    assert process.wait(60) == 0 and "error" in answer and "OSError" in answer["error"]
    process.stdout.close()


def test_template_processes_end_with_their_tokenizer(tmp_path):
    tokenizer = with_template(tmp_path, "x")
    tokenizer.render(HELLO)
    process = tokenizer._templates._process
    os.kill(process.pid, signal.SIGKILL)  # by whomever
    process.wait()
    assert tokenizer.render(HELLO) == "x"
    process = tokenizer._templates._process
    del tokenizer
    gc.collect()
    assert process.poll() is not None


def test_template_errors_are_clear(tmp_path, llama):
    with pytest.raises(ValueError, match="roles must alternate"):
        with_template(tmp_path, "{{ raise_exception('roles must alternate') }}").render(HELLO)
    with pytest.raises(ValueError, match="not valid Jinja"):
        with_template(tmp_path, "{% for %}").render(HELLO)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template.*edgeattn generate"):
        Tokenizer(tmp_path).render(HELLO)
