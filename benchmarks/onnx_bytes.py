"""How many bytes of weights one decoded token reads from an ONNX file."""
import math
from pathlib import Path

BITS = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}  # TensorProto.DataType -> bits of one element
ROW_ONLY = {"Gather", "GatherBlockQuantized", "embedding", "embedding_nbits"}  # read one row, not the table
POSITION_ONLY = {"cos_table", "sin_table", "cos_cache", "sin_cache"}


def bytes_per_token(path: Path) -> int:
    """Bytes of every initializer that some operator reads whole."""
    import onnx
    graph = onnx.load(path, load_external_data=False).graph
    whole = {name for node in graph.node if node.op_type not in ROW_ONLY for name in node.input}
    return sum(math.prod(tensor.dims) * BITS[tensor.data_type] // 8 for tensor in graph.initializer
               if tensor.name in whole and tensor.name not in POSITION_ONLY)
