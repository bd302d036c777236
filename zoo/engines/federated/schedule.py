"""Who takes part in a round, and which samples each client sees at each of its steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.core.seeding import seed_from


def sample_clients(
    clients: int, per_round: int, seed: int, dropout: float = 0.0, stragglers: float = 0.0
) -> tuple[list[int], list[float]]:
    """Who takes part in a round, and the share of its work that each gets done.

    Args:
        clients: how many there are. per_round: how many are asked, uniformly without replacement.
        seed: of this round.
        dropout: probability that a client that was asked never answers: its share is 0. One always answers.
        stragglers: probability that one gets done only part of its steps, uniform in (0, 1).
    Returns:
        the clients, in ascending order, and their shares in [0, 1].
    Raises:
        ValueError: if ``per_round`` is not between 1 and ``clients``, or a probability not in [0, 1).
    """
    if not 1 <= per_round <= clients:
        raise ValueError(f"{per_round} clients a round of {clients}; it must be between 1 and {clients}.")
    if not (0 <= dropout < 1 and 0 <= stragglers <= 1):
        raise ValueError(f"dropout={dropout}, stragglers={stragglers}: probabilities, dropout below 1.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(clients, generator=generator)[:per_round].sort().values
    lost, slow, share = torch.rand(3, per_round, generator=generator)
    work = torch.where(slow < stragglers, share.clamp(min=1e-3), torch.ones(()))
    gone = lost < dropout
    gone[int(lost.argmax())] = False
    return chosen.tolist(), torch.where(gone, 0.0, work).tolist()


def local_batches(
    sizes: Sequence[int],
    seeds: Sequence[int],
    batch_size: int,
    epochs: int = 1,
    steps: int | None = None,
    work: Sequence[float] | None = None,
    drop_last: bool = False,
) -> tuple[Tensor, Tensor, list[int]]:
    """Which samples each client sees at each step of a round; a function of its seed alone.

    Every epoch is a new permutation of the client's samples, cut into batches. The last, smaller batch of an epoch is
    padded and masked, or left out with ``drop_last``; a client with fewer samples than a batch then fills its only one
    with repetitions, so that batch norm sees whole batches.

    Args:
        sizes: samples of each client. seeds: of each client, for this round.
        epochs: passes over a client's samples. steps: so many steps instead, over as many passes as it takes.
        work: share of its steps that each client gets done, at least one unless the share is 0.
    Shapes:
        returns: index (s, t, b) long, within each client's own samples; mask (s, t, b) bool; steps of each client
    Raises:
        ValueError: for a client without samples.
    """
    empty = [i for i, size in enumerate(sizes) if size < 1]
    if empty:
        raise ValueError(f"Client number {empty[0]} of this round has no samples; leave empty clients out.")
    orders: list[Tensor] = []
    masks: list[Tensor] = []
    counts: list[int] = []
    for row, (size, seed) in enumerate(zip(sizes, seeds, strict=True)):
        per_epoch = max(size // batch_size, 1) if drop_last else -(-size // batch_size)
        wanted = epochs * per_epoch if steps is None else steps
        generator = torch.Generator().manual_seed(seed_from(seed, "order"))
        places = torch.arange(per_epoch * batch_size).view(per_epoch, batch_size)
        passes = [torch.randperm(size, generator=generator)[places % size] for _ in range(-(-wanted // per_epoch))]
        share = 1.0 if work is None else work[row]
        done = max(round(wanted * share), 1) if share > 0 else 0
        orders.append(torch.cat(passes)[:done])
        masks.append(((places < size) | drop_last).repeat(len(passes), 1)[:done])
        counts.append(done)
    index = torch.zeros(len(counts), max(counts), batch_size, dtype=torch.long)
    mask = torch.zeros_like(index, dtype=torch.bool)
    for row, done in enumerate(counts):
        index[row, :done], mask[row, :done] = orders[row], masks[row]
    return index, mask, counts
