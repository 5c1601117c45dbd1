"""Nodes that a graph does not need: transpositions that cancel each other."""

import onnx


def cancel_transpositions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph without each transposition that undoes the one before it.

    Two norms over channels in a row have such a pair between them: where a stage begins, or is empty. The
    first of a pair stays if another node reads it. (onnxscript's rule for pairs leaves all of those.)
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    outputs = {output.name for output in graph.output}
    transpositions: dict[str, onnx.NodeProto] = {}
    same: dict[str, str] = {}  # output of a removed node -> the tensor that it is
    kept = []
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Transpose":
            before = transpositions.get(node.input[0])
            if before is not None and node.output[0] not in outputs and _cancel(before, node):
                same[node.output[0]] = before.input[0]
                continue
            transpositions[node.output[0]] = node
        kept.append(node)
    read = outputs.union(*(node.input for node in kept))
    kept = [node for node in kept if node.op_type != "Transpose" or node.output[0] in read]
    written = {name for node in kept for name in node.output}
    described = [info for info in graph.value_info if info.name in written]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.value_info.extend(described)
    return changed


def _cancel(first: onnx.NodeProto, second: onnx.NodeProto) -> bool:
    before, after = (_order(node) for node in (first, second))
    if before is None or after is None:  # dimensions reversed
        return before is after
    return [before[place] for place in after] == list(range(len(before)))


def _order(node: onnx.NodeProto) -> list[int] | None:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
