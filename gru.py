"""The model: one GRU encoder-decoder that shows the decoder the source's context vector at every step.

Source: Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", arXiv 1406.1078, in the form of
Ben Trevett's pytorch-seq2seq tutorial 2 and of farizrahman4u/seq2seq's `peek=True`:

    context  = h_enc(last)                        # also the decoder's first hidden state
    e_t      = dropout(E_trg[y_{t-1}])            # y_0 = <sos>; then the reference or the argmax
    h_t      = GRU([e_t ; context], h_{t-1})
    logits_t = W_o [e_t ; h_t ; context] + b_o

From top to bottom: the GRU, the output layer with its loss, dropout, the model, its initialisations. Tensors are
time-first: token ids are [length, batch], vectors [length, batch, features].

Training computes what the formulas need and nothing else, each part by one product over all steps where it can be:

- A batch has no padding. Its sentences stand in the order of their lengths, the longest first, so that those which
  have a step t are the first counts[t]. All steps one after the other are [rows, features], rows = sum of counts.
- The context is the same at all steps of a sentence. What it adds to the GRU's gates and to the logits, its share, is
  computed once a sentence.
- The decoder's steps are independent of its predictions as long as it reads the reference. So a stretch of such steps
  is one GRU call, and the output layer, which costs most, is applied to all steps at once; within a stretch only at
  the step whose argmax is read next.
- Each weight's gradient is one product over all steps.
- The output layer and the cross entropy are one function: the gradient of the logits takes the logits' place.

NPUs and GPUs want few distinct shapes and have GRU kernels of their own. So there batches are padded, to little more
than their longest sentence, the padding's rows are computed and have no loss, and the context is an input of each step.

`test/test_gru.py` holds the plain loop, step by step from the formulas above, that all of this must equal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

if TYPE_CHECKING:
    from data import Batch

# ---------------------------------------------------------------- the GRU


def step_rows(counts: list[int]) -> list[slice]:
    """Where each step's rows are, if the steps stand one after the other.

    >>> step_rows([3, 2])
    [slice(0, 3, None), slice(3, 5, None)]
    """
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def computes_steps(device: torch.device) -> bool:
    """Whether `GRU` computes its steps itself there, and needs no padding; else by the device's own kernels."""
    return device.type == "cpu"


class GRU(nn.GRU):
    """One layer, one direction, over rows without padding, with an optional input that is the same at all steps.

    The parameters and the formulas are `nn.GRU`'s. On a CPU `run` is `GRUSteps`, elsewhere the device's own kernels: on
    CUDA cuDNN's.
    """

    def share(self, batch: int, constant: Tensor | None = None) -> Tensor:
        """What is the same at all steps, for `run`.

        Args:
            batch: number of sentences.
            constant: [batch, constant dim] the part of the input that does not change, or None.

        Returns:
            On a CPU [batch, 3 * hid dim], the share of the constant input and of the biases in the gates' sums;
            elsewhere [batch, constant dim], `constant` itself, which the device's kernels take as input.
        """
        if not computes_steps(self.weight_ih_l0.device):
            return self.weight_ih_l0.new_empty(batch, 0) if constant is None else constant
        # The new gate's hidden bias is multiplied by r, so it stays with the hidden state.
        bias = self.bias_ih_l0 + F.pad(self.bias_hh_l0[: 2 * self.hidden_size], (0, self.hidden_size))
        if constant is None:
            return bias.expand(batch, -1)
        return F.linear(constant, self.weight_ih_l0[:, -constant.shape[1] :], bias)

    def run(self, inputs: Tensor, counts: list[int], hidden: Tensor | None, share: Tensor) -> Tensor:
        """Runs over the steps.

        Args:
            inputs: [rows, input dim without the constant part].
            counts: the steps' numbers of rows; none is larger than the one before it.
            hidden: [counts[0], hid dim] the state before the first step, or None for zeros.
            share: [at least counts[0], ...] from `share`.

        Returns:
            [rows, hid dim] the state after each step.

        Raises:
            ValueError: the device's own kernels are used, and the steps differ in their numbers of rows.
        """
        share = share[: counts[0]]
        if computes_steps(inputs.device):
            weight_ih = self.weight_ih_l0[:, : inputs.shape[1]]
            tensors = (inputs, share, weight_ih, self.weight_hh_l0, self.bias_hh_l0[-self.hidden_size :])
            return GRUSteps.apply(*as_autocast(*tensors), hidden if hidden is None else as_autocast(hidden)[0], counts)
        if counts[0] != counts[-1]:
            raise ValueError(f"here all steps need the same number of rows, not {counts}")
        inputs = inputs.view(len(counts), counts[0], -1)
        if share.shape[1]:
            inputs = torch.cat((inputs, share.expand(len(counts), -1, -1)), dim=2)
        outputs, _ = self(inputs, hidden if hidden is None else hidden.unsqueeze(0))  # [steps, batch, hid dim]
        return outputs.flatten(0, 1)


class GRUSteps(torch.autograd.Function):
    """The GRU's steps and their gradient.

        r  = sigmoid(W_ir x + share_r + W_hr h)
        z  = sigmoid(W_iz x + share_z + W_hz h)
        g  = W_hn h + b_hn
        n  = tanh(W_in x + share_n + r * g)
        h' = (1 - z) * n + z * h

    Backward, with d for the gradient of the loss by the quantity, and the gates' sums named by the gates:

        dn  = dh' * (1 - z) * (1 - n²)        dg = dn * r
        dr  = dn * g * r * (1 - r)
        dz  = dh' * (h - n) * z * (1 - z)
        dh  = dh' * z + W_hr' dr + W_hz' dz + W_hn' dg
    """

    @staticmethod
    def forward(ctx, inputs, share, weight_ih, weight_hh, bias_hn, hidden, counts):
        """See `GRU.run`; `weight_ih` [3 * hid dim, input dim] is without the constant input's columns."""
        size = weight_hh.shape[1]
        gates = inputs.new_empty(len(inputs), 2 * size)  # r and z
        new = inputs.new_empty(len(inputs), size)  # n
        hidden_new = torch.empty_like(new)  # g
        outputs = torch.empty_like(new)
        for rows, count in zip(step_rows(counts), counts, strict=True):
            gates[rows], new[rows] = share[:count, : 2 * size], share[:count, 2 * size :]
        gates.addmm_(inputs, weight_ih[: 2 * size].T)
        new.addmm_(inputs, weight_ih[2 * size :].T)
        before = hidden
        for rows, count in zip(step_rows(counts), counts, strict=True):
            if before is None:  # zeros: no product is needed
                before = torch.zeros_like(outputs[rows])
                hidden_new[rows] = bias_hn
            else:
                before = before[:count]
                gates[rows].addmm_(before, weight_hh[: 2 * size].T)
                torch.addmm(bias_hn, before, weight_hh[2 * size :].T, out=hidden_new[rows])
            r, z = gates[rows].sigmoid_().split(size, dim=1)
            new[rows].addcmul_(r, hidden_new[rows]).tanh_()
            before = torch.lerp(new[rows], before, z, out=outputs[rows])
        ctx.save_for_backward(inputs, hidden, weight_ih, weight_hh, gates, new, hidden_new, outputs)
        ctx.counts = counts
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, d_outputs):
        inputs, hidden, weight_ih, weight_hh, gates, new, hidden_new, outputs = ctx.saved_tensors
        counts, size = ctx.counts, weight_hh.shape[1]
        steps = list(zip(step_rows(counts), counts, strict=True))
        before = torch.empty_like(outputs)  # the state that each step began with
        before[: counts[0]] = 0 if hidden is None else hidden
        for (rows, count), (rows_before, _) in zip(steps[1:], steps, strict=False):
            before[rows] = outputs[rows_before][:count]
        d_sums = inputs.new_empty(len(inputs), 4 * size)  # n, r, z, g: the first three have inputs, the last three h
        d_share = torch.zeros(counts[0], 3 * size, dtype=accurate(inputs.dtype))
        d_hidden = inputs.new_zeros(counts[0], size)
        for rows, count in reversed(steps):
            d_after = d_hidden[:count].add_(d_outputs[rows])
            r, z = gates[rows].split(size, dim=1)
            d_n, d_r, d_z, d_g = d_sums[rows].split(size, dim=1)
            d_kept = d_after * z
            torch.ops.aten.tanh_backward.grad_input(d_after - d_kept, new[rows], grad_input=d_n)
            torch.mul(d_n, hidden_new[rows], out=d_r)
            torch.sub(before[rows], new[rows], out=d_z).mul_(d_after)
            d_gates = d_sums[rows, size : 3 * size]
            torch.ops.aten.sigmoid_backward.grad_input(d_gates, gates[rows], grad_input=d_gates)
            torch.mul(d_n, r, out=d_g)
            if rows.start > 0 or hidden is not None:
                torch.addmm(d_kept, d_sums[rows, size:], weight_hh, out=d_hidden[:count])
            d_share[:count] += d_sums[rows, : 3 * size]
        d_inputs = d_sums[:, : 3 * size] @ weight_ih.roll(size, 0)  # from r, z, n to n, r, z
        d_weight_ih = (d_sums[:, : 3 * size].T @ inputs).roll(-size, 0)
        later = slice(counts[0] if hidden is None else 0, None)  # the rows whose step began with no zeros
        d_weight_hh = d_sums[later, size:].T @ before[later]
        d_bias_hn = d_sums[:, 3 * size :].sum(0)
        d_share = d_share.roll(-size, 1).to(inputs.dtype)
        d_hidden = None if hidden is None else d_hidden
        return d_inputs, d_share, d_weight_ih, d_weight_hh, d_bias_hn, d_hidden, None


# ---------------------------------------------------------------- the output layer and its loss


class OutputLoss(torch.autograd.Function):
    """The output layer and the cross entropy, summed over the rows: the logits are never there all at once.

        logits   = W_f features + W_c context + b
        loss     = log sum exp(logits) - (1 - s) logits[target] - s mean(logits)        # s: label smoothing
        d_logits = softmax(logits) - (1 - s) onehot(target) - s / vocabulary

    The gradients are computed with the loss, where the logits are at hand, and kept; the backward pass scales them.
    They are those of a sum over many rows, which float16 might not hold: so they are kept a power of two smaller.
    """

    BLOCK = 96 * 2**20  # bytes of logits at a time: the peak of a step's memory
    SOFTMAX_ROWS = 512  # rows of one softmax on a CPU, whose cache they fit
    SAFE_ROWS = 16384  # rows whose gradients float16 can add up: a feature is rarely above 2, float16 ends at 65504

    @staticmethod
    def forward(ctx, features, context, weight, bias, targets, counts, smoothing, ignored, with_gradients):
        """See `TrainingLoss`; the context is [batch, context dim], `weight` [vocabulary, both dims]."""
        vocabulary, own = len(weight), features.shape[1]
        # Rows of whole cache lines: products of a matrix with odd rows take up to half as long again.
        width = -(-vocabulary // 64) * 64
        ctx.scale = 2.0 ** -(len(features) // OutputLoss.SAFE_ROWS).bit_length()
        share = torch.addmm(bias, context, weight[:, own:].T).to(accurate(features.dtype))  # [batch, vocabulary]
        d_share = torch.zeros_like(share)
        total = share.new_zeros(())
        d_features = torch.empty_like(features)
        d_weight = weight.new_empty(width, weight.shape[1])
        block = OutputLoss.BLOCK // (width * features.element_size())  # rows
        for first, last in runs(counts, block, alike=False):
            rows = slice(sum(counts[:first]), sum(counts[:last]))
            padded = features.new_empty(sum(counts[first:last]), width)
            logits = padded[:, :vocabulary]
            # AMX's products read whole blocks of a row and multiply what is beyond the vocabulary by 0. It must not be
            # NaN there. In `d_weight` it stays undefined.
            padded[:, vocabulary:] = 0
            torch.mm(features[rows], weight[:, :own].T, out=logits)
            total += OutputLoss.softmax(
                logits, share, targets[rows], counts[first:last], smoothing, ignored, ctx.scale, d_share
            )
            if with_gradients:  # `logits` are their gradient now
                torch.mm(logits, weight[:, :own], out=d_features[rows])
                if first:
                    d_weight[:, :own].addmm_(padded.T, features[rows])
                else:
                    torch.mm(padded.T, features[rows], out=d_weight[:, :own])
        if with_gradients:
            d_share = d_share.to(features.dtype)
            torch.mm(d_share.T, context, out=d_weight[:vocabulary, own:])
            ctx.save_for_backward(d_features, d_share @ weight[:, own:], d_weight[:vocabulary], d_share.sum(0))
        return total

    @staticmethod
    def softmax(logits, share, targets, counts, smoothing, ignored, scale, d_share):
        """The loss of some steps' rows, summed, and in the place of their logits its gradient.

        Args:
            logits: [rows, vocabulary] without the context's share; becomes the gradient of the loss times `scale`.
            share: [batch, vocabulary] the context's share of the logits, bias included, in float32 or better.
            targets: [rows] token ids.
            counts: the steps' numbers of rows.
            smoothing: the mass spread over the vocabulary.
            ignored: the target id that stands for no target.
            scale: of the gradients.
            d_share: [batch, vocabulary] the gradient of `share` times `scale`; that of these rows is added to it.
        """
        loss = share.new_zeros(())
        on_cpu = logits.device.type == "cpu"
        limit = max(OutputLoss.SOFTMAX_ROWS, counts[0]) if on_cpu else len(logits)
        # Half is too coarse for a log-sum-exp. One buffer for all runs, so that it stays in the cache.
        work = share.new_empty(min(limit, len(logits)), logits.shape[1])
        ends = [row_slice.stop for row_slice in step_rows(counts)]
        for first, last in runs(counts, limit, alike=True):
            count = counts[first]
            rows = slice(ends[first] - count, ends[last - 1])
            by_step = (last - first, count, -1)  # [steps, count, vocabulary]
            target = targets[rows].unsqueeze(1)  # [rows, 1], as all below
            real = target != ignored
            x = work[: len(target)].copy_(logits[rows])
            x.view(by_step).add_(share[:count])
            on_target = x.gather(1, target)
            top = x.amax(1, keepdim=True)
            mean = x.mean(1, keepdim=True) if smoothing else 0.0
            x = torch.softmax(x, 1, out=x if on_cpu else None)
            log_sum_exp = top - x.amax(1, keepdim=True).log()  # the largest probability is exp(top) / sum exp(logits)
            losses = log_sum_exp - (1 - smoothing) * on_target - smoothing * mean
            loss += torch.where(real, losses, 0).sum()
            weight = real.to(x.dtype) * scale
            x.mul_(weight).sub_(weight * (smoothing / x.shape[1]))  # far quicker than one addcmul
            x.scatter_add_(1, target, weight * (smoothing - 1))
            for d_step in x.view(by_step):
                d_share[:count] += d_step
            logits[rows].copy_(x)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        return *(gradient * (d_loss / ctx.scale) for gradient in ctx.saved_tensors), None, None, None, None, None


def runs(counts: list[int], limit: int, *, alike: bool) -> Iterator[tuple[int, int]]:
    """Cuts the steps into runs of at most `limit` rows, or of one step.

    Args:
        counts: the steps' numbers of rows.
        limit: the most rows of a run.
        alike: whether all steps of a run must have the same number of rows.

    Yields:
        (first step, step after the last), from 0.

    >>> list(runs([3, 3, 2, 1], 7, alike=True)), list(runs([3, 3, 2, 1], 7, alike=False))
    ([(0, 2), (2, 3), (3, 4)], [(0, 2), (2, 4)])
    """
    first = rows = 0
    for step, count in enumerate(counts):
        if step > first and (rows + count > limit or (alike and count != counts[first])):
            yield first, step
            first, rows = step, 0
        rows += count
    yield first, len(counts)


# ---------------------------------------------------------------- helpers of both


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The type for sums over numbers of `dtype`: float32, or float64 of float64."""
    return torch.promote_types(dtype, torch.float32)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast, where it is on, gives them to a product; it does not look into functions of our own."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


class Dropout(nn.Dropout):
    """`nn.Dropout`, on a CPU from fewer random bits: eight an element if they suffice, else sixteen.

    So the probability is that of the nearest multiple of 2^-16, by which the kept elements are scaled, too.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * 2**16) / 2**16
        if x.device.type != "cpu" or not self.training or dropped in (0, 1):
            return super().forward(x)
        dtype = torch.int8 if (dropped * 2**8).is_integer() else torch.int16
        values = torch.iinfo(dtype).max - torch.iinfo(dtype).min + 1
        bits = torch.empty(-(-x.numel() * dtype.itemsize // 8), dtype=torch.int64).random_(-(2**63), None).view(dtype)
        keep = (bits[: x.numel()] >= int((dropped - 0.5) * values)).view_as(x)
        return x * keep.to(x.dtype).mul_(1 / (1 - dropped))


# ---------------------------------------------------------------- the model


class Encoder(nn.Module):
    """Reads the source; its last hidden state is the context.

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
        return self.read(src.flatten(), [batch] * steps, last_steps * batch + columns).unsqueeze(0)

    def read(self, tokens: Tensor, counts: list[int], last: Tensor) -> Tensor:
        """Encodes a batch whose steps stand one after the other.

        Args:
            tokens: [rows] token ids.
            counts: the steps' numbers of rows.
            last: [batch] the row of each sentence's last token. The state of a one-way GRU does not depend on what
                follows, so the state there is what a packed sequence would give; NPUs have no packed sequences.

        Returns:
            [batch, hid dim] the context, in the order of `last`.
        """
        embedded = self.dropout(self.embedding(tokens))  # [rows, emb dim]
        outputs = self.rnn.run(embedded, counts, None, self.rnn.share(counts[0]))  # [rows, hid dim]
        return outputs.index_select(0, last)


class Decoder(nn.Module):
    """Predicts the next target token from the previous one, the hidden state and the context.

    Args:
        output_dim: target vocabulary size.
        emb_dim: size of the embeddings.
        hid_dim: size of the hidden state and of the context.
        dropout: dropout probability on the embeddings.
        output_dropout: dropout probability on [e_t ; h_t] in front of the output layer; the context is left whole.
    """

    def __init__(self, output_dim: int, emb_dim: int, hid_dim: int, dropout: float, output_dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(output_dim, emb_dim)
        self.rnn = GRU(emb_dim + hid_dim, hid_dim)
        self.fc_out = nn.Linear(emb_dim + 2 * hid_dim, output_dim)
        self.dropout = Dropout(dropout)
        self.output_dropout = Dropout(output_dropout)

    def read(self, tokens: Tensor, counts: list[int], hidden: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Reads some steps whose tokens are all known, in one GRU call.

        Args:
            tokens: [rows] token ids, step by step.
            counts: the steps' numbers of rows.
            hidden: [counts[0], hid dim] the hidden state before the first of them.
            share: [at least counts[0], ...] the context's, from `rnn.share`.

        Returns:
            features [rows, emb dim + hid dim], which is [e_t ; h_t] after dropout, and
            hidden [counts[-1], hid dim] after the last step.
        """
        embedded = self.dropout(self.embedding(tokens))  # [rows, emb dim]
        outputs = self.rnn.run(embedded, counts, hidden, share)  # [rows, hid dim]
        features = self.output_dropout(torch.cat((embedded, outputs), dim=1))
        return features, outputs[len(outputs) - counts[-1] :]

    def logits(self, features: Tensor, context: Tensor) -> Tensor:
        """Applies the output layer: W_o [e_t ; h_t ; context] + b_o.

        Args:
            features: [..., emb dim + hid dim] from `read`.
            context: [..., hid dim], one for each row of `features`.

        Returns:
            [..., output dim] logits.
        """
        return self.fc_out(torch.cat((features, context), dim=-1))

    def output_share(self, context: Tensor) -> Tensor:
        """What the context, [batch, hid dim], and the bias add to the logits: [batch, output dim]."""
        return F.linear(context, self.fc_out.weight[:, -context.shape[1] :], self.fc_out.bias)

    def best(self, features: Tensor, output_share: Tensor) -> Tensor:
        """The most probable tokens: [rows] ids for features [rows, emb dim + hid dim] and their `output_share`."""
        weight = self.fc_out.weight[:, : features.shape[1]]
        return (output_share + F.linear(features, weight)).argmax(dim=1)

    def forward(self, prev_token: Tensor, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            prev_token: [batch] token ids.
            hidden: [1, batch, hid dim].
            context: [1, batch, hid dim].

        Returns:
            logits [batch, output dim] and hidden [1, batch, hid dim].
        """
        batch = len(prev_token)
        features, hidden = self.read(prev_token, [batch], hidden[0], self.rnn.share(batch, context[0]))
        return self.logits(features, context[0]), hidden.unsqueeze(0)


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
        """Where the model is."""
        return self.encoder.embedding.weight.device

    def forward(
        self, src: Tensor, trg: Tensor, teacher_forcing_ratio: float = 0.5, src_len: Tensor | None = None
    ) -> Tensor:
        """Logits of every position of a padded batch.

        After each step one number is drawn for the whole batch from Python's `random`; if it is below
        `teacher_forcing_ratio` the next step reads the reference, else this step's argmax.

        Args:
            src: [src len, batch] token ids.
            trg: [trg len, batch] token ids, `<sos>` in row 0.
            teacher_forcing_ratio: probability of reading the reference.
            src_len: [batch] lengths of the sources; without it the encoder reads the padding too.

        Returns:
            [trg len, batch, output dim] logits; row t predicts trg[t], row 0 is zeros.
        """
        context = self.encoder(src, src_len)  # [1, batch, hid dim]
        steps, batch = len(trg) - 1, trg.shape[1]
        if steps == 0:
            return context.new_zeros(1, batch, self.decoder.fc_out.out_features)
        features = self.features(trg[:-1].flatten(), [batch] * steps, context[0], teacher_forcing_ratio)
        logits = self.decoder.logits(features.view(steps, batch, -1), context.expand(steps, -1, -1))
        return torch.cat((logits.new_zeros(1, *logits.shape[1:]), logits))  # [trg len, batch, output dim]

    def features(self, trg: Tensor, counts: list[int], context: Tensor, teacher_forcing_ratio: float) -> Tensor:
        """What the output layer reads, at all steps.

        Args:
            trg: [rows] the reference's token before each step, step by step: `<sos>` at the first.
            counts: the steps' numbers of rows.
            context: [counts[0], hid dim].
            teacher_forcing_ratio: as in `forward`.

        Returns:
            [rows, emb dim + hid dim].
        """
        # All draws come first. Draw t decides what step t + 1 reads; the last one is made and unused.
        forced = [random.random() < teacher_forcing_ratio for _ in counts]
        share = self.decoder.rnn.share(len(context), context)
        pieces = stretches(forced)
        if len(pieces) > 1:
            with torch.no_grad():
                output_share = self.decoder.output_share(context)
        rows = step_rows(counts)
        hidden, features = context, []
        for first, after in pieces:
            count = counts[first]
            tokens = trg[rows[first].start : rows[after - 1].stop]
            if first:
                with torch.no_grad():
                    last_step = features[-1][-counts[first - 1] :]
                    predicted = self.decoder.best(last_step[:count], output_share[:count])  # [count]
                tokens = torch.cat((predicted, tokens[count:]))
            stretch, hidden = self.decoder.read(tokens, counts[first:after], hidden[:count], share)
            features.append(stretch)
        return torch.cat(features)

    @torch.no_grad()
    def greedy(self, src: Tensor, src_len: Tensor, sos_index: int, eos_index: int, max_len: int = 50) -> Tensor:
        """Translates a batch, at each step taking the most probable token.

        Sentences that have ended are dropped, see `rows_to_keep`.

        Args:
            src: [src len, batch] token ids.
            src_len: [batch] lengths of the sources.
            sos_index: id of `<sos>`.
            eos_index: id of `<eos>`.
            max_len: most tokens a translation has.

        Returns:
            [max len, batch] token ids; from a sentence's end on, `<eos>`.
        """
        context = self.encoder(src, src_len)[0]  # [batch, hid dim]
        translations = src.new_full((max_len, len(context)), eos_index)
        # Of the sentences that are not dropped, here and below [kept, ...]:
        columns = torch.arange(len(context), device=src.device)
        prev_token = src.new_full((len(context),), sos_index)
        hidden = context
        share, output_share = self.decoder.rnn.share(len(context), context), self.decoder.output_share(context)
        ended = torch.zeros_like(columns, dtype=torch.bool)
        for step in range(max_len):
            features, hidden = self.decoder.read(prev_token, [len(columns)], hidden, share)
            prev_token = self.decoder.best(features, output_share).masked_fill(ended, eos_index)
            translations[step, columns] = prev_token
            ended = prev_token == eos_index
            rows = rows_to_keep(ended)
            if len(rows) == 0:
                break
            if len(rows) < len(columns):
                state = (columns, prev_token, ended, hidden, share, output_share)
                columns, prev_token, ended, hidden, share, output_share = (part.index_select(0, rows) for part in state)
        return translations


def rows_to_keep(ended: Tensor) -> Tensor:
    """The sentences that decoding goes on with: those that have not ended, and where few distinct shapes are wanted so
    many others that the batch is only ever halved.

    Args:
        ended: [kept] bool. Waits for the device.

    Returns:
        [at most kept] int64 their rows, those that go on first; none where all have ended.
    """
    going = len(ended) - int(ended.sum())
    kept = going if computes_steps(ended.device) or going == 0 else len(ended)
    while kept // 2 >= going > 0:
        kept //= 2
    return ended.int().argsort(stable=True)[:kept]


def stretches(forced: list[bool]) -> list[tuple[int, int]]:
    """Cuts the steps 0 .. len(forced) - 1 into stretches that one GRU call can read.

    Args:
        forced: forced[t] says whether step t + 1 reads the reference.

    Returns:
        (first step, step after the last) of each stretch. Within a stretch every step but the first reads the
        reference.

    >>> stretches([True, False, True, True])
    [(0, 2), (2, 4)]
    """
    starts = [0] + [t + 1 for t in range(len(forced) - 1) if not forced[t]]
    return list(zip(starts, starts[1:] + [len(forced)], strict=True))


class TrainingLoss(nn.Module):
    """A model and its loss as one module: `DistributedDataParallel` hooks `forward` alone.

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
        context = model.encoder.read(batch.src, batch.src_rows_per_step, batch.src_last)  # [batch, hid dim]
        features = model.features(batch.trg, batch.trg_rows_per_step, context, teacher_forcing_ratio)
        tensors = as_autocast(features, context, fc_out.weight, fc_out.bias)
        settings = (self.label_smoothing, self.pad_index, torch.is_grad_enabled())
        return OutputLoss.apply(*tensors, batch.targets, batch.trg_rows_per_step, *settings)


@torch.no_grad()
def init_modelzoo(model: Seq2Seq) -> None:
    """Draws every parameter from N(0, 0.01²), as in the original."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.01)


@torch.no_grad()
def init_tuned(model: Seq2Seq) -> None:
    """Starts each part where a GRU trains well.

    Biases are 0, embeddings N(0, 0.1²), the encoder's input weights N(0, 0.05²); each gate's recurrent block is
    orthogonal (Saxe et al. 2014, arXiv 1312.6120); the decoder's input and output weights are Xavier uniform (Glorot
    and Bengio 2010), the columns for the context as a matrix of their own: as one matrix with the others they would
    start smaller than their fan-in asks for.
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


@torch.no_grad()
def raise_update_gates(model: Seq2Seq, bias: float) -> None:
    """Adds `bias` to the biases of the update gates, z, of both GRUs.

    At 1 a state keeps about three quarters of itself in a step, at 0 half, so that at the start the sentence's first
    words reach its context. Source: Jozefowicz, Zaremba and Sutskever 2015, "An Empirical Exploration of Recurrent
    Network Architectures", who do it to the LSTM's forget gate.
    """
    for rnn in (model.encoder.rnn, model.decoder.rnn):
        rnn.bias_ih_l0.chunk(3)[1].add_(bias)


INITIALISATIONS = {"modelzoo": init_modelzoo, "tuned": init_tuned}


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
    """The whole model; its sizes default to the published ones.

    Args:
        input_dim, output_dim: source and target vocabulary sizes.
        emb_dim: size of the embeddings.
        hid_dim: size of the hidden states and of the context.
        dropout, output_dropout: as in `Decoder`; the encoder takes the former.
        device: where the model is to be.
    """
    encoder = Encoder(input_dim, emb_dim, hid_dim, dropout)
    decoder = Decoder(output_dim, emb_dim, hid_dim, dropout, output_dropout)
    return Seq2Seq(encoder, decoder, torch.device(device))
