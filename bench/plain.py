"""The plain loop: the same model, trained and decoded step by step as the original did it.

    python -m bench.plain train --data-dir data --steps 8 --batch-size 512

prints pairs a second and peak memory. Every sentence is padded to 46 positions, and the encoder reads the padding. The
decoder makes one `nn.GRU` call and one full output layer a step. The logits go into one zeroed buffer, (46, batch,
vocabulary), under one cross entropy. It computes in float32, with Adam, dropout 0.5 on the embeddings and teacher
forcing 0.5. It shares nothing with `gru.py`, but has the same names in its state dict.

This is the original's arithmetic: speed is compared with it. `test/unit/plain_model.py` instead has the formulas step
by step, which `gru.py` must equal.
"""

import argparse
import json
import random
import sys

import data
from bench import machine
from nmt.errors import run_main

import torch
from torch import Tensor, nn

LENGTH = 46  # tokens, `<sos>` and `<eos>` counted
MAX_LENGTH = 50  # most tokens of a translation


class Encoder(nn.Module):
    """Reads the source. Its last state is the context."""

    def __init__(self, input_dim: int, emb_dim: int, hid_dim: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(input_dim, emb_dim)
        self.rnn = nn.GRU(emb_dim, hid_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, src: Tensor) -> Tensor:
        """src [src len, batch] → context [1, batch, hid dim]."""
        embedded = self.dropout(self.embedding(src))  # [src len, batch, emb dim]
        return self.rnn(embedded)[1]


class Decoder(nn.Module):
    """Predicts one token from the one before it, the state and the context."""

    def __init__(self, output_dim: int, emb_dim: int, hid_dim: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(output_dim, emb_dim)
        self.rnn = nn.GRU(emb_dim + hid_dim, hid_dim)
        self.fc_out = nn.Linear(emb_dim + 2 * hid_dim, output_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, token: Tensor, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """token [batch], hidden and context [1, batch, hid dim] → logits [batch, output dim], hidden."""
        embedded = self.dropout(self.embedding(token.unsqueeze(0)))  # [1, batch, emb dim]
        _, hidden = self.rnn(torch.cat((embedded, context), dim=2), hidden)
        return self.fc_out(torch.cat((embedded[0], hidden[0], context[0]), dim=1)), hidden


class Seq2Seq(nn.Module):
    """Encoder and decoder, every step of every sentence on its own.

    Args:
        input_dim, output_dim: source and target vocabulary sizes.
        emb_dim, hid_dim: sizes of the model.
        dropout: on both embeddings.
    """

    def __init__(self, input_dim: int, output_dim: int, emb_dim: int = 256, hid_dim: int = 512, dropout: float = 0.5):
        super().__init__()
        self.encoder = Encoder(input_dim, emb_dim, hid_dim, dropout)
        self.decoder = Decoder(output_dim, emb_dim, hid_dim, dropout)

    def forward(self, src: Tensor, trg: Tensor, teacher_forcing_ratio: float = 0.5) -> Tensor:
        """src [src len, batch], trg [trg len, batch] → logits [trg len, batch, output dim], row 0 zeros."""
        logits = self.decoder.fc_out.bias.new_zeros(*trg.shape, self.decoder.fc_out.out_features)
        context = hidden = self.encoder(src)
        token = trg[0]
        for step in range(1, len(trg)):
            logits[step], hidden = self.decoder(token, hidden, context)
            forced = random.random() < teacher_forcing_ratio
            token = trg[step] if forced else logits[step].argmax(dim=1)
        return logits

    @torch.no_grad()
    def greedy(self, src: Tensor) -> list[int]:
        """Translates one sentence: src [src len, 1] → its ids, `<eos>` included if it came in time."""
        context = hidden = self.encoder(src)
        ids = [data.SOS]
        while len(ids) <= MAX_LENGTH and ids[-1] != data.EOS:
            logits, hidden = self.decoder(src.new_tensor(ids[-1:]), hidden, context)
            ids.append(logits.argmax(dim=1).item())
        return ids[1:]


def mean_loss(logits: Tensor, trg: Tensor) -> Tensor:
    """Cross entropy over all positions except the first and the padding. Arguments as in `Seq2Seq.forward`."""
    criterion = nn.CrossEntropyLoss(ignore_index=data.PAD)
    return criterion(logits[1:].flatten(0, 1), trg[1:].flatten())


def train(args: argparse.Namespace) -> None:
    """Trains for some steps, and one in front of them to warm up, and prints what they took."""
    machine.use_all_cores()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    corpus = data.load(args.data_dir, cache_dir=args.cache_dir)
    model = Seq2Seq(len(corpus.src_vocab), len(corpus.trg_vocab))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.01)
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    batches = torch.randperm(len(corpus.train)).split(args.batch_size)

    pairs, seconds = 0, 0.0
    for step in range(args.steps + 1):
        start = machine.clock(args.device)
        indices = batches[step % len(batches)]
        src, trg = (data.pad(side, indices, LENGTH)[0].to(args.device) for side in (corpus.train.src, corpus.train.trg))
        optimizer.zero_grad()
        loss = mean_loss(model(src, trg), trg)
        loss.backward()
        optimizer.step()
        took = machine.clock(args.device) - start
        print(f"step {step}/{args.steps}  {took:.3f} s  loss {loss.item():.4f}", flush=True)
        if step > 0:
            pairs += len(indices)
            seconds += took
    print(json.dumps({"pairs_per_second": pairs / seconds, "peak_mb": machine.peak_rss_mb()}), flush=True)


def measure(*, steps: int, **flags: object) -> dict[str, float]:
    """Runs `plain.py train` in a process of its own.

    Args:
        steps: timed steps.
        flags: the other flags, with underscores.

    Returns:
        What it prints: pairs_per_second and peak_mb.
    """
    given = [f"--{name.replace('_', '-')}={value}" for name, value in {"steps": steps, **flags}.items()]
    command = [sys.executable, "-m", "bench.plain", "train", *given]
    return json.loads(list(machine.follow(command))[-1].text)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Times the plain loop.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("action", choices=["train"], help="what to time")
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="Multi30k, as for train_8p.py")
    parser.add_argument("--cache-dir", metavar="DIR", help="tokenised corpora, as for train_8p.py")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="timed steps")
    parser.add_argument("--batch-size", type=int, default=512, metavar="N", help="pairs a step")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run")
    parser.add_argument("--seed", type=int, default=1234, help="of weights, batches, dropout and draws")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
