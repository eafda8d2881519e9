"""AuthPct: the share of generated images that are not copies of training images."""

from __future__ import annotations

from torch import Tensor

from genkit_eval.metrics.counts import Counts
from genkit_eval.metrics.pairwise import nearest
from genkit_eval.metrics.registry import Spec, register
from genkit_eval.metrics.sample import Pair


def authentic(train: Tensor, fake: Tensor) -> Tensor:
    """Whether (N,) each generated image is further from its nearest training image than that one is from its own nearest other.

    Alaa et al. 2022. ValueError for fewer than two training images.
    """
    distance, index = nearest(fake, train)
    used, where = index.flatten().unique(return_inverse=True)
    # Nearest to a training image is itself, or a copy, at 0: the second is what is left.
    own = nearest(train[used], train, k=2)[0][:, 1]
    return own[where] < distance.flatten()


def _authentic(pair: Pair) -> Tensor:
    if pair.train is None:
        raise ValueError("train: authenticity needs the features of the training images")
    train = pair.train.features
    return pair.once("authentic", lambda: 100.0 * authentic(train, pair.fake.features).double())


def _replicates(pair: Pair, counts: Counts) -> Tensor:
    return counts.fake @ _authentic(pair) / len(pair.fake)


register(
    Spec(
        name="authpct",
        title="AuthPct",
        variant="authpct/exact",
        better="higher",
        source="features",
        value=lambda pair: float(_authentic(pair).mean()),
        replicates=_replicates,
        interval_of="generated images; training images fixed",
        bounds=(0.0, 100.0),
        reference="train",
        standard=False,
    )
)
