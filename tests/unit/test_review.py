"""The review of an evaluation against its definition, by a plain sort and a plain count."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from sws_dist.data.loader import Batch
from sws_dist.review import NUM_WORST, Review

CLASSES = 7


def test_the_worst_guesses_and_the_confusions() -> None:
    """Images of one colour, which names them; two in each batch of 25 do not count."""
    torch.manual_seed(0)
    logits, labels = torch.randn(100, CLASSES), torch.randint(CLASSES, (100,))
    logits[3, labels[3]] = -50.0
    colours = torch.arange(100).view(-1, 1, 1, 1).expand(100, 3, 8, 8)
    valid = torch.ones(100, dtype=torch.bool).index_fill(0, torch.tensor([1, 2, 26, 49, 51, 52, 76, 77]), False)
    logits[1, labels[1]] = -99.0  # the worst, if it counted
    logits[60] = torch.nan
    review = Review((0.5,) * 3, (0.5,) * 3)
    for rows in torch.arange(100).split(25):
        images = (colours[rows] / 255 - 0.5) / 0.5
        review.add(Batch(images, labels[rows], rows.numpy(), valid[rows].numpy()), logits[rows])

    worst = review.gather_worst()
    assert worst is not None
    losses = F.cross_entropy(logits, labels, reduction="none").nan_to_num(nan=torch.inf)
    order = [i for i in losses.argsort(descending=True).tolist() if valid[i]][:NUM_WORST]
    assert worst.indices.tolist() == order
    assert order[:2] == [60, 3]
    torch.testing.assert_close(worst.losses, losses[order])
    assert worst.labels.tolist() == labels[order].tolist()
    assert worst.guesses.tolist() == logits[order].argmax(dim=1).tolist()
    assert torch.equal(worst.images, colours[order].to(torch.uint8))

    counts = review.gather_confusion(CLASSES)
    expected = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    for index in valid.nonzero()[:, 0].tolist():
        expected[labels[index], logits[index].argmax()] += 1
    assert counts is not None
    assert (counts == expected).all()


def test_fewer_images_than_are_shown() -> None:
    """A rank may have none at all in a batch."""
    review = Review((0.5,) * 3, (0.5,) * 3)
    images = torch.zeros(2, 3, 8, 8)
    for valid in ([False, False], [True, False]):
        review.add(Batch(images, torch.tensor([0, 1]), np.array([4, 5]), np.array(valid)), torch.eye(2))
    worst = review.gather_worst()
    assert worst is not None
    assert worst.indices.tolist() == [4]
    counts = review.gather_confusion(2)
    assert counts is not None
    assert counts.tolist() == [[1, 0], [0, 0]]
