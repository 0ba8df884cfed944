"""The model: one GRU encoder-decoder whose decoder reads the source's context vector at every step.

    context  = h_enc(last)                        # also the decoder's first hidden state
    e_t      = dropout(E_trg[y_{t-1}])            # y_0 = <sos>, then the reference or the argmax
    h_t      = GRU([e_t ; context], h_{t-1})
    logits_t = W_o [e_t ; h_t ; context] + b_o

Source: Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", arXiv 1406.1078, in the form of
Ben Trevett's pytorch-seq2seq tutorial 2 and of farizrahman4u/seq2seq's `peek=True`.

Tensors are time-first: token ids are [length, batch], vectors [length, batch, features]. A training batch has no
padding. Its sentences stand longest first, and its steps one after the other, [rows, features]. The first sentences of
a step are those that still go on, so a step never has more rows than the one before:

    sentences: a a a      rows: a b c | a b | a
               b b        rows_per_step = [3, 2, 1]
               c

`nmt/kernels.py` holds the GRU over such rows, the output layer's loss and dropout.

The decoder's steps do not depend on its predictions while it reads the reference. Such a segment of steps is one GRU
call, and the output layer is applied to all steps at once. Within a segment it is applied only where the argmax is read
next.

`test/unit/plain_model.py` holds the plain loop, step by step from the formulas above, that all of this must equal.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, NamedTuple

from nmt.kernels import GRU, Dropout, accumulate_dtype, output_loss, step_rows
from nmt.products import Weight, linear, prefers_dense

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from data import Batch


class Encoder(nn.Module):
    """Reads the source. Its last hidden state is the context.

    Args:
        input_dim: source vocabulary size.
        emb_dim: size of the embeddings.
        hid_dim: size of the hidden state.
        dropout: dropout probability on the embeddings.
    """

    def __init__(self, input_dim: int, emb_dim: int, hid_dim: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(input_dim, emb_dim)
        self.rnn = GRU(emb_dim, hid_dim)
        self.dropout = Dropout(dropout)

    def forward(self, src: Tensor, src_len: Tensor | None = None) -> Tensor:
        """Encodes a padded batch.

        Args:
            src: [src len, batch] token ids.
            src_len: [batch] number of tokens of each sentence, `<sos>` and `<eos>` counted. Without it every
                position is read, padding too.

        Returns:
            [1, batch, hid dim] the context.
        """
        steps, batch = src.shape
        columns = torch.arange(batch, device=src.device)
        last_steps = steps - 1 if src_len is None else src_len - 1
        return self.encode_rows(src.flatten(), [batch] * steps, last_steps * batch + columns).unsqueeze(0)

    def encode_rows(self, tokens: Tensor, rows_per_step: list[int], last: Tensor) -> Tensor:
        """Encodes a batch whose steps stand one after the other.

        Args:
            tokens: [rows] token ids.
            rows_per_step: the steps' numbers of rows.
            last: [batch] the row of each sentence's last token. The GRU runs one way, so the state there does not
                depend on what follows. A packed sequence would give the same, but NPUs have none.

        Returns:
            [batch, hid dim] the context, in the order of `last`.
        """
        embedded = self.dropout(self.embedding(tokens))  # [rows, emb dim]
        context_gates = self.rnn.context_gates(rows_per_step[0])  # no context: the biases alone
        outputs, _ = self.rnn.run(embedded, rows_per_step, None, context_gates)  # [rows, hid dim]
        return outputs.index_select(0, last)


class Decoder(nn.Module):
    """Predicts the next target token from the previous one, the hidden state and the context.

    Args:
        output_dim: target vocabulary size.
        emb_dim: size of the embeddings.
        hid_dim: size of the hidden state and of the context.
        dropout: dropout probability on the embeddings.
        output_dropout: dropout probability on [e_t ; h_t] in front of the output layer. The context is left whole.
    """

    def __init__(self, output_dim: int, emb_dim: int, hid_dim: int, dropout: float, output_dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(output_dim, emb_dim)
        self.rnn = GRU(emb_dim + hid_dim, hid_dim)
        self.fc_out = nn.Linear(emb_dim + 2 * hid_dim, output_dim)
        self.dropout = Dropout(dropout)
        self.output_dropout = Dropout(output_dropout)

    def forward(self, prev_token: Tensor, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            prev_token: [batch] token ids.
            hidden: [1, batch, hid dim].
            context: [1, batch, hid dim].

        Returns:
            logits [batch, output dim] and hidden [1, batch, hid dim].
        """
        context_gates = self.rnn.context_gates(len(prev_token), context[0])
        features, hidden = self.decode_rows(prev_token, [len(prev_token)], hidden[0], context_gates)
        return self.logits(features, context[0]), hidden.unsqueeze(0)

    def decode_rows(
        self, tokens: Tensor, rows_per_step: list[int], hidden: Tensor, context_gates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reads some steps whose tokens are all known, in one GRU call.

        Args:
            tokens: [rows] token ids, step by step.
            rows_per_step: the steps' numbers of rows.
            hidden: [rows_per_step[0], hid dim] the hidden state before the first of them.
            context_gates: [at least rows_per_step[0], ...] from `rnn.context_gates`.

        Returns:
            features [rows, emb dim + hid dim], which is [e_t ; h_t] after dropout, and
            hidden [rows_per_step[-1], hid dim] after the last step.
        """
        embedded = self.dropout(self.embedding(tokens))  # [rows, emb dim]
        outputs, last = self.rnn.run(embedded, rows_per_step, hidden, context_gates)  # [rows, hid dim]
        return self.output_dropout(torch.cat((embedded, outputs), dim=1)), last

    def logits(self, features: Tensor, context: Tensor) -> Tensor:
        """Applies the output layer: W_o [e_t ; h_t ; context] + b_o.

        Args:
            features: [..., emb dim + hid dim] from `decode_rows`.
            context: [..., hid dim], one for each row of `features`.

        Returns:
            [..., output dim] logits.
        """
        return self.fc_out(torch.cat((features, context), dim=-1))

    def context_logits(self, context: Tensor) -> Tensor:
        """The context's part of the logits, and the bias: [batch, output dim] for a context of [batch, hid dim]."""
        return F.linear(context, self.fc_out.weight[:, -context.shape[1] :], self.fc_out.bias)

    def own_weight(self) -> Tensor:
        """The columns of W_o for [e_t ; h_t], for `sum_logits`: [output dim, emb dim + hid dim]."""
        weight = self.fc_out.weight[:, : -self.rnn.hidden_size]
        return weight.contiguous() if prefers_dense(weight) else weight

    def sum_logits(self, features: Tensor, context_logits: Tensor, own_weight: Tensor) -> Tensor:
        """The same as `logits`, where the context's part is at hand.

        Args:
            features: [rows, emb dim + hid dim] from `decode_rows`. A sentence's rows stand together, equally many each.
            context_logits: [sentences, output dim] from `context_logits`.
            own_weight: from `own_weight`.

        Returns:
            [rows, output dim] logits.
        """
        logits = linear(features, own_weight)
        by_sentence = logits.view(len(context_logits), -1, logits.shape[1])  # [sentences, rows of one, output dim]
        by_sentence += context_logits.unsqueeze(1)
        return logits

    def most_probable(self, features: Tensor, context_logits: Tensor, own_weight: Tensor) -> Tensor:
        """The most probable tokens: [rows] ids, of the logits that `sum_logits` gives."""
        return self.sum_logits(features, context_logits, own_weight).argmax(dim=1)


class Memory(NamedTuple):
    """Decoding keeps this of the source sentences. It does not change from step to step.

    Attributes:
        context_gates: [sentences, ...] from the decoder's `rnn.context_gates`.
        context_logits: [sentences, words] the context's part of the logits, in float32 or finer.
        own_weight: the columns of W_o for [e_t ; h_t], the same for all sentences.
        decoding: makes the steps.
    """

    context_gates: Tensor
    context_logits: Tensor
    own_weight: Weight
    decoding: Decoding

    def select(self, rows: Tensor) -> Memory:
        """The memory of these sentences: [selected] int64 row numbers."""
        return self._replace(
            context_gates=self.context_gates.index_select(0, rows),
            context_logits=self.context_logits.index_select(0, rows),
        )


class Decoding:
    """A model's calls of decoding, see `nmt/search.py`. The output layer is laid out for them once.

    Args:
        model: in evaluation mode. Its output layer must not change afterwards.
    """

    @torch.no_grad()
    def __init__(self, model: Seq2Seq):
        self._encoder, self._decoder = model.encoder, model.decoder
        fc_out, hid_dim = model.decoder.fc_out, model.decoder.rnn.hidden_size
        self._exact = accumulate_dtype(fc_out.weight.dtype)
        self._own_weight = Weight(fc_out.weight[:, :-hid_dim])
        self._context_weight = Weight(fc_out.weight[:, -hid_dim:])
        self._bias = fc_out.bias.to(self._exact)

    @torch.no_grad()
    def start(self, src: Tensor, src_len: Tensor, words: Tensor | None = None) -> tuple[Memory, Tensor]:
        """Begins to decode.

        Args:
            src: [src len, batch] token ids.
            src_len: [batch] lengths of the sources.
            words: [words] int64 target ids. Logits are computed for them alone. None: for the whole vocabulary.

        Returns:
            memory of the batch's sentences, and hidden [batch, hid dim].
        """
        context = self._encoder(src, src_len)[0]  # [batch, hid dim]
        context_gates = self._decoder.rnn.context_gates(len(context), context)
        own_weight, context_weight, bias = self._own_weight, self._context_weight, self._bias
        if words is not None:
            own_weight, context_weight = own_weight.select(words), context_weight.select(words)
            bias = bias.index_select(0, words)
        context_logits = context_weight(context).to(self._exact) + bias
        return Memory(context_gates, context_logits, own_weight, self), context

    @torch.no_grad()
    def step(self, prev_token: Tensor, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Decodes one step. A sentence may have several rows, one for each hypothesis. They stand together.

        Args:
            prev_token: [rows] token ids, `<sos>` at the first step.
            hidden: [rows, hid dim].
            memory: of the sentences. All have equally many rows.

        Returns:
            logits [rows, words], in float32 or finer, and hidden [rows, hid dim].
        """
        sentences, rows = len(memory.context_gates), len(prev_token)
        context_gates = memory.context_gates.unsqueeze(1).expand(-1, rows // sentences, -1).flatten(0, 1)
        features, hidden = self._decoder.decode_rows(prev_token, [rows], hidden, context_gates)
        logits = memory.own_weight(features).to(self._exact)  # [rows, words]
        logits.view(sentences, -1, logits.shape[1]).add_(memory.context_logits.unsqueeze(1))
        return logits, hidden


class Seq2Seq(nn.Module):
    """Encoder and decoder as one translator.

    Args:
        encoder: an `Encoder`.
        decoder: a `Decoder` with the encoder's hidden size.
        device: the device that the model is moved to.

    Raises:
        ValueError: the hidden sizes differ.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, device: torch.device):
        super().__init__()
        if encoder.rnn.hidden_size != decoder.rnn.hidden_size:
            raise ValueError(
                f"the encoder's hidden size is {encoder.rnn.hidden_size}, the decoder's {decoder.rnn.hidden_size}: "
                "the context is the decoder's first hidden state, so they must be equal"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.to(device)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.embedding.weight.device

    def forward(
        self, src: Tensor, trg: Tensor, teacher_forcing_ratio: float = 0.5, src_len: Tensor | None = None
    ) -> Tensor:
        """Logits of every position of a padded batch.

        After each step one number is drawn for the whole batch from Python's `random`. If it is below
        `teacher_forcing_ratio`, the next step reads the reference, otherwise this step's argmax.

        Args:
            src: [src len, batch] token ids.
            trg: [trg len, batch] token ids, `<sos>` in row 0.
            teacher_forcing_ratio: probability of reading the reference.
            src_len: [batch] lengths of the sources. Without it the encoder reads the padding too.

        Returns:
            [trg len, batch, output dim] logits. Row t predicts trg[t], row 0 is zeros.
        """
        context = self.encoder(src, src_len)  # [1, batch, hid dim]
        steps, batch = len(trg) - 1, trg.shape[1]
        if steps == 0:
            return context.new_zeros(1, batch, self.decoder.fc_out.out_features)
        features = self.features(trg[:-1].flatten(), [batch] * steps, context[0], teacher_forcing_ratio)
        logits = self.decoder.logits(features.view(steps, batch, -1), context.expand(steps, -1, -1))
        return torch.cat((logits.new_zeros(1, *logits.shape[1:]), logits))  # [trg len, batch, output dim]

    def features(self, trg: Tensor, rows_per_step: list[int], context: Tensor, teacher_forcing_ratio: float) -> Tensor:
        """The output layer's input at all steps, without the context.

        Args:
            trg: [rows] the reference's token before each step, step by step: `<sos>` at the first.
            rows_per_step: the steps' numbers of rows.
            context: [rows_per_step[0], hid dim].
            teacher_forcing_ratio: as in `forward`.

        Returns:
            [rows, emb dim + hid dim].
        """
        # All draws come first. Draw t decides what step t + 1 reads. The last one is made and unused.
        forced = [random.random() < teacher_forcing_ratio for _ in rows_per_step]
        context_gates = self.decoder.rnn.context_gates(len(context), context)
        segments = forced_segments(forced)
        if len(segments) > 1:
            with torch.no_grad():
                context_logits, own_weight = self.decoder.context_logits(context), self.decoder.own_weight()
        rows = step_rows(rows_per_step)
        hidden = context
        segment_features: list[Tensor] = []
        for first, after in segments:
            batch = rows_per_step[first]
            tokens = trg[rows[first].start : rows[after - 1].stop]
            if first:
                with torch.no_grad():
                    last_step = segment_features[-1][-rows_per_step[first - 1] :]
                    # [batch]
                    predicted = self.decoder.most_probable(last_step[:batch], context_logits[:batch], own_weight)
                tokens = torch.cat((predicted, tokens[batch:]))
            segment, hidden = self.decoder.decode_rows(
                tokens, rows_per_step[first:after], hidden[:batch], context_gates
            )
            segment_features.append(segment)
        return torch.cat(segment_features)

    def decoding(self) -> Decoding:
        """The calls of decoding, for any number of batches, until the weights change."""
        return Decoding(self)

    def start(self, src: Tensor, src_len: Tensor, words: Tensor | None = None) -> tuple[Memory, Tensor]:
        """Begins to decode one batch, see `Decoding.start`."""
        return self.decoding().start(src, src_len, words)

    def step(self, prev_token: Tensor, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Decodes one step, see `Decoding.step`."""
        return memory.decoding.step(prev_token, hidden, memory)


def forced_segments(forced: list[bool]) -> list[tuple[int, int]]:
    """Cuts the steps 0 .. len(forced) - 1 into segments that one GRU call can read.

    Args:
        forced: forced[t] says whether step t + 1 reads the reference.

    Returns:
        (first step, step after the last) of each segment. Within a segment every step but the first reads the
        reference.

    >>> forced_segments([True, False, True, True])
    [(0, 2), (2, 4)]
    """
    starts = [0] + [t + 1 for t in range(len(forced) - 1) if not forced[t]]
    return list(zip(starts, starts[1:] + [len(forced)], strict=True))


class TrainingLoss(nn.Module):
    """A model and its loss as one module, because `DistributedDataParallel` hooks `forward` alone.

    Args:
        model: the `Seq2Seq` to train.
        label_smoothing: probability mass spread evenly over the vocabulary (Szegedy et al. 2016, arXiv 1512.00567).
        pad_index: the target id that stands for no target.
    """

    def __init__(self, model: Seq2Seq, label_smoothing: float = 0.0, pad_index: int = 1):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.pad_index = pad_index

    def forward(self, batch: Batch, teacher_forcing_ratio: float) -> Tensor:
        """Cross entropy, summed over the real targets of a batch.

        Args:
            batch: from a `data.Loader`.
            teacher_forcing_ratio: as in `Seq2Seq.forward`.

        Returns:
            The sum, a scalar in float32 or finer. Its mean over the targets of all ranks is the loss.
        """
        model, fc_out = self.model, self.model.decoder.fc_out
        context = model.encoder.encode_rows(batch.src, batch.src_rows_per_step, batch.src_last)  # [batch, hid dim]
        features = model.features(batch.trg, batch.trg_rows_per_step, context, teacher_forcing_ratio)
        return output_loss(
            features,
            context,
            fc_out.weight,
            fc_out.bias,
            batch.targets,
            batch.trg_rows_per_step,
            label_smoothing=self.label_smoothing,
            ignored=self.pad_index,
        )


# ---------------------------------------------------------------- the first weights


@torch.no_grad()
def init_normal(model: Seq2Seq) -> None:
    """Draws every parameter from N(0, 0.01²), as in the original."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.01)


@torch.no_grad()
def init_orthogonal(model: Seq2Seq) -> None:
    """Draws each part so that a GRU trains well.

    Biases are 0. Embeddings are N(0, 0.1²), the encoder's input weights N(0, 0.05²). Each gate's recurrent block is
    orthogonal (Saxe et al. 2014, arXiv 1312.6120). The decoder's input and output weights are Xavier uniform (Glorot
    and Bengio 2010), the context's columns as a matrix of their own. As one matrix with the others they would be
    smaller than their fan-in asks for.
    """
    encoder, decoder = model.encoder, model.decoder
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif "embedding" in name:
            nn.init.normal_(parameter, std=0.1)
    nn.init.normal_(encoder.rnn.weight_ih_l0, std=0.05)
    for rnn in (encoder.rnn, decoder.rnn):
        for gate in rnn.weight_hh_l0.chunk(3):  # r, z, n
            nn.init.orthogonal_(gate)
    for weight in (decoder.rnn.weight_ih_l0, decoder.fc_out.weight):
        own = weight.shape[1] - decoder.rnn.hidden_size
        nn.init.xavier_uniform_(weight[:, :own])
        nn.init.xavier_uniform_(weight[:, own:])


INITIALISATIONS = {"normal": init_normal, "orthogonal": init_orthogonal}


@torch.no_grad()
def raise_update_gates(model: Seq2Seq, bias: float) -> None:
    """Adds `bias` to the biases of the update gates, z, of both GRUs.

    At 1 a state keeps about three quarters of itself in a step, at 0 half. So the sentence's first words reach the
    context from the start. Source: Jozefowicz, Zaremba and Sutskever 2015, "An Empirical Exploration of Recurrent
    Network Architectures", who do it to the LSTM's forget gate.
    """
    for rnn in (model.encoder.rnn, model.decoder.rnn):
        rnn.bias_ih_l0.chunk(3)[1].add_(bias)


@torch.no_grad()
def use_vectors(model: Seq2Seq, src_vectors: Tensor, trg_vectors: Tensor) -> None:
    """Puts words' vectors in the place of drawn ones, in both embeddings and in the output layer.

    The output layer gets the target's vectors projected at random. So the weights of similar words begin similar, those
    for the hidden state and those for the context. The drawn weights decide the scale. A word without a vector keeps
    its row, and the features beyond the vectors' stay as drawn. Draws from PyTorch's random generator.

    Args:
        model: on the CPU, its weights drawn.
        src_vectors, trg_vectors: [input dim, features] and [output dim, features] rows of length 1, or of zeros for a
            word without a vector. At most emb dim features. `nmt.cooccurrence.embeddings` makes such.
    """
    encoder, decoder = model.encoder, model.decoder
    for table, vectors in ((encoder.embedding.weight, src_vectors), (decoder.embedding.weight, trg_vectors)):
        known, features = vectors.any(dim=1), vectors.shape[1]
        table[known, :features] = vectors[known] * table.std() * math.sqrt(features)
    known, features = trg_vectors.any(dim=1), trg_vectors.shape[1]
    hid_dim = decoder.rnn.hidden_size
    for block in decoder.fc_out.weight[:, -2 * hid_dim :].split(hid_dim, dim=1):  # of the hidden state, of the context
        projected = (trg_vectors @ nn.init.orthogonal_(torch.empty(features, hid_dim)))[known]
        if projected.numel() > 1 and projected.std() > 0:  # otherwise they have no scale
            block[known] = projected * (block.std() / projected.std())


# ---------------------------------------------------------------- building


def build(
    input_dim: int,
    output_dim: int,
    *,
    emb_dim: int = 256,
    hid_dim: int = 512,
    dropout: float = 0.0,
    output_dropout: float = 0.0,
    device: torch.device | str = "cpu",
) -> Seq2Seq:
    """The whole model. Its sizes default to the published ones.

    Args:
        input_dim, output_dim: source and target vocabulary sizes.
        emb_dim: size of the embeddings.
        hid_dim: size of the hidden states and of the context.
        dropout, output_dropout: as in `Decoder`. The encoder takes the former.
        device: the model's device.
    """
    encoder = Encoder(input_dim, emb_dim, hid_dim, dropout)
    decoder = Decoder(output_dim, emb_dim, hid_dim, dropout, output_dropout)
    return Seq2Seq(encoder, decoder, torch.device(device))


def sizes_of(state_dict: dict[str, Tensor]) -> dict[str, int]:
    """The sizes that a state dict of this model was made with, read from its shapes.

    Returns:
        input_dim, output_dim, emb_dim and hid_dim, for `build` or `restore`.

    Raises:
        ValueError: a key or a number of dimensions is not this model's.
    """
    expected = build(1, 1, emb_dim=1, hid_dim=1).state_dict()
    check_names(state_dict, expected)
    for name, tensor in state_dict.items():
        if tensor.dim() != expected[name].dim():
            raise ValueError(f"{name} has {tensor.dim()} dimensions, expected {expected[name].dim()}")
    input_dim, emb_dim = state_dict["encoder.embedding.weight"].shape
    return {
        "input_dim": input_dim,
        "output_dim": len(state_dict["decoder.embedding.weight"]),
        "emb_dim": emb_dim,
        "hid_dim": state_dict["encoder.rnn.weight_hh_l0"].shape[1],
    }


def restore(state_dict: dict[str, Tensor], sizes: dict[str, int], device: torch.device | str = "cpu") -> Seq2Seq:
    """A model with these weights, ready to translate: in evaluation mode, without dropout.

    Args:
        state_dict: name → tensor.
        sizes: input_dim, output_dim, emb_dim and hid_dim.
        device: the model's device.

    Raises:
        ValueError: a name or a shape is not that of a model of these sizes.
    """
    with torch.device("meta"), _Undrawn():  # where faulty sizes take no memory
        expected = build(**sizes, device="meta").state_dict()
    check_names(state_dict, expected)
    for name, tensor in state_dict.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(expected[name].shape)}")
    with _Undrawn():
        model = build(**sizes, device=device)
    model.load_state_dict(state_dict)
    return model.eval()


class _Undrawn(TorchFunctionMode):
    """Here a new module's weights are not drawn, because they are replaced at once.

    On the device `meta` a draw would import PyTorch's compiler, which takes a second.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__.endswith(("normal_", "uniform_")):  # of `Tensor`, and of `nn.init`
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def check_names(state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises a ValueError unless the keys are the expected ones and all values are tensors."""
    for name in expected:
        if name not in state_dict:
            raise ValueError(f"{name} is missing")
    for name, tensor in state_dict.items():
        if name not in expected:
            raise ValueError(f"{name} is none of this model's")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is of type {type(tensor).__name__}, expected a tensor")
