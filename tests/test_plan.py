"""The plan: buffers never overlap while alive, views alias, unknown nodes run in onnxruntime between native steps."""
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeattn.batch import COUNTS
from edgeattn.graph import read_graph
from edgeattn.plan import Plan
from edgeattn.segments import Segment

MAX = {"tokens": 9, "rows": 4, "sequences": 2}


def planned(tmp_path, nodes, output, width=8, initializers=(), inputs=("x",), value_info=()):
    """A Plan of a graph over inputs [tokens, width], and those inputs' fixed memory."""
    def info(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ("tokens", width))
    graph = helper.make_graph(nodes, "test", [info(name) for name in inputs],
                              [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
                              [numpy_helper.from_array(array, name) for name, array in initializers], value_info=list(value_info))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("edgeattn", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), tmp_path / "model.onnx")
    memory = {name: np.zeros((MAX["tokens"], width), np.float32) for name in inputs}
    return Plan(read_graph(tmp_path), lambda layer: [], {}, lambda layer: {}, memory, MAX, threads=1), memory


def run(plan, memory, values, output):
    count = len(next(iter(values.values())))
    for name, value in values.items():
        memory[name][:count] = value
    state = np.array([count, 0, 0], np.int64)
    assert COUNTS[0] == "tokens"
    plan.run(state)
    return plan.view(output, state).copy()


def test_unknown_node_runs_in_onnxruntime(tmp_path):
    nodes = [helper.make_node("Add", ["x", "x"], ["twice"]), helper.make_node("Tanh", ["twice"], ["bent"]),
             helper.make_node("Neg", ["bent"], ["negative"]), helper.make_node("Add", ["negative", "twice"], ["out"])]
    plan, memory = planned(tmp_path, nodes, "out")
    assert [type(item) is Segment for item in plan.items] == [False, True, False]
    for tokens in (1, 9, 3):
        x = np.random.default_rng().standard_normal((tokens, 8), np.float32)
        np.testing.assert_allclose(run(plan, memory, {"x": x}, "out"), 2 * x - np.tanh(2 * x), atol=1e-6)


def test_segment_reading_an_initializer(tmp_path):
    weight = np.random.default_rng().standard_normal((8, 5)).astype(np.float32)
    nodes = [helper.make_node("Add", ["x", "x"], ["twice"]), helper.make_node("MatMul", ["twice", "weight"], ["out"])]
    plan, memory = planned(tmp_path, nodes, "out", initializers=[("weight", weight)])
    x = np.random.default_rng().standard_normal((3, 8), np.float32)
    np.testing.assert_allclose(run(plan, memory, {"x": x}, "out"), 2 * x @ weight, atol=1e-5)


@pytest.mark.parametrize("order, axis, native", [([7, 0, 0, 3], 1, True), (np.arange(8)[::-1], -1, True), ([[1, 0]], 1, False)])
def test_columns_in_another_order(tmp_path, order, axis, native):
    order = np.array(order, np.int64)
    nodes = [helper.make_node("Gather", ["x", "order"], ["out"], axis=axis)]
    plan, memory = planned(tmp_path, nodes, "out", initializers=[("order", order)])
    assert [step.operator for step in plan.steps] == ["gather_columns"] * native
    for tokens in (1, 9):
        x = np.random.default_rng().standard_normal((tokens, 8), np.float32)
        np.testing.assert_array_equal(run(plan, memory, {"x": x}, "out"), x[:, order])


@pytest.mark.parametrize("order", [[0, 8], [-1, 3], []])
def test_columns_that_there_are_not_are_refused(tmp_path, order):
    with pytest.raises(ValueError, match="columns from 0 to 7"):
        planned(tmp_path, [helper.make_node("Gather", ["x", "order"], ["out"], axis=1)], "out",
                initializers=[("order", np.array(order, np.int64))])


def test_split_and_reshape_are_views(tmp_path):
    parts, shape = np.array([6, 2], np.int64), np.array([0, 3, 2], np.int64)
    nodes = [helper.make_node("Add", ["x", "x"], ["twice"]), helper.make_node("Split", ["twice", "parts"], ["a", "b"], axis=1),
             helper.make_node("Reshape", ["a", "shape"], ["out"])]
    plan, memory = planned(tmp_path, nodes, "out", initializers=[("parts", parts), ("shape", shape)])
    assert len(plan.steps) == 1
    x = np.random.default_rng().standard_normal((4, 8), np.float32)
    np.testing.assert_array_equal(run(plan, memory, {"x": x}, "out"), 2 * x[:, :6].reshape(4, 3, 2))


@pytest.mark.parametrize("seed", range(5))
def test_buffers_are_reused_but_never_while_alive(tmp_path, seed):
    rng = np.random.default_rng(seed)
    names, nodes = ["x"], []
    for i in range(40):
        nodes.append(helper.make_node("Add", [str(rng.choice(names[-12:])) for _ in range(2)], [f"v{i}"]))
        names.append(f"v{i}")
    plan, memory = planned(tmp_path, nodes, "v39")
    assert plan.arena.nbytes < 30 * MAX["tokens"] * 8 * 4
    x = rng.standard_normal((9, 8)).astype(np.float32)
    values = {"x": x}
    for node in nodes:
        values[node.output[0]] = values[node.input[0]] + values[node.input[1]]
    np.testing.assert_array_equal(run(plan, memory, {"x": x}, "v39"), values["v39"])


def test_missing_and_truncated_weights_are_named(tmp_path):
    tensor = numpy_helper.from_array(np.zeros((64, 64), np.float32), "big")
    graph = helper.make_graph([], "test", [], [], [tensor])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    read_graph(tmp_path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ValueError, match="big"):
        read_graph(tmp_path)
    data.unlink()
    with pytest.raises(ValueError, match="model.onnx.data"):
        read_graph(tmp_path)
    with pytest.raises(ValueError, match="edgeattn export"):
        read_graph(tmp_path / "nowhere")


def test_config_of_a_newer_version_is_refused(tmp_path):
    from edgeattn.runtime import read_config
    (tmp_path / "edgeattn.json").write_text(json.dumps({"format_version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        read_config(tmp_path)


def test_nodes_that_only_look_native_run_in_onnxruntime(tmp_path):
    """Split by a number of parts, Reshape that moves rows, Add that broadcasts: not ours."""
    row = np.random.default_rng().standard_normal(8).astype(np.float32)
    nodes = [helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2),
             helper.make_node("Concat", ["b", "a"], ["swapped"], axis=1),
             helper.make_node("Add", ["swapped", "row"], ["moved"]), helper.make_node("Reshape", ["moved", "shape"], ["flat"]),
             helper.make_node("Reshape", ["flat", "back"], ["again"]), helper.make_node("Add", ["again", "x"], ["out"])]
    shapes = [("shape", np.array([-1, 4], np.int64)), ("back", np.array([-1, 8], np.int64))]
    known = [helper.make_tensor_value_info("again", TensorProto.FLOAT, ("tokens", 8))]  # onnx cannot tell: -1 stands for the rows
    plan, memory = planned(tmp_path, nodes, "out", initializers=[("row", row), *shapes], value_info=known)
    assert [step.operator for step in plan.steps] == ["add"]
    x = np.random.default_rng().standard_normal((5, 8), np.float32)
    expected = np.concatenate([x[:, 4:], x[:, :4]], axis=1) + row + x
    np.testing.assert_allclose(run(plan, memory, {"x": x}, "out"), expected, atol=1e-6)
