"""The computations that are written by hand: the GRU, the output layer with its loss, dropout.

They compute what the model's formulas need and nothing else. Each part is one product over all steps where it can be:

- A batch has no padding. Its sentences are sorted longest first, so rows 0..n-1 have a token at a step of n rows. The
  steps stand one after the other: a tensor is [rows, features], and rows is the sum of `rows_per_step`.
- The context does not change from step to step. Its part of the gates' sums and of the logits is computed once a
  sentence.
- Each weight's gradient is one product over all steps.
- The output layer and the cross entropy are one function. The logits' gradient takes the place of the logits.

NPUs and GPUs want few distinct shapes, and have GRU kernels of their own. Their batches are padded. They compute the
padding's rows, which have no loss, and read the context at each step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nmt.errors import UserError, first_line
from nmt.products import Weight, mm, rounded, with_spare_rows

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# ---------------------------------------------------------------- rows and steps


def step_rows(rows_per_step: list[int]) -> list[slice]:
    """The rows of each step, if the steps stand one after the other.

    >>> step_rows([3, 2])
    [slice(0, 3, None), slice(3, 5, None)]
    """
    ends = [0]
    for batch in rows_per_step:
        ends.append(ends[-1] + batch)
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def blocks(rows: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cuts `rows` rows into blocks of at most `limit`, each as (first row, row after the last).

    >>> list(blocks(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    return ((first, min(first + limit, rows)) for first in range(0, rows, limit))


def step_blocks(rows_per_step: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Cuts the steps into blocks of at most `limit` rows, or of one step.

    Args:
        rows_per_step: the steps' numbers of rows.
        limit: the most rows of a block.

    Yields:
        (first step, step after the last), from 0.

    >>> list(step_blocks([3, 3, 2, 1], 7))
    [(0, 2), (2, 4)]
    """
    first = rows = 0
    for step, batch in enumerate(rows_per_step):
        if step > first and rows + batch > limit:
            yield first, step
            first, rows = step, 0
        rows += batch
    yield first, len(rows_per_step)


# ---------------------------------------------------------------- devices and types


def computes_steps(device: torch.device) -> bool:
    """Whether `GRU` computes its steps itself here, and needs no padding. Other devices use their own kernels."""
    return device.type == "cpu"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type for sums over numbers of `dtype`: float32, or float64 of float64."""
    return torch.promote_types(dtype, torch.float32)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts the tensors as autocast, where it is on, does for a product. It does not look into our own functions."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device_type)) for tensor in tensors)


# ---------------------------------------------------------------- the GRU


class GRU(nn.GRU):
    """One layer, one direction, over rows without padding. A part of the input may be the same at all steps.

    The parameters and the formulas are `nn.GRU`'s. On a CPU `run` is `GRUSteps`, elsewhere the device's own kernels: on
    CUDA cuDNN's.

    Args:
        input_size: of the input with the part that is the same at all steps.
        hidden_size: of the state.
        options, named: `nn.GRU`'s others. Those that make another network are refused on every device.

    Raises:
        ValueError: such an option.
    """

    weight_ih_l0: nn.Parameter
    weight_hh_l0: nn.Parameter
    bias_ih_l0: nn.Parameter
    bias_hh_l0: nn.Parameter
    _steps: dict[int, GRUStep] | None = None  # after `freeze`: by the number of the input's features

    def __init__(self, input_size: int, hidden_size: int, *options: Any, **named: Any):
        super().__init__(input_size, hidden_size, *options, **named)
        plain = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0, "bidirectional": False}
        other = [f"{name}={getattr(self, name)}" for name, value in plain.items() if getattr(self, name) != value]
        if other:
            raise ValueError(
                f"GRU(..., {', '.join(other)}): `run` computes one layer in one direction, time first, with biases and "
                "without dropout; for another network use torch.nn.GRU and call it where `run` is called"
            )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.weight_ih_l0.device

    def context_gates(self, batch: int, context: Tensor | None = None) -> Tensor:
        """The part of the gates' sums that does not change from step to step, for `run`.

        Args:
            batch: number of sentences.
            context: [batch, context dim] the last part of the input, the same at all steps, or None.

        Returns:
            On a CPU [batch, 3 * hid dim], what the context and the biases add to the gates' sums.
            Elsewhere [batch, context dim], the context itself, which the device's kernels take as input.
        """
        if not computes_steps(self.weight_ih_l0.device):
            return self.weight_ih_l0.new_empty(batch, 0) if context is None else context
        # The new gate's hidden bias is multiplied by r, so it stays with the hidden state.
        bias = self.bias_ih_l0 + F.pad(self.bias_hh_l0[: 2 * self.hidden_size], (0, self.hidden_size))
        if context is None:
            return bias.expand(batch, -1)
        gates = F.linear(context, self.weight_ih_l0[:, -context.shape[1] :], bias)
        return gates if self._steps is None else gates.to(accumulate_dtype(gates.dtype))

    def run(
        self, inputs: Tensor, rows_per_step: list[int], hidden: Tensor | None, context_gates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs over the steps.

        Args:
            inputs: [rows, input dim] without the context.
            rows_per_step: the steps' numbers of rows. None is larger than the one before it.
            hidden: [rows_per_step[0], hid dim] the state before the first step, or None for zeros.
            context_gates: [at least rows_per_step[0], ...] from `context_gates`.

        Returns:
            [rows, hid dim] the state after each step, and [rows_per_step[-1], hid dim] the last one. On a CPU the last
            one has all its digits, also where products are in half precision: it may begin the next call.

        Raises:
            ValueError: the device's own kernels are used, and the steps differ in their numbers of rows.
        """
        batch = rows_per_step[0]
        context_gates = context_gates[:batch]
        if self._steps is not None and not torch.is_grad_enabled():
            return self._run_frozen(inputs, rows_per_step, hidden, context_gates)
        if computes_steps(inputs.device):
            weight_ih = self.weight_ih_l0[:, : inputs.shape[1]]
            tensors = (inputs, context_gates, weight_ih, self.weight_hh_l0, self.bias_hh_l0[-self.hidden_size :])
            return GRUSteps.apply(*as_autocast(*tensors), hidden, rows_per_step)
        if batch != rows_per_step[-1]:
            raise ValueError(f"here all steps need the same number of rows, not {rows_per_step}")
        inputs = inputs.view(len(rows_per_step), batch, -1)
        if context_gates.shape[1]:
            inputs = torch.cat((inputs, context_gates.expand(len(rows_per_step), -1, -1)), dim=2)
        outputs, last = self(inputs, hidden if hidden is None else hidden.unsqueeze(0))  # [steps, batch, hid dim]
        return outputs.flatten(0, 1), last[0]

    def _run_frozen(self, inputs, rows_per_step, hidden, context_gates) -> tuple[Tensor, Tensor]:
        """`run` by `GRUStep`, which keeps nothing for a backward pass."""
        assert self._steps is not None
        features = inputs.shape[1]
        if features not in self._steps:
            self._steps[features] = GRUStep(self, features)
        make_step = self._steps[features]
        context_gates = context_gates.to(accumulate_dtype(inputs.dtype))
        if hidden is None:
            hidden = context_gates.new_zeros(rows_per_step[0], self.hidden_size)
        if len(rows_per_step) == 1:
            hidden = make_step(inputs, hidden, context_gates)
            return hidden.to(inputs.dtype), hidden
        outputs = inputs.new_empty(len(inputs), self.hidden_size)
        for rows, batch in zip(step_rows(rows_per_step), rows_per_step, strict=True):
            hidden = make_step(inputs[rows], hidden[:batch], context_gates[:batch])
            outputs[rows] = hidden
        return outputs, hidden


def freeze(modules: Iterable[nn.Module]) -> None:
    """Lays the weights of those that are GRUs out for products, on a CPU, and for runs without a gradient.

    The weights must not change afterwards.
    """
    for module in modules:
        if isinstance(module, GRU) and computes_steps(module.device):
            module._steps = {}


class GRUStep:
    """One step of a GRU at a time, without a gradient, on a CPU. The formulas and the types are those of `GRUSteps`.

    Args:
        rnn: the GRU. Its weights must not change afterwards.
        input_dim: of the input without the context.
    """

    def __init__(self, rnn: GRU, input_dim: int):
        size = self._size = rnn.hidden_size
        self._dtype, self._exact = rnn.weight_hh_l0.dtype, accumulate_dtype(rnn.weight_hh_l0.dtype)
        of_input, of_state = rnn.weight_ih_l0.detach()[:, :input_dim], rnn.weight_hh_l0.detach()
        self._of_both = Weight(torch.cat((of_input[: 2 * size], of_state[: 2 * size]), dim=1))  # of r and z
        self._of_input, self._of_state = Weight(of_input[2 * size :]), Weight(of_state[2 * size :])
        self._bias_hn = rnn.bias_hh_l0.detach()[-size:].to(self._exact)

    def __call__(self, inputs: Tensor, hidden: Tensor, context_gates: Tensor) -> Tensor:
        """Makes a step.

        Args:
            inputs: [rows, input dim] without the context.
            hidden: [rows, hid dim] the state before.
            context_gates: [rows, 3 * hid dim] from `GRU.context_gates`, in float32 or finer.

        Returns:
            [rows, hid dim] the state after, with all its digits.
        """
        size = self._size
        state = hidden.to(self._dtype)
        gates = self._of_both(torch.cat((inputs, state), dim=1)).to(self._exact)
        r, z = gates.add_(context_gates[:, : 2 * size]).sigmoid_().split(size, dim=1)
        g = self._of_state(state).to(self._exact).add_(self._bias_hn)
        n = self._of_input(inputs).to(self._exact).add_(context_gates[:, 2 * size :]).addcmul_(r, g).tanh_()
        return torch.lerp(n, hidden.to(self._exact), z)


class GRUSteps(torch.autograd.Function):
    """The GRU's steps and their gradient, with c for `context_gates`.

        r  = sigmoid(W_ir x + c_r + W_hr h)
        z  = sigmoid(W_iz x + c_z + W_hz h)
        g  = W_hn h + b_hn
        n  = tanh(W_in x + c_n + r * g)
        h' = (1 - z) * n + z * h

    Backward, with d for the gradient of the loss by the quantity, and the gates' sums named by the gates:

        dn  = dh' * (1 - z) * (1 - n²)        dg = dn * r
        dr  = dn * g * r * (1 - r)
        dz  = dh' * (h - n) * z * (1 - z)
        dh  = dh' * z + W_hr' dr + W_hz' dz + W_hn' dg

    In half precision the products are in half, and what is kept for the backward pass. The rest is in float32: adding
    up the gates' sums, the gates, the states from step to step, and their gradients. On a CPU that is quicker, too.
    """

    BLOCK = 256  # rows of a step at a time in half: the copies in float32 fit the processor's cache
    EXACT_BLOCK = 4096  # in float32, which needs no copies

    @staticmethod
    def forward(ctx, inputs, context_gates, weight_ih, weight_hh, bias_hn, hidden, rows_per_step):
        """See `GRU.run`. `weight_ih`, [3 * hid dim, input dim], is without the context's columns."""
        size, dtype, exact = weight_hh.shape[1], inputs.dtype, accumulate_dtype(inputs.dtype)
        count, largest = len(inputs), rows_per_step[0]
        block_rows = min(largest, GRUSteps.EXACT_BLOCK if dtype == exact else GRUSteps.BLOCK)
        # A product may read so many rows too many. What it makes of them is not used.
        spare = rounded(block_rows, inputs)
        inputs = with_spare_rows(inputs, rounded(count, inputs))
        gates = mm(inputs, weight_ih.T)  # [rows, 3 * hid dim] the inputs' part of the sums, later r, z and n
        hidden_new = gates.new_empty(count, size)  # g
        outputs = gates.new_empty(count + spare, size)
        work = torch.empty(block_rows, 4 * size, dtype=exact) if dtype != exact else None
        states = torch.empty(largest, size, dtype=exact)  # after the last step
        context_gates, bias_hn = context_gates.to(exact), bias_hn.to(exact)
        before = None  # [rows, hid dim] the states before a step, in the products' type
        if hidden is not None:
            states.copy_(hidden)
            before = with_spare_rows(hidden.to(dtype), largest + spare)
        for step, batch in zip(step_rows(rows_per_step), rows_per_step, strict=True):
            for first, last in blocks(batch, block_rows):
                rows, state = slice(step.start + first, step.start + last), states[first:last]
                if work is None:
                    block, g = gates[rows], hidden_new[rows]
                else:
                    block, g = work[: last - first].split((3 * size, size), dim=1)
                    block.copy_(gates[rows])
                block.add_(context_gates[first:last])
                r, z, n = block.split(size, dim=1)
                if before is None:  # zeros: no product is needed
                    state.zero_()
                    g.copy_(bias_hn)
                else:
                    sums = mm(before[first : first + rounded(last - first, inputs)], weight_hh.T)[: last - first]
                    block[:, : 2 * size].add_(sums[:, : 2 * size])
                    torch.add(sums[:, 2 * size :], bias_hn, out=g)
                block[:, : 2 * size].sigmoid_()
                n.addcmul_(r, g).tanh_()
                torch.lerp(n, state, z, out=state)
                if work is not None:
                    gates[rows], hidden_new[rows] = block, g
                outputs[rows] = state
            before = outputs[step.start :]
        ctx.save_for_backward(inputs, hidden, weight_ih, weight_hh, gates, hidden_new, outputs)
        ctx.rows_per_step = rows_per_step
        ctx.set_materialize_grads(False)
        return outputs[:count], states[:batch]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_outputs, d_last):
        inputs, hidden, weight_ih, weight_hh, gates, hidden_new, outputs = ctx.saved_tensors
        rows_per_step, size, dtype = ctx.rows_per_step, weight_hh.shape[1], inputs.dtype
        exact, count, largest = accumulate_dtype(dtype), len(hidden_new), rows_per_step[0]
        steps = list(zip(step_rows(rows_per_step), rows_per_step, strict=True))
        block_rows = min(largest, GRUSteps.EXACT_BLOCK if dtype == exact else GRUSteps.BLOCK)
        before = inputs.new_empty(len(inputs), size)  # the state before each step
        before[:largest] = 0 if hidden is None else hidden
        for (step, batch), (earlier, _) in zip(steps[1:], steps, strict=False):
            before[step] = outputs[earlier][:batch]
        before[count:] = 0
        # The gradients of the sums n, r, z and g: the first three belong to the inputs, the last three to the state.
        d_sums = inputs.new_empty(len(inputs) + rounded(block_rows, inputs), 4 * size)
        d_sums[count : len(inputs)] = 0
        work = None if dtype == exact else torch.empty(block_rows, 8 * size, dtype=exact)
        d_context_gates = torch.zeros(largest, 3 * size, dtype=exact)
        d_states = torch.zeros(largest, size, dtype=exact)
        if d_last is not None:
            d_states[: rows_per_step[-1]] = d_last
        for step, batch in reversed(steps):
            for first, last in blocks(batch, block_rows):
                rows = slice(step.start + first, step.start + last)
                if work is None:
                    d_block, block, g = d_sums[rows], gates[rows], hidden_new[rows]
                else:
                    d_block, block, g = work[: last - first].split((4 * size, 3 * size, size), dim=1)
                    block.copy_(gates[rows])
                    g.copy_(hidden_new[rows])
                r, z, n = block.split(size, dim=1)
                d_n, d_r, d_z, d_g = d_block.split(size, dim=1)
                d_after = d_states[first:last]
                if d_outputs is not None:
                    d_after.add_(d_outputs[rows])
                d_kept = d_after * z
                torch.ops.aten.tanh_backward.grad_input(d_after - d_kept, n, grad_input=d_n)
                torch.mul(d_n, g, out=d_r)
                torch.sub(before[rows], n, out=d_z).mul_(d_after)
                d_gates = d_block[:, size : 3 * size]
                torch.ops.aten.sigmoid_backward.grad_input(d_gates, block[:, : 2 * size], grad_input=d_gates)
                torch.mul(d_n, r, out=d_g)
                d_context_gates[first:last] += d_block[:, : 3 * size]
                if work is not None:
                    d_sums[rows] = d_block
                if step.start > 0 or hidden is not None:
                    more = slice(rows.start, rows.start + rounded(last - first, inputs))
                    torch.add(d_kept, mm(d_sums[more, size:], weight_hh)[: last - first], out=d_after)
        d_bias_hn = d_sums[:count, 3 * size :].sum(0)
        d_sums = d_sums[: len(inputs)]
        d_inputs = mm(d_sums[:, : 3 * size], weight_ih.roll(size, 0))[:count]  # from r, z, n to n, r, z
        d_weight_ih = mm(d_sums[:, : 3 * size].T, inputs).roll(-size, 0)
        later = slice(largest if hidden is None else 0, None)  # without the step that begins with zeros
        d_weight_hh = mm(d_sums[later, size:].T, before[later])
        d_context_gates = d_context_gates.roll(-size, 1).to(dtype)
        d_hidden = None if hidden is None else d_states.to(hidden.dtype)
        return d_inputs, d_context_gates, d_weight_ih, d_weight_hh, d_bias_hn, d_hidden, None


# ---------------------------------------------------------------- the output layer and its loss


def output_loss(
    features: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    rows_per_step: list[int],
    *,
    label_smoothing: float,
    ignored: int,
) -> Tensor:
    """The output layer and the cross entropy, summed over the rows, by `OutputLoss`. Casts as autocast does.

    Args:
        features: [rows, features] the first part of the layer's input.
        context: [batch, context dim] the rest of it, the same at all steps.
        weight: [vocabulary, features + context dim].
        bias: [vocabulary].
        targets: [rows] token ids.
        rows_per_step: the steps' numbers of rows.
        label_smoothing: probability mass spread evenly over the vocabulary (Szegedy et al. 2016, arXiv 1512.00567).
        ignored: the target id that stands for no target.

    Returns:
        A scalar in float32 or finer.
    """
    tensors = as_autocast(features, context, weight, bias)
    return OutputLoss.apply(*tensors, targets, rows_per_step, label_smoothing, ignored, torch.is_grad_enabled())


def aligned(weight: Tensor, rows: int) -> Tensor:
    """Columns of a weight matrix, with rows of zeros behind them: [rows, columns], without gaps.

    Products with odd numbers of rows, or with gaps, are slow: on a GPU five times, measured with 5893 rows on an H200.
    """
    return with_spare_rows(weight, rows) if len(weight) < rows else weight.contiguous()


class OutputLoss(torch.autograd.Function):
    """The output layer and the cross entropy, summed over the rows. All logits are never in memory at once.

        logits   = W_f features + W_c context + b
        loss     = log sum exp(logits) - (1 - s) logits[target] - s mean(logits)        # s: label smoothing
        d_logits = softmax(logits) - (1 - s) onehot(target) - s / vocabulary

    The forward pass has the logits, so it computes the gradients too and keeps them. The backward pass scales them.
    They belong to a sum over many rows, which float16 might not hold, so they are kept a power of two smaller.
    """

    BLOCK = 48 * 2**20  # bytes of logits at a time, in half precision twice as many: the peak of a step's memory
    SOFTMAX_ROWS = 64  # rows of one softmax on a CPU: they fit a core's own cache
    COMPILED = False  # whether `torch.compile` makes the softmax: fewer passes over a GPU's memory
    SAFE_ROWS = 16384  # rows whose gradients float16 can add up: a feature is rarely above 2, float16 ends at 65504

    @staticmethod
    def forward(ctx, features, context, weight, bias, targets, rows_per_step, smoothing, ignored, with_gradients):
        """See `output_loss`."""
        vocabulary, own = len(weight), features.shape[1]
        width = math.ceil(vocabulary / 64) * 64  # rows of whole cache lines, and of what a GPU multiplies at a time
        weight_own, weight_context = aligned(weight[:, :own], width), aligned(weight[:, own:], width)
        ctx.scale = 2.0 ** -(len(features) // OutputLoss.SAFE_ROWS).bit_length()
        context_logits = mm(context, weight_context.T)[:, :vocabulary].to(accumulate_dtype(features.dtype)).add_(bias)
        d_context_logits = torch.zeros_like(context_logits, memory_format=torch.contiguous_format)
        total = context_logits.new_zeros(())
        d_weight = weight.new_empty(width, weight.shape[1])
        # Each further block rounds the weights' gradient once more, which half can afford less than float32.
        block_bytes = OutputLoss.BLOCK * (2 if features.element_size() == 2 else 1)
        block_rows = block_bytes // (width * features.element_size())
        steps, step_ranges = step_rows(rows_per_step), list(step_blocks(rows_per_step, block_rows))
        counts = [steps[last - 1].stop - steps[first].start for first, last in step_ranges]
        spare = max(rounded(count, features) - count for count in counts)
        d_features = features.new_empty(len(features) + spare, own)
        for (first, last), count in zip(step_ranges, counts, strict=True):
            rows = slice(steps[first].start, steps[last - 1].stop)
            x = with_spare_rows(features[rows], rounded(count, features))
            logits = mm(x, weight_own.T)  # [rows, width]
            total += OutputLoss.softmax(
                logits[:count, :vocabulary],
                context_logits,
                targets[rows],
                rows_per_step[first:last],
                smoothing,
                ignored,
                ctx.scale,
                d_context_logits,
            )
            if with_gradients:  # `logits` are their gradient now; the rows and columns that nobody needs are 0
                mm(logits, weight_own, out=d_features[rows.start : rows.start + len(x)])
                mm(logits.T, x, out=d_weight[:, :own], accumulate=first > 0)
        if with_gradients:
            d_bias = d_context_logits.sum(0).to(bias.dtype)
            d_context_logits = F.pad(d_context_logits.to(features.dtype), (0, width - vocabulary))
            mm(d_context_logits.T, context, out=d_weight[:, own:])
            d_context = mm(d_context_logits, weight_context)
            ctx.gradients = (d_features[: len(features)], d_context, d_weight[:vocabulary], d_bias)
        return total

    @staticmethod
    def softmax(logits, context_logits, targets, rows_per_step, smoothing, ignored, scale, d_context_logits):
        """The loss of some steps' rows, summed. Overwrites their logits with the gradient.

        Args:
            logits: [rows, vocabulary] without the context's part. Becomes the gradient of the loss times `scale`.
            context_logits: [batch, vocabulary] the context's part, bias included, in float32 or better.
            targets: [rows] token ids.
            rows_per_step: the steps' numbers of rows.
            smoothing: the mass spread over the vocabulary.
            ignored: the target id that stands for no target.
            scale: of the gradients.
            d_context_logits: [batch, vocabulary] the gradient of `context_logits` times `scale`. That of these rows is
                added to it.
        """
        loss = context_logits.new_zeros(())
        steps, batch = step_rows(rows_per_step), rows_per_step[0]
        in_parts = logits.device.type == "cpu" and not OutputLoss.COMPILED
        limit = OutputLoss.SOFTMAX_ROWS if in_parts else batch
        if not in_parts and batch == rows_per_step[-1]:
            parts = [(slice(0, len(logits)), slice(0, batch))]  # rows, sentences: all steps at once
        else:
            parts = [
                (slice(step.start + first, step.start + last), slice(first, last))
                for step in steps
                for first, last in blocks(step.stop - step.start, limit)
            ]
        # All parts share one buffer, so that it stays in the cache. Half is too coarse for a log-sum-exp.
        largest = parts[0][0].stop
        work = None if OutputLoss.COMPILED else context_logits.new_empty(largest, logits.shape[1])
        for rows, sentences in parts:
            part = logits[rows], context_logits[sentences], targets[rows], smoothing, ignored, scale
            if work is not None:
                loss += softmax_in_place(*part, work[: rows.stop - rows.start], d_context_logits[sentences])
            else:
                part_loss, logits[rows], d_context = compiled_softmax()(*part)
                loss += part_loss
                d_context_logits[sentences] += d_context
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this loss are gone: its backward pass has run already")
        factor = d_loss / ctx.scale
        return *(gradient.mul_(factor) for gradient in gradients), None, None, None, None, None


def softmax_in_place(
    logits: Tensor,
    context_logits: Tensor,
    targets: Tensor,
    smoothing: float,
    ignored: int,
    scale: float,
    work: Tensor,
    d_context_logits: Tensor,
) -> Tensor:
    """The loss of the rows of steps that have equally many, summed. Its gradients times `scale` are written.

    Args:
        logits: [steps * batch, vocabulary] without the context's part. Become their gradient.
        context_logits: [batch, vocabulary] the context's part.
        targets, smoothing, ignored: as in `output_loss`.
        work: [steps * batch, vocabulary] of the type of `context_logits`.
        d_context_logits: [batch, vocabulary] their gradient is added to it.
    """
    by_step = (-1, *context_logits.shape)
    target = targets.unsqueeze(1)  # [rows, 1], as `real` and `losses`
    real = target != ignored
    x = work.copy_(logits)
    x.view(by_step).add_(context_logits)
    x = torch.log_softmax(x, 1, out=x if logits.device.type == "cpu" else None)
    losses = (smoothing - 1) * x.gather(1, target)
    if smoothing:
        losses -= smoothing * x.mean(1, keepdim=True)
    x.exp_().sub_(smoothing / x.shape[1])
    x.scatter_add_(1, target, torch.full_like(losses, smoothing - 1))
    if scale != 1 or logits.device.type != "cpu" or not real.all():  # elsewhere the last question would wait
        x.mul_(real * scale)
    if logits.device.type == "cpu":
        for d_step in x.view(by_step):
            d_context_logits += d_step
    else:
        d_context_logits += x.view(by_step).sum(0)
    logits.copy_(x)
    return torch.where(real, losses, 0).sum()


def softmax_and_gradient(
    logits: Tensor, context_logits: Tensor, targets: Tensor, smoothing: float, ignored: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `softmax_in_place`, as a function without effects. `torch.compile` makes a few kernels of it.

    Returns:
        The loss, the gradient of `logits` in their type, and that of `context_logits`.
    """
    batch, vocabulary = context_logits.shape
    x = (logits.view(-1, batch, vocabulary) + context_logits).view(-1, vocabulary)  # in the finer type
    log_p = torch.log_softmax(x, 1)
    target = targets.unsqueeze(1)  # [rows, 1]
    real = target != ignored
    losses = (smoothing - 1) * log_p.gather(1, target) - smoothing * log_p.mean(1, keepdim=True)
    on_target = (torch.arange(vocabulary, device=logits.device) == target).to(x.dtype)
    d = (log_p.exp() - smoothing / vocabulary - (1 - smoothing) * on_target) * (real.to(x.dtype) * scale)
    return torch.where(real, losses, 0).sum(), d.to(logits.dtype), d.view(-1, batch, vocabulary).sum(0)


@functools.cache
def compiled_softmax() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`softmax_and_gradient`, compiled at its first call."""
    return torch.compile(softmax_and_gradient, dynamic=True)


def compile_softmax(device: torch.device, dtype: torch.dtype) -> None:
    """Has `OutputLoss` use `compiled_softmax` in this process from now on, and tries it with logits of `dtype`.

    Raises:
        UserError: usage, it cannot be compiled here.
    """
    # As in training: rows with gaps, no gradients. Other forms would be compiled again.
    logits = torch.zeros(4, 16, device=device, dtype=dtype)[:, :8]
    context_logits = torch.zeros(2, 16, device=device, dtype=accumulate_dtype(dtype))[:, :8]
    try:
        with torch.no_grad():
            compiled_softmax()(logits, context_logits, torch.zeros(4, dtype=torch.long, device=device), 0.1, 1, 1.0)
    except Exception as error:  # a compiler fails in its own ways
        todo = "install g++, and triton for a GPU, or leave the flag out"
        raise UserError("usage", f"the loss cannot be compiled: {first_line(error)}", "--compile-loss", todo) from error
    OutputLoss.COMPILED = True


# ---------------------------------------------------------------- dropout


class Dropout(nn.Dropout):
    """`nn.Dropout`, on a CPU from fewer random bits: eight an element if they suffice, otherwise sixteen.

    The probability is rounded to a multiple of 2^-16. The kept elements are scaled by the rounded one.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * 2**16) / 2**16
        if x.device.type != "cpu" or not self.training or dropped in (0, 1):
            return super().forward(x)
        dtype = torch.int8 if (dropped * 2**8).is_integer() else torch.int16
        values = torch.iinfo(dtype).max - torch.iinfo(dtype).min + 1
        words = math.ceil(x.numel() * dtype.itemsize / 8)  # of 64 bits
        bits = torch.empty(words, dtype=torch.int64).random_(-(2**63), None).view(dtype)
        keep = (bits[: x.numel()] >= int((dropped - 0.5) * values)).view_as(x)
        return x * keep.to(x.dtype).mul_(1 / (1 - dropped))
