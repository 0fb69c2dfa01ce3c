"""Flags with several values: the settings that they make, and what a result says of its own."""
import pytest

from edgeattn.apps import axes, record
from edgeattn.apps.cli import Parser


def parse(*line):
    parser = Parser("edgeattn")
    axes.add_model(parser)
    return parser.parse_args(line)


def test_without_axes_there_is_one_setting():
    (label, args), = axes.expand(parse("-c", "512", "--kv-bits", "8"))
    assert label == "" and (args.ctx_size, args.kv_bits, args.sparse_attention, args.kv_window) == (512, 8, "auto", 64)
    assert axes.setting(args) == "-c 512 --kv-bits 8" and axes.setting(axes.expand(parse())[0][1]) == ""


def test_the_product_of_axes():
    found = axes.expand(parse("-m", "a b", "-ctk", "f16,int4", "-c", "512", "--sparse-attention", "off,auto", "--kv-budget", "2M"))
    assert found[0][0] == "-ctk f16 --sparse-attention off" and len({label for label, _ in found}) == 4
    assert sorted((args.cache_type_k, args.sparse_attention) for _, args in found) == [
        ("f16", "auto"), ("f16", "off"), ("int4", "auto"), ("int4", "off")]
    assert {(args.model, args.ctx_size, args.kv_budget) for _, args in found} == {("a b", 512, 2 << 20)}
    for label, args in found:
        again, = axes.expand(parse(*axes.arguments(args)))
        assert axes.setting(again[1]) == axes.setting(args) and "a b" not in axes.setting(args)
        assert {name: value for name, value in vars(again[1]).items() if name not in ("axes", "given")} == {
            name: value for name, value in vars(args).items() if name not in ("axes", "given")}


def test_a_path_with_a_comma_is_one_model(tmp_path):
    folder = tmp_path / "a,b"
    folder.mkdir()
    assert [args.model for _, args in axes.expand(parse("-m", str(folder)))] == [str(folder)]
    assert [label for label, _ in axes.expand(parse("-m", "x,y"))] == ["-m x", "-m y"]


@pytest.mark.parametrize("line, message", [
    (["-ctk", "f16,q3"], "invalid choice: 'q3' (choose from f32, f16"),
    (["-c", "512,many"], "must be a whole number of at least 0, got 'many'"),
    (["--kv-bits", "4,4"], "names a value twice: '4,4'"),
    (["--delta-threshold", "x"], "invalid float value: 'x'")])
def test_mistakes(capsys, line, message):
    with pytest.raises(SystemExit):
        parse(*line)
    assert message in capsys.readouterr().err


def test_settings_that_contradict_themselves_are_found_before_anything_runs():
    (_, good), (label, bad) = axes.expand(parse("-ctk", "f16,f32", "-ctv", "f16"))
    axes.check(good)
    with pytest.raises(ValueError, match="f32 is for both"):
        axes.check(bad)
    assert label == "-ctk f32"


def test_names_of_models():
    assert record.model_name({"source": {"folder": "nano", "name": ""}, "precision": "int4"}) == "nano int4"
    assert record.model_name({"precision": "int4"}) == "unknown int4"


def test_the_machine_in_words():
    text = record.machine()
    assert "cores" in text and "GiB" in text and "\n" not in text
