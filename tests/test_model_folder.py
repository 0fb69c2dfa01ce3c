"""A model's folder is somebody else's: it reaches nothing outside itself, runs no code, and what it says of its sizes is checked first."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeattn.exporters.checkpoint import Checkpoint
from edgeattn.folder import inside, read_json
from edgeattn.graph import read_graph
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.private import private
from edgeattn.runtime import Model, read_config
from edgeattn.scheduler import SparseOptions
from edgeattn.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
DENSE = dict(threads=1, ctx_size=64, sparse=SparseOptions("off"), prefill=PrefillOptions("off"))


@pytest.fixture
def export(tmp_path, nano_int4):
    """A copy of an export: files that are changed, the weights as they are."""
    for path in nano_int4.iterdir():
        if path.name == "model.onnx.data":
            os.link(path, tmp_path / path.name)
        else:
            shutil.copy(path, tmp_path / path.name)
    return tmp_path


def change(folder, edit):
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(proto.graph)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


def change_config(folder, edit):
    config = json.loads((folder / "edgeattn.json").read_text())
    edit(config)
    (folder / "edgeattn.json").write_text(json.dumps(config))


def named(graph, operator):
    return next(node for node in graph.node if node.op_type == operator)


# ---- outside the folder --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/b", "a\\b", "..", ".", "", "C:x", "a\0b", None, 3])
def test_names_of_other_places(tmp_path, name):
    with pytest.raises(ValueError, match="a file of the same folder"):
        inside(tmp_path, name)


def test_links(tmp_path):
    folder, secret = tmp_path / "model", tmp_path / "secret.json"
    folder.mkdir()
    secret.write_text("{}")
    (folder / "real.json").write_text("{}")
    (folder / "near.json").symlink_to("real.json")
    (folder / "far.json").symlink_to("../secret.json")
    (folder / "nowhere.json").symlink_to("/no/such/file")
    (tmp_path / "link").symlink_to(folder)
    assert read_json(inside(folder, "near.json")) == {} == read_json(inside(tmp_path / "link", "near.json"))
    for name in ("far.json", "nowhere.json"):
        with pytest.raises(ValueError, match="outside the model's folder"):
            inside(folder, name)


def test_links_of_a_hugging_face_cache(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (tmp_path / "models--a--b/refs").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "refs.json").symlink_to("../../refs")
    assert read_json(inside(snapshot, "config.json")) == {}
    with pytest.raises(ValueError, match="outside the model's folder"):
        inside(snapshot, "refs.json")


@pytest.mark.parametrize("name", ["edgeattn.json", "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json",
                                  "chat_template.jinja", "generation_config.json"])
def test_every_file_of_an_export_may_be_no_link_to_elsewhere(export, tmp_path_factory, name):
    other = tmp_path_factory.mktemp("other") / "file"
    (export / name).rename(other)
    (export / name).symlink_to(other)
    with pytest.raises(ValueError, match=f"{name}: is a link to .*outside the model's folder"):
        Tokenizer(export).encode_chat([{"role": "user", "content": "hi"}])
        Model(export, **DENSE)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "generation_config.json"])
def test_a_checkpoint_may_have_no_link_to_elsewhere(tmp_path, nano_checkpoint, name):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text((nano_checkpoint / "config.json").read_text())
    (folder / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(nano_checkpoint / name)
    with pytest.raises(ValueError, match=f"{name}: is a link"):
        Checkpoint(folder).copy_files(("generation_config.json",), tmp_path)


def test_files_that_a_config_names(export):
    change_config(export, lambda config: config["files"].update({"../../etc/hostname": "0" * 64}))
    with pytest.raises(ValueError, match="a file of the same folder"):
        read_config(export)


def tensor_elsewhere():
    tensor = TensorProto(name="t", data_type=TensorProto.UINT8, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    return tensor


@pytest.mark.parametrize("edit, message", [
    (lambda g: g.node.append(helper.make_node("Constant", [], ["t"], value=tensor_elsewhere())), "reads a tensor from another file"),
    (lambda g: g.initializer.append(tensor_elsewhere()), "a file of the same folder"),
    (lambda g: g.node.append(helper.make_node("If", ["token_ids"], ["t"], then_branch=helper.make_graph([], "g", [], []))),
     "holds a graph of its own"),
    (lambda g: g.node[5].output.__setitem__(0, "token_ids"), "made more than once"),
    (lambda g: g.initializer[0].dims.__setitem__(0, 1 << 60), "reshape|buffer"),
    (lambda g: g.initializer[-1].dims.__setitem__(0, -1), "weights are not"),
    (lambda g: g.initializer[-1].external_data[1].__setattr__("value", "-64"), "begins at byte -64")])
def test_graphs_that_do_more_than_compute(export, edit, message):
    change(export, edit)
    with pytest.raises(ValueError, match=f"(?s)^{re.escape(str(export))}.*({message})"):
        read_graph(export)


def test_names_that_are_no_text(export):
    """Found by fuzzing: protobuf gives them as bytes."""
    whole = (export / "model.onnx").read_bytes()
    (export / "model.onnx").write_bytes(whole.replace(b"embedding_nbits", b"embedding_nbit\xff"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_graph(export)


def test_functions_may_not_unfold(export):
    proto = onnx.load(export / "model.onnx", load_external_data=False)
    for i in range(40):
        body = [helper.make_node(f"f{i - 1}" if i else "Add", ["x", "x"] if not i else ["x"], [f"a{j}"], domain="d" if i else "")
                for j in range(2)]
        proto.functions.append(helper.make_function("d", f"f{i}", ["x"], ["a0"], body, [helper.make_opsetid("", 23)]))
    (export / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="a function calls another one"):
        read_graph(export)


# ---- sizes that lie ------------------------------------------------------------------------------------------------
def set_dims(graph, name, dims):
    """Gives an initializer other sizes, and as much of the data file."""
    tensor = next(t for t in graph.initializer if t.name == name)
    del tensor.dims[:]
    tensor.dims.extend(dims)


def split_sizes(graph, sizes):
    tensor = next(t for t in graph.initializer if t.name.endswith("split_sizes"))
    tensor.CopyFrom(numpy_helper.from_array(np.array(sizes), tensor.name))


@pytest.mark.parametrize("edit, message", [
    (lambda g: set_dims(g, "cos_table", [128, 32]), "positions"),                                    # fewer rows than ctx_size tells
    (lambda g: set_dims(g, "cos_table", [8192, 16]), "needs cos"),
    (lambda g: set_dims(g, "model.norm.weight", [256]), "needs weight"),
    (lambda g: set_dims(g, "model.embed_tokens.weight", [256, 16, 8, 16, 4]), "needs codes"),
    (lambda g: set_dims(g, "model.layers.0.mlp.down_proj.weight.scales", [1, 44, 16]), "needs scales"),
    (lambda g: split_sizes(g, [512, 128, 64]), "cannot|needs"),
    (lambda g: split_sizes(g, [1024, -128, -128]), "cannot|needs"),
    (lambda g: named(g, "cached_attention").attribute.add(name="num_heads", type=2, i=16), "num_heads"),
    (lambda g: named(g, "cached_attention").input.__setitem__(7, "token_ids"), "needs the input positions"),
    (lambda g: named(g, "embedding_nbits").input.__setitem__(0, "positions"), "needs the input token_ids"),
    (lambda g: named(g, "matmul_nbits").input.__setitem__(1, "layers.0.input_norm.out"), "needs codes"),
    (lambda g: g.node.remove(g.node[-1]), "no logits"),
    (lambda g: (g.input.remove(g.input[0]), g.node[3].output.append("token_ids")), "makes 'token_ids'"),
    (lambda g: (g.input.remove(g.input[0]), g.initializer.append(numpy_helper.from_array(np.full(5, 1 << 40), "token_ids"))),
     "makes 'token_ids'"),
    (lambda g: g.node[0].attribute.add(name="odd", ref_attr_name="q"), "attribute of no known kind"),
    (lambda g: g.node[-1].__setattr__("op_type", "sample"), "not an operator of exported graphs")])
def test_a_graph_is_what_kernels_expect(export, edit, message):
    change(export, edit)
    with pytest.raises(ValueError, match=message):
        Model(export, **DENSE)


@pytest.mark.parametrize("name, value", [("vocab_size", 8193), ("num_layers", 9), ("num_layers", 7), ("kv_heads", 4), ("head_dim", 128),
                                         ("ctx_size", 1 << 29), ("vocab_size", 1 << 40), ("num_heads", True), ("window", -1),
                                         ("num_layers", "8"), ("hidden_size", 512.0)])
def test_a_config_tells_the_graphs_sizes(export, name, value):
    change_config(export, lambda config: config["model"].update({name: value}))
    with pytest.raises(ValueError, match=str(export)):
        Model(export, **(DENSE | dict(ctx_size=None)))


def test_attributes_are_not_taken_for_addresses(export, nano_int4):
    """An attribute with the name of a kernel's argument would be that argument."""
    def edit(graph):
        for node in graph.node:
            if node.op_type in ("matmul_nbits", "RMSNormalization", "cached_attention"):
                node.attribute.extend(helper.make_attribute(name, 64) for name in ("out", "x.stride", "workspace", "batch.slots"))
    change(export, edit)
    ids = np.arange(20)
    a, b = (model.forward([(model.new_sequence(), ids)]) for model in (Model(export, **DENSE), Model(nano_int4, **DENSE)))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("text", ["[]", "1", "[" * 100_000, '{"a": ' * 100_000, "{", "\xff", '{"a": 1' + "0" * 5000 + "}"])
def test_json_that_is_no_object(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="^[^\n]*a.json: not "):
        read_json(tmp_path / "a.json")


def test_json_that_fills_memory(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="MiB"):
        read_json(tmp_path / "a.json")


# ---- code ----------------------------------------------------------------------------------------------------------
def test_nothing_is_unpickled():
    """Where a name of pickle stands in our source it is refused there, or is one of what follows."""
    allowed = {("__reduce__", "simd.py"), ("__getstate__", "tokenizer.py")}  # what Numba and the tokenizers library ask for
    for path in (p for folder in ("edgeattn", "apps", "exporters", "kernels_cpu", "kernels_cuda") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else \
                [node.attr] if isinstance(node, ast.Attribute) else [node.name] if isinstance(node, ast.FunctionDef) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                known = not re.search("pickle|marshal|shelve|joblib|dill|__reduce|__getstate|__setstate", name)
                assert known or (name, path.name) in allowed, f"{path}: {name}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                safe = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                whose = getattr(node.func.value, "id", "")
                assert whose not in ("np", "numpy") or safe.get("allow_pickle") is False, path
                assert whose != "torch" or safe.get("weights_only") is True, path


def test_modules_of_the_current_folder_are_not_imported(tmp_path, nano_checkpoint):
    """Not even by the processes that are started: in a folder of a model there may be some."""
    for name in ("json", "jinja2", "torch", "transformers", "psutil"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = ("from edgeattn.exporters.oracle import torch_logits; from edgeattn.tokenizer import Tokenizer; import numpy, pathlib\n"
            f"path = pathlib.Path({str(nano_checkpoint)!r}); print(torch_logits(path, numpy.arange(3)).shape)\n"
            "print(Tokenizer(path).render([{'role': 'user', 'content': 'hi'}]))")
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"})
    assert "(3, 8192)" in done.stdout and "user\nhi" in done.stdout, done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_compiled_kernels_are_the_users_own(tmp_path):
    folder = tmp_path / "cache/edgeattn/kernels"
    assert private(folder).stat().st_mode & 0o777 == 0o700
    folder.chmod(0o775)
    assert private(folder).stat().st_mode & 0o777 == 0o700  # a group's: mended
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(ValueError, match="chmod o-w"):
        private(folder)
    (tmp_path / "cache").chmod(0o1777)
    private(folder)
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="other users could write"):
        private(folder)
    folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(folder, 1234, 1234)
        with pytest.raises(ValueError, match="other users could write"):
            private(folder)
