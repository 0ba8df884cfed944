"""Exports a trained model to ONNX, for onnxruntime and machines without PyTorch.

    python3 export_onnx.py --ckptpath seq2seq-gru-model.pth.tar --out seq2seq-gru-model-onnx
    python3 translate.py --backend onnx --ckptpath seq2seq-gru-model-onnx < in.de > out.en

`nmt/onnx_engine.py` says what is in the folder, and decodes with it. Needs requirements-onnx.txt.

The graphs are built node by node, from the formulas of `gru.py` and `nmt/kernels.py`. There are about thirty nodes.
`torch.onnx.export` would need a second copy of the model without its own kernels, and more packages.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:  # with PYTHONSAFEPATH=1
    sys.path.insert(0, HERE)

from nmt import flags
from nmt.errors import exit_unless_installed, prepare_imports, run_main
from nmt.signals import end_imports_at_sigterm


@dataclass(frozen=True)
class Settings:
    """What an export can be told. `nmt.flags.row` says what a row holds."""

    # fmt: off
    ckptpath: str = flags.row("flags", "./seq2seq-gru-model.pth.tar", "FILE", "the model, as train_8p.py wrote it")
    out: str = flags.row("flags", "./seq2seq-gru-model-onnx", "FOLDER",
        "where the export goes: a folder that is not there yet, or is empty")
    int8: bool = flags.row("flags", False, None,
        "the decoder's products are in 8-bit integers: faster, and a few words in a hundred differ")
    debug: bool = flags.row("flags", False, None, "show the traceback of every error")
    # fmt: on


def build_parser() -> flags.StrictParser:
    return flags.parser_of(
        Settings,
        prog="export_onnx.py",
        usage="python3 export_onnx.py [--flag value]...",
        description="Exports a trained model to ONNX: encoder.onnx, decoder.onnx and model.json.",
    )


# `--help` needs no package and does not wait for one. A package that is missing is told in one line.
if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    sys.exit(run_main(lambda argv: build_parser().print_help(), []))
if __name__ == "__main__":
    end_imports_at_sigterm()
prepare_imports()
exit_unless_installed(["onnx", "onnxruntime"], "requirements-onnx.txt")

import gru
from nmt import checkpoint, onnx_engine
from nmt.errors import UserError
from nmt.kernels import GRU
from nmt.log import say
from nmt.text.vocabulary import SOS
from nmt.torch_engine import info_of
from scoring import restore

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

# onnxruntime has known these since 1.12, of 2022.
OPSET, IR_VERSION = 17, 8
# Processors without 8-bit dot products add two products in 16 bits: 255 * 63 * 2 fits, 255 * 127 * 2 does not.
INT8_LARGEST = 63
# The weights that the graphs know. Those of a changed gru.py may be others.
WEIGHTS = {"encoder.embedding.weight", "decoder.embedding.weight", "decoder.fc_out.weight", "decoder.fc_out.bias"} | {
    f"{side}.rnn.{weight}_l0"
    for side in ("encoder", "decoder")
    for weight in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
}
TOLERANCE = 1e-3  # between PyTorch's numbers and those of the graphs, as a part of the largest
LARGEST = 2_000_000_000  # bytes of a file's weights: protobuf ends at 2 GiB


def main(argv: list[str]) -> None:
    """Reads a checkpoint and writes an export."""
    settings = Settings(**vars(build_parser().parse_args(argv)))
    out = Path(os.path.realpath(settings.out))  # a link stays, and the folder that it leads to is written
    onnx_engine.check_place(out)  # told before the model is read
    saved = checkpoint.load(settings.ckptpath)
    model = restore(saved, settings.ckptpath)
    if saved.src_vocab is None:
        what = "a model of the original, which holds no vocabulary: nobody could translate with its export"
        todo = "export a model that train_8p.py of this repository has trained"
        raise UserError("checkpoint", what, settings.ckptpath, todo)
    export(saved, model, out, int8=settings.int8)
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in sorted(out.iterdir()))
    say(f"exported: {settings.out} ({sizes})")
    say(f"to translate: python3 translate.py --backend onnx --ckptpath {settings.out}")


def export(saved: checkpoint.Checkpoint, model: gru.Seq2Seq, out: Path, int8: bool = False) -> None:
    """Writes the model of a checkpoint into the folder `out`, which is not there yet or empty.

    Raises:
        UserError: io. Or usage, the graphs are not those of this gru.py, or the model is too large for the format.
    """
    check_weights(model)
    parts = {"encoder.onnx": encoder_graph(model), "decoder.onnx": decoder_graph(model, int8)}
    for name, graph in parts.items():
        if (size := graph.size()) > LARGEST:
            what = f"{name} would have {size / 1e9:.1f} GB, and ONNX files end at 2"
            raise UserError("usage", what, "the model", "train a smaller one, by --hid-dim, --emb-dim or --min-freq")
    check_formulas(model, {"decoder.onnx": decoder_graph(model)} if int8 else {}, parts)
    info = info_of(saved)
    about = info.about | {"export": "int8" if int8 else "float32"}
    info = replace(info, flags=checkpoint.portable(info.flags), about=about)  # a file of an earlier version has more
    onnx_engine.write(out, info, {name: graph.serialised() for name, graph in parts.items()})


def check_weights(model: gru.Seq2Seq) -> None:
    """Raises a usage UserError if the model has other parts than the graphs. Someone may have edited gru.py."""
    others = sorted(model.state_dict().keys() ^ WEIGHTS)
    kinds = {type(rnn) for rnn in (model.encoder.rnn, model.decoder.rnn)} - {GRU}
    if others or kinds:
        raise of_another_model(others[0] if others else kinds.pop().__name__)


def check_formulas(model: gru.Seq2Seq, exact: dict[str, Graph], parts: dict[str, Graph]) -> None:
    """Compares the graphs with the model, on sentences of random words.

    Args:
        model: in evaluation mode.
        exact: name → the graph in float32, of those whose products are in integers.
        parts: the graphs of the export.

    Raises:
        UserError: usage, they compute something else.
    """
    encoder, decoder = (
        onnxruntime.InferenceSession((parts | exact)[name].serialised(), providers=["CPUExecutionProvider"])
        for name in ("encoder.onnx", "decoder.onnx")
    )
    draws = torch.Generator().manual_seed(0)
    src_len = torch.tensor([7, 5, 4, 3])
    src = torch.randint(model.encoder.embedding.num_embeddings, (7, 4), generator=draws)
    prev_token = torch.full((4,), min(SOS, model.decoder.embedding.num_embeddings - 1))
    with torch.no_grad():
        memory, hidden = model.start(src, src_len)
        logits, next_hidden = model.step(prev_token, hidden, memory)
    given = {"src": src.numpy(), "src_len": src_len.int().numpy()}
    first, gates, context_logits = encoder.run(["hidden", "context_gates", "context_logits"], given)
    given = {"prev_token": prev_token.numpy(), "hidden": first, "context_gates": gates}
    given |= {"context_logits": context_logits, "sentence": np.arange(4), "k": np.array([1])}
    found = first, *decoder.run(["next_hidden", "logits"], given)
    wanted = {"hidden": hidden, "next_hidden": next_hidden, "logits": logits}
    for (name, theirs), ours in zip(wanted.items(), found, strict=True):
        expected = theirs.numpy()
        if ours.shape != expected.shape or not np.abs(ours - expected).max() <= TOLERANCE * np.abs(expected).max():
            raise of_another_model(f"the formula of {name}")


def of_another_model(what: str) -> UserError:
    todo = "use the gru.py of this repository, or change encoder_graph and decoder_graph in export_onnx.py too"
    return UserError("usage", f"gru.py computes another model than the export: {what}", "gru.py", todo)


# ---------------------------------------------------------------- the two graphs


class Graph:
    """A graph in the making, node by node.

    Args:
        name: of the graph.
        inputs, outputs: name → type and shape. A dimension is a name or a number.
    """

    def __init__(self, name: str, inputs: dict[str, tuple], outputs: dict[str, tuple]):
        self._name = name
        self._inputs, self._outputs = (
            [helper.make_tensor_value_info(value, *about) for value, about in values.items()]
            for values in (inputs, outputs)
        )
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, np.ndarray] = {}
        self._quantised: set[str] = set()

    def add(self, operator: str, *inputs: str, out: str | list[str] = "", **attributes) -> str:
        """Adds a node.

        Args:
            operator: of ONNX.
            inputs: names of values and weights.
            out: names of the outputs. Left out, the node makes a name for its only one.
            attributes: of the operator.

        Returns:
            The name of the first output.
        """
        outputs = [out or f"value_{len(self._nodes)}"] if isinstance(out, str) else out
        self._nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs[0]

    def weight(self, name: str, values: Tensor | np.ndarray | list[int]) -> str:
        """Adds a constant. Returns its name."""
        self._weights[name] = np.ascontiguousarray(values.detach() if isinstance(values, Tensor) else values)
        return name

    def product(self, x: str, weight: Tensor, addend: str, *, name: str, out: str = "", int8: bool = False) -> str:
        """Adds x W' + addend, for x [rows, inputs], W [outputs, inputs] and an addend [rows, outputs] or [outputs].

        In 8-bit integers x is s * (q - zero), with one s and one zero for all of it, found when the graph runs. W is
        s * q with an s for each output.

        Args:
            x: name of a value.
            weight: W.
            addend: name of a value or a weight.
            name: the weight's.
            out: name of the sum.
            int8: whether the product is in 8-bit integers.
        """
        if not int8:
            return self.add("Gemm", x, self.weight(name, weight), addend, out=out, transB=1)
        values = weight.detach().numpy()
        scales = np.abs(values).max(axis=1, initial=1e-30) / np.float32(INT8_LARGEST)  # [outputs]
        integers = np.rint(values / scales[:, None]).astype(np.int8).T
        quantised, scale, zero = (f"{x}_{part}" for part in ("int8", "scale", "zero"))
        if quantised not in self._quantised:
            self.add("DynamicQuantizeLinear", x, out=[quantised, scale, zero])
            self._quantised.add(quantised)
        sums = self.add("MatMulInteger", quantised, self.weight(name, integers), zero)
        sums = self.add("Cast", sums, to=TensorProto.FLOAT)
        scale = self.add("Mul", scale, self.weight(f"{name}_scales", scales))
        return self.add("Add", self.add("Mul", sums, scale), addend, out=out)

    def size(self) -> int:
        """Bytes of the weights."""
        return sum(values.nbytes for values in self._weights.values())

    def serialised(self) -> bytes:
        """The content of an .onnx file, after ONNX's own checker has passed it."""
        weights = [numpy_helper.from_array(values, name) for name, values in self._weights.items()]
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, weights)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="gru-for-pytorch")
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()


def encoder_graph(model: gru.Seq2Seq) -> Graph:
    """The source's context, and the parts of the decoder's sums that do not change from step to step.

    As `gru.Seq2Seq.start`. A sentence ends at its own length, whatever stands behind.
    """
    encoder, decoder, fc_out = model.encoder, model.decoder, model.decoder.fc_out
    size, outputs = decoder.rnn.hidden_size, fc_out.out_features
    graph = Graph(
        "encoder",
        {"src": (TensorProto.INT64, ["src_len_max", "sentences"]), "src_len": (TensorProto.INT32, ["sentences"])},
        {
            "hidden": (TensorProto.FLOAT, ["sentences", size]),
            "context_gates": (TensorProto.FLOAT, ["sentences", 3 * size]),
            "context_logits": (TensorProto.FLOAT, ["sentences", outputs]),
        },
    )
    rnn = encoder.rnn
    biases = np.concatenate([gates_zrn(rnn.bias_ih_l0), gates_zrn(rnn.bias_hh_l0)])
    graph.add("Gather", graph.weight("embedding", encoder.embedding.weight), "src", out="embedded")
    graph.add(
        "GRU",
        "embedded",
        graph.weight("weight_ih", gates_zrn(rnn.weight_ih_l0)[None]),
        graph.weight("weight_hh", gates_zrn(rnn.weight_hh_l0)[None]),
        graph.weight("biases", biases[None]),
        "src_len",
        out=["", "last"],  # [1, sentences, hid dim]
        hidden_size=size,
        linear_before_reset=1,  # as PyTorch: n = tanh(W x + b + r * (W h + b))
    )
    graph.add("Squeeze", "last", graph.weight("direction", [0]), out="hidden")
    # As `nmt.kernels.GRU.context_gates`: the new gate's hidden bias is multiplied by r, so the decoder adds it.
    gate_bias = decoder.rnn.bias_ih_l0.detach().clone()
    gate_bias[: 2 * size] += decoder.rnn.bias_hh_l0.detach()[: 2 * size]
    gate_weight, logit_weight = decoder.rnn.weight_ih_l0[:, -size:], fc_out.weight[:, -size:]
    gate_addend, logit_addend = graph.weight("gate_bias", gate_bias), graph.weight("logit_bias", fc_out.bias)
    graph.product("hidden", gate_weight, gate_addend, name="gate_weight", out="context_gates")
    graph.product("hidden", logit_weight, logit_addend, name="logit_weight", out="context_logits")
    return graph


def decoder_graph(model: gru.Seq2Seq, int8: bool = False) -> Graph:
    """One step, as `gru.Seq2Seq.step`, and what a search reads of its logits. The GRU's formulas are `GRUSteps`'.

    Args:
        model: in evaluation mode.
        int8: whether its three products are in 8-bit integers.
    """
    decoder, fc_out = model.decoder, model.decoder.fc_out
    rnn, size, outputs = decoder.rnn, decoder.rnn.hidden_size, fc_out.out_features
    graph = Graph(
        "decoder",
        {
            "prev_token": (TensorProto.INT64, ["rows"]),
            "hidden": (TensorProto.FLOAT, ["rows", size]),
            "sentence": (TensorProto.INT64, ["rows"]),
            "context_gates": (TensorProto.FLOAT, ["sentences", 3 * size]),
            "context_logits": (TensorProto.FLOAT, ["sentences", outputs]),
            "k": (TensorProto.INT64, [1]),
        },
        {
            "next_hidden": (TensorProto.FLOAT, ["rows", size]),
            "logits": (TensorProto.FLOAT, ["rows", outputs]),
            "log_sum": (TensorProto.FLOAT, ["rows"]),
            "top_logits": (TensorProto.FLOAT, ["rows", "k"]),
            "top_tokens": (TensorProto.INT64, ["rows", "k"]),
        },
    )
    add, weight = graph.add, graph.weight
    embedded = add("Gather", weight("embedding", decoder.embedding.weight), "prev_token", out="embedded")
    of_sentence = add("Gather", "context_gates", "sentence")
    x = graph.product(embedded, rnn.weight_ih_l0[:, :-size], of_sentence, name="weight_ih", int8=int8)
    hidden_bias = np.concatenate([np.zeros(2 * size, np.float32), rnn.bias_hh_l0.detach()[2 * size :]])
    h = graph.product("hidden", rnn.weight_hh_l0, weight("bias_hn", hidden_bias), name="weight_hh", int8=int8)
    parts = weight("parts", [2 * size, size])
    add("Split", x, parts, out=["x_rz", "x_n"], axis=1)
    add("Split", h, parts, out=["h_rz", "g"], axis=1)
    rz = add("Sigmoid", add("Add", "x_rz", "h_rz"))
    add("Split", rz, weight("halves", [size, size]), out=["r", "z"], axis=1)
    n = add("Tanh", add("Add", "x_n", add("Mul", "r", "g")), out="n")
    kept = add("Mul", "z", add("Sub", "hidden", n))
    add("Add", n, kept, out="next_hidden")  # (1 - z) * n + z * h

    features = add("Concat", embedded, "next_hidden", axis=1)
    of_sentence = add("Gather", "context_logits", "sentence")
    graph.product(features, fc_out.weight[:, :-size], of_sentence, name="logit_weight", out="logits", int8=int8)
    add("TopK", "logits", "k", out=["top_logits", "top_tokens"], axis=1)
    # The largest log probability is the largest logit less the logarithm of the sum. ReduceLogSumExp is far slower.
    log_prob = add("ReduceMax", add("LogSoftmax", "logits", axis=1), axes=[1], keepdims=0)
    add("Sub", add("ReduceMax", "top_logits", axes=[1], keepdims=0), log_prob, out="log_sum")
    return graph


def gates_zrn(stacked: Tensor) -> np.ndarray:
    """The gates of a PyTorch GRU, stacked r, z, n, in ONNX's order z, r, n."""
    r, z, n = stacked.detach().numpy().reshape(3, -1, *stacked.shape[1:])
    return np.concatenate([z, r, n])


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
