"""The model: one GRU encoder-decoder that shows the decoder the source's context vector at every step.

Source: Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", arXiv 1406.1078, in the form of
Ben Trevett's pytorch-seq2seq tutorial 2 and of farizrahman4u/seq2seq's `peek=True`:

    context  = h_enc(last)                        # also the decoder's first hidden state
    e_t      = dropout(E_trg[y_{t-1}])            # y_0 = <sos>; then the reference or the argmax
    h_t      = GRU([e_t ; context], h_{t-1})
    logits_t = W_o [e_t ; h_t ; context] + b_o

Tensors are time-first: token ids are [length, batch], vectors [length, batch, features].

The decoder's steps are independent of each other as long as it reads the reference. So a stretch of such steps is one
GRU call, and the output layer, which is vocabulary-sized and costs the most, is applied afterwards and only where its
result is needed: at the real target positions for the loss, and at the steps whose argmax is read next.
`test/test_gru.py` holds the plain loop, step by step from the formulas above, that all of this must equal.
"""

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        self.rnn = nn.GRU(emb_dim, hid_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, src: Tensor, src_len: Tensor | None = None) -> Tensor:
        """Encodes a batch of sentences.

        Args:
            src: [src len, batch] token ids.
            src_len: [batch] number of tokens of each sentence, `<sos>` and `<eos>` counted. Without it every
                position is read, padding too.

        Returns:
            [1, batch, hid dim] the context.
        """
        embedded = self.dropout(self.embedding(src))  # [src len, batch, emb dim]
        outputs, hidden = self.rnn(embedded)  # [src len, batch, hid dim], [1, batch, hid dim]
        if src_len is None:
            return hidden
        # The state of a one-way GRU does not depend on what follows, so the state at a sentence's own end is what a
        # packed sequence would give; NPUs have no packed sequences.
        last = (src_len - 1).view(1, -1, 1).expand(1, -1, outputs.shape[2])
        return outputs.gather(0, last)  # [1, batch, hid dim]


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
        self.rnn = nn.GRU(emb_dim + hid_dim, hid_dim)
        self.fc_out = nn.Linear(emb_dim + 2 * hid_dim, output_dim)
        self.dropout = nn.Dropout(dropout)
        self.output_dropout = nn.Dropout(output_dropout)

    def read(self, tokens: Tensor, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Reads a stretch of tokens that are all known, in one GRU call.

        Args:
            tokens: [steps, batch] token ids.
            hidden: [1, batch, hid dim] the hidden state before the first of them.
            context: [1, batch, hid dim].

        Returns:
            features [steps, batch, emb dim + hid dim], which is [e_t ; h_t] after dropout, and
            hidden [1, batch, hid dim] after the last token.
        """
        embedded = self.dropout(self.embedding(tokens))  # [steps, batch, emb dim]
        seen = torch.cat((embedded, context.expand(len(tokens), -1, -1)), dim=2)  # [steps, batch, emb dim + hid dim]
        outputs, hidden = self.rnn(seen, hidden)  # [steps, batch, hid dim], [1, batch, hid dim]
        features = torch.cat((embedded, outputs), dim=2)  # [steps, batch, emb dim + hid dim]
        return self.output_dropout(features), hidden

    def logits(self, features: Tensor, context: Tensor) -> Tensor:
        """Applies the output layer: W_o [e_t ; h_t ; context] + b_o.

        Args:
            features: [..., emb dim + hid dim] from `read`.
            context: [..., hid dim], one for each row of `features`.

        Returns:
            [..., output dim] logits.
        """
        return self.fc_out(torch.cat((features, context), dim=-1))

    def forward(self, prev_token: Tensor, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            prev_token: [batch] token ids.
            hidden: [1, batch, hid dim].
            context: [1, batch, hid dim].

        Returns:
            logits [batch, output dim] and hidden [1, batch, hid dim].
        """
        features, hidden = self.read(prev_token.unsqueeze(0), hidden, context)
        return self.logits(features[0], context[0]), hidden


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
        """Logits of every target position.

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
        features, context = self.features(src, trg, teacher_forcing_ratio, src_len)
        logits = self.decoder.logits(features, context.expand(len(features), -1, -1))
        return torch.cat((logits.new_zeros(1, *logits.shape[1:]), logits))  # [trg len, batch, output dim]

    def features(
        self, src: Tensor, trg: Tensor, teacher_forcing_ratio: float, src_len: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the output layer reads at steps 1 .. trg len - 1; arguments as in `forward`.

        Returns:
            features [trg len - 1, batch, emb dim + hid dim] and context [1, batch, hid dim].
        """
        context = self.encoder(src, src_len)
        # All draws come first. Draw t decides what step t + 1 reads; the last one is made and unused.
        forced = [random.random() < teacher_forcing_ratio for _ in range(1, len(trg))]
        hidden, prev_token = context, trg[0]
        features = []
        for start, end in stretches(forced):
            tokens = torch.cat((prev_token.unsqueeze(0), trg[start : end - 1]))  # [end - start, batch]
            stretch, hidden = self.decoder.read(tokens, hidden, context)
            features.append(stretch)
            if end < len(trg):
                with torch.no_grad():
                    prev_token = self.decoder.logits(stretch[-1], context[0]).argmax(dim=1)  # [batch]
        return torch.cat(features), context

    @torch.no_grad()
    def greedy(self, src: Tensor, src_len: Tensor, sos_index: int, eos_index: int, max_len: int = 50) -> Tensor:
        """Translates a batch, at each step taking the most probable token.

        Args:
            src: [src len, batch] token ids.
            src_len: [batch] lengths of the sources.
            sos_index: id of `<sos>`.
            eos_index: id of `<eos>`.
            max_len: most tokens a translation has.

        Returns:
            [max len, batch] token ids; from a sentence's end on, `<eos>`.
        """
        context = self.encoder(src, src_len)
        hidden = context
        prev_token = src.new_full((src.shape[1],), sos_index)
        translations = src.new_full((max_len, src.shape[1]), eos_index)
        ended = torch.zeros_like(prev_token, dtype=torch.bool)
        for step in range(max_len):
            logits, hidden = self.decoder(prev_token, hidden, context)
            prev_token = logits.argmax(dim=1).masked_fill(ended, eos_index)  # [batch]
            translations[step] = prev_token
            ended |= prev_token == eos_index
            if ended.all():
                break
        return translations


def stretches(forced: list[bool]) -> list[tuple[int, int]]:
    """Cuts the steps 1 .. len(forced) into stretches that one GRU call can read.

    Args:
        forced: forced[t - 1] says whether step t + 1 reads the reference.

    Returns:
        (first step, step after the last) of each stretch. Within a stretch every step but the first reads the
        reference.

    >>> stretches([True, False, True, True])
    [(1, 3), (3, 5)]
    """
    starts = [1] + [t + 1 for t in range(1, len(forced)) if not forced[t - 1]]
    return list(zip(starts, starts[1:] + [len(forced) + 1], strict=True))


class TrainingLoss(nn.Module):
    """A model and its loss as one module: `DistributedDataParallel` hooks `forward` alone.

    Args:
        model: the `Seq2Seq` to train.
        label_smoothing: probability mass spread evenly over the vocabulary (Szegedy et al. 2015, arXiv 1512.00567).
    """

    def __init__(self, model: Seq2Seq, label_smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(
        self, src: Tensor, trg: Tensor, src_len: Tensor | None, positions: Tensor, teacher_forcing_ratio: float
    ) -> Tensor:
        """Cross entropy, summed over the real target positions; arguments as in `Seq2Seq.forward`, and

        Args:
            positions: [n] where in trg[1:], flattened, the real targets are.

        Returns:
            The sum, a scalar in float32 or finer. Its mean over the positions of all ranks is the loss.
        """
        features, context = self.model.features(src, trg, teacher_forcing_ratio, src_len)
        features = features.flatten(0, 1).index_select(0, positions)  # [n, emb dim + hid dim]
        context = context[0].index_select(0, positions % src.shape[1])  # [n, hid dim]
        logits = self.model.decoder.logits(features, context)  # [n, output dim]
        targets = trg[1:].flatten().index_select(0, positions)  # [n]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # half is too coarse for a log-sum-exp
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.label_smoothing)


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
